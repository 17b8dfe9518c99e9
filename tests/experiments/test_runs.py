"""Run folders: whole or not there, and nothing else is ever replaced."""

import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from bayes_svdo import analysis, data
from bayes_svdo.analysis.snapshots import Snapshots
from bayes_svdo.experiments import runs
from bayes_svdo.experiments.runs import Run, RunError
from bayes_svdo.experiments.training import Settings, make_task, train


@pytest.fixture(scope="module")
def run():
    settings = Settings("64-3-10", "digits", epochs=1, batch_size=1437, device="cpu")
    return Run(
        train(settings, make_task(data.load("digits"))),
        {"settings": vars(settings), "data": {"inputs": [1, 8, 8]}},
        {
            "interrupted": False,
            "stopped_because": "all 1 epochs were done",
            "test": {
                when: {"weights": 1234, "error_percent": 12.5, "nll": math.inf}
                for when in ("before_pruning", "after_pruning")
            },
        },
    )


def test_what_is_saved_is_loaded(run, tmp_path):
    place = runs.save(run, tmp_path / "new" / "run")
    assert place == tmp_path / "new" / "run"
    loaded = runs.load(place)
    assert loaded.config["settings"]["model"] == "64-3-10"
    assert not loaded.interrupted
    for name, value in run.posterior.log_alpha().items():
        assert torch.equal(loaded.posterior.log_alpha()[name], value)


def test_the_json_is_the_json_of_others_too(run, tmp_path):
    """Infinity and NaN are not JSON; null stands for them."""
    place = runs.save(run, tmp_path / "run")

    def refuse(constant):
        raise AssertionError(constant)

    text = (place / "summary.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    assert summary["test"]["after_pruning"]["nll"] is None
    assert runs.load(place).report()  # and a table still prints


def test_a_save_over_a_run_leaves_one_run_and_nothing_beside(run, tmp_path):
    place = runs.save(run, tmp_path / "run")
    (place / "weights.png").write_bytes(b"old")
    with pytest.raises(RunError, match=r"is not empty.*--overwrite"):
        runs.save(run, place)
    runs.save(run, place, overwrite=True)
    assert list(tmp_path.iterdir()) == [place]
    assert not (place / "weights.png").exists()


def test_an_empty_folder_may_be_used(run, tmp_path):
    (tmp_path / "run").mkdir()
    runs.save(run, tmp_path / "run")
    assert runs.load(tmp_path / "run")


def test_the_old_run_stays_if_the_new_one_cannot_be_moved(run, tmp_path, monkeypatch):
    place = runs.save(run, tmp_path / "run")
    rename = Path.rename

    def fail(self, target):
        if Path(target) == place and ".run-" in self.name and (self / "config.json").exists():
            monkeypatch.setattr(Path, "rename", rename)
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        runs.save(run, place, overwrite=True)
    assert list(tmp_path.iterdir()) == [place]
    assert runs.load(place)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_is_taken_is_refused(tmp_path, monkeypatch, overwrite):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is a file"):
        runs.check_place(tmp_path / "file", overwrite=overwrite)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "notes.md").write_text("")
    with pytest.raises(RunError, match="notes.md" if overwrite else "not empty"):
        runs.check_place(tmp_path / "other", overwrite=overwrite)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="no config.json" if overwrite else "not empty"):
        runs.check_place(tmp_path / "half", overwrite=overwrite)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="the folder that you are in"):
        runs.check_place(".", overwrite=overwrite)


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=f"no permission for {tmp_path}"):
        runs.check_place(tmp_path / "a" / "b")


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.check_place("~/run") == tmp_path / "run"


def test_pictures_are_drawn_anew_and_listed_in_order(run, tmp_path):
    place = runs.save(run, tmp_path / "run")
    snapshots = Snapshots()
    settings = Settings("64-3-10", "digits", epochs=2, batch_size=1437, device="cpu")
    train(settings, make_task(data.load("digits")), snapshots)
    pictures = runs.draw(run, place, snapshots)
    assert [path.name for path in pictures] == list(runs.PICTURES)
    stamps = {path: path.stat().st_mtime_ns for path in pictures}
    # Without snapshots the animation that is there stays.
    assert runs.draw(run, place) == pictures
    changed = {path.name for path in pictures if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {"training.png", "log_alpha.png", "weights.png"}


def test_a_picture_that_fails_leaves_the_old_one(run, tmp_path, monkeypatch):
    place = runs.save(run, tmp_path / "run")
    (place / "training.png").write_bytes(b"old")

    class Fails:
        def savefig(self, path):
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")

    monkeypatch.setattr(analysis, "plot_training", lambda history: Fails())
    with pytest.raises(OSError, match="No space"):
        runs.draw(run, place)
    assert (place / "training.png").read_bytes() == b"old"
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_inputs_that_are_no_image_are_drawn_as_a_row(tmp_path):
    task = make_task(data.load("diabetes"))
    settings = Settings("10-4-1", "diabetes", epochs=1, batch_size=353, device="cpu")
    summary = {"interrupted": False, "stopped_because": "", "test": {}}
    config = {"settings": vars(settings), "data": {"inputs": [10]}}
    place = runs.save(Run(train(settings, task), config, summary), tmp_path / "run")
    assert place / "weights.png" in runs.draw(runs.load(place), place)


@pytest.fixture
def heeding_ctrl_c():
    """Whatever this process was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_is_ignored_while_uninterrupted_and_heeded_after():
    handler = signal.getsignal(signal.SIGINT)
    with runs.uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_thread_may_write_a_run_as_well():
    """Only the main thread can set signal handlers."""
    done = []

    def work():
        with runs.uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
