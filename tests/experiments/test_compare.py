"""A comparison's folder: its numbers, and what becomes of it when it is stopped or damaged."""

import csv
import json
import statistics

import numpy as np
import pytest
from rich.console import Console

from bayes_svdo.experiments import compare, compare_methods
from bayes_svdo.experiments.compare import Settings
from bayes_svdo.experiments.compare_methods import METHODS, Outcome
from bayes_svdo.experiments.runs import RunError

TWO = Settings(("digits", "digits+noise"), seeds=2, device="cpu")


@pytest.fixture
def fits(monkeypatch):
    """Stand-ins for the fits; the cells that were asked for, and after how many Ctrl-C comes."""

    class Fits:
        def __init__(self):
            self.cells, self.interrupt_after = [], None

        def __call__(self, method, name, task, seed, device):
            if self.interrupt_after is not None and len(self.cells) == self.interrupt_after:
                raise KeyboardInterrupt
            self.cells.append((name, seed, method))
            weights = 10 * task.x_train.shape[1]
            nonzero = 100 + len(method) + 10 * seed
            log_alpha = np.linspace(-3, 9, weights).reshape(10, -1) if method == "VD-ARD" else None
            c = 0.5 if method == "L1" else None
            sparsity = 100 * (1 - nonzero / weights)
            return Outcome(90.0 + seed, sparsity, 0.2, nonzero, weights, c, 0.1, log_alpha)

    stand_in = Fits()
    monkeypatch.setattr(compare_methods, "evaluate", stand_in)
    return stand_in


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    return {path.name for path in folder.iterdir()}


FILES = {"config.json", "summary.json", "results.csv", "summary.csv"}


def test_it_writes_a_row_per_cell_and_the_mean_and_spread_beside_the_poster(fits, tmp_path):
    out = tmp_path / "new" / "compare"
    told = []
    comparison, pictures = compare.run(TWO, out, tell=told.append)
    assert fits.cells == TWO.cells()
    assert len(fits.cells) == 2 * 2 * 3
    assert names(out) == FILES | {f"{n}.{kind}" for n in TWO.data for kind in ("npz", "png")}
    assert [path.name for path in pictures] == ["digits.png", "digits+noise.png"]
    assert names(out.parent) == {"compare"}
    assert told == comparison.results

    rows = read(out / "results.csv")
    assert [(r["data"], int(r["seed"]), r["method"]) for r in rows] == TWO.cells()
    assert [r["C"] for r in rows[:3]] == ["", "0.5", ""]

    (row,) = [
        r for r in read(out / "summary.csv") if (r["data"], r["method"]) == ("digits+noise", "RVM")
    ]
    assert (row["seeds"], row["poster_accuracy"], row["poster_sparsity"]) == ("2", "84.6", "85.7")
    assert float(row["accuracy_mean"]) == 90.5
    assert float(row["accuracy_sd"]) == pytest.approx(statistics.stdev([90, 91]))

    config = json.loads((out / "config.json").read_text())
    assert config["settings"] == {
        "data": ["digits", "digits+noise"],
        "seeds": 2,
        "device": "cpu",
        "root": None,
    }
    assert {"torch", "scikit-learn", "bayes-svdo"} <= set(config["versions"])
    assert set(config["methods"]["digits"]) == {"VD-ARD", "L1"}
    assert json.loads((out / "summary.json").read_text())["results"] == comparison.results


def test_the_seeds_of_a_method_share_their_divisions(fits, tmp_path, monkeypatch):
    tasks = {}
    original = compare_methods.evaluate

    def record(method, name, task, seed, device):
        tasks[name, seed, method] = task.y_test.tobytes()
        return original(method, name, task, seed, device)

    monkeypatch.setattr(compare_methods, "evaluate", record)
    compare.run(TWO, tmp_path / "compare")
    assert len({tasks["digits", 0, method] for method in METHODS["digits"]}) == 1
    assert tasks["digits", 0, "L1"] != tasks["digits", 1, "L1"]


def test_the_picture_is_of_the_first_seed(fits, tmp_path):
    compare.run(TWO, tmp_path / "compare")
    task = compare_methods.make_task("digits+noise", 0)
    with np.load(tmp_path / "compare" / "digits+noise.npz") as found:
        np.testing.assert_array_equal(found["example"], task.x_test[0])
        assert found["label"] == task.y_test[0]
        assert found["log_alpha"].shape == (10, 128)


def test_the_table_has_our_numbers_and_the_posters(fits, tmp_path):
    comparison, _ = compare.run(TWO, tmp_path / "compare")
    console = Console(width=200)
    with console.capture() as capture:
        for part in comparison.report():
            console.print(part)
    printed = capture.get()
    for text in ("digits+noise", "90.5 ± 0.7", "94.8", "87.6", "intercepts do not"):
        assert text in printed
    markdown = comparison.to_markdown().splitlines()
    assert markdown[2].startswith("| digits | VD-ARD | 90.5 ± 0.7 | 94.8 | ")
    assert len({line.count("|") for line in markdown[:8]}) == 1


def test_one_seed_has_no_spread(fits, tmp_path):
    comparison, _ = compare.run(Settings(("digits",), seeds=1), tmp_path / "compare")
    assert "±" not in comparison.to_markdown()
    assert comparison.summary()[0]["accuracy_sd"] is None


# Stopping and going on.


def test_ctrl_c_leaves_the_results_so_far_and_the_same_call_continues(fits, tmp_path):
    out = tmp_path / "compare"
    fits.interrupt_after = 4
    comparison, pictures = compare.run(TWO, out)
    assert comparison.interrupted
    assert (len(comparison.results), comparison.num_cells) == (4, 12)
    assert [path.name for path in pictures] == ["digits.png"]
    assert len(read(out / "results.csv")) == 4
    assert compare.load(out).results == comparison.results

    fits.interrupt_after = None
    whole, pictures = compare.run(TWO, out)
    assert not whole.interrupted
    assert fits.cells == TWO.cells()  # each once, in order
    assert whole.results[:4] == comparison.results
    assert [(r["data"], int(r["seed"]), r["method"]) for r in read(out / "results.csv")] == (
        TWO.cells()
    )
    assert len(pictures) == 2


def test_ctrl_c_before_the_first_result_leaves_nothing(fits, tmp_path):
    fits.interrupt_after = 0
    with pytest.raises(KeyboardInterrupt):
        compare.run(TWO, tmp_path / "new" / "compare")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["seeds", "methods", "versions", "complete"])
def test_what_cannot_be_continued_is_refused_before_any_fit(fits, tmp_path, change, monkeypatch):
    out = tmp_path / "compare"
    fits.interrupt_after = None if change == "complete" else 4
    compare.run(TWO, out)
    fits.interrupt_after = None
    settings = Settings(TWO.data, seeds=3, device="cpu") if change == "seeds" else TWO
    if change == "methods":
        monkeypatch.setitem(compare.VDARD_SETTINGS, "digits", {"max_iter": 7})
    if change == "versions":
        monkeypatch.setattr(compare, "version", lambda package: "0.0")
    before, asked = {p: p.read_bytes() for p in out.iterdir()}, len(fits.cells)
    with pytest.raises(RunError, match=r"is not empty.*--overwrite"):
        compare.run(settings, out)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert len(fits.cells) == asked


def test_overwrite_starts_anew_and_the_old_one_stays_until_the_first_result(fits, tmp_path):
    out = tmp_path / "compare"
    compare.run(TWO, out)
    fits.cells, fits.interrupt_after = [], 0
    with pytest.raises(KeyboardInterrupt):
        compare.run(TWO, out, overwrite=True)
    assert len(compare.load(out).results) == 12
    fits.interrupt_after = 1
    comparison, _ = compare.run(TWO, out, overwrite=True)
    assert len(compare.load(out).results) == len(comparison.results) == 1
    assert names(out) == FILES | {"digits.npz", "digits.png"}
    assert names(tmp_path) == {"compare"}


def test_overwrite_replaces_nothing_but_a_comparison(fits, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"not a run folder.*thesis\.tex"):
        compare.run(TWO, tmp_path, overwrite=True)
    assert names(tmp_path) == {"thesis.tex"}
    assert fits.cells == []


def test_a_full_disk_leaves_the_last_complete_state(fits, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    out = tmp_path / "compare"
    monkeypatch.setattr(compare, "write_csv", full)
    with pytest.raises(OSError, match="No space"):
        compare.run(TWO, out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()


# Bad input.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(("digit",)), 'unknown data set "digit".*Did you mean "digits"'),
        (Settings(()), "at least one of digits"),
        (Settings(("digits", "digits")), "each set once.*digits digits"),
        (Settings(seeds=0), "seeds must be.*0"),
        (Settings(device="cud"), '"cud".*Did you mean "cuda"'),
        (Settings(("mnist",), root="/no/such/folder"), "/no/such/folder"),
    ],
)
def test_bad_settings_are_refused_before_any_fit(fits, tmp_path, settings, words):
    with (
        pytest.raises(ValueError, match=words)
        if "no/such" not in words
        else pytest.raises(Exception, match=words)
    ):
        compare.run(settings, tmp_path / "compare")
    assert fits.cells == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", '{"command": "compare", "format": 99}', "not a comparison"),
        ("config.json", '{"command": "fit", "format": 1}', "not a comparison"),
        ("config.json", '{"command": "compare", "format": 1}', "damaged.*settings"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "{}", "damaged.*results"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(fits, tmp_path, file, text, words):
    out = tmp_path / "compare"
    compare.run(Settings(("digits",), seeds=1), out)
    (out / file).write_text(text)
    with pytest.raises(RunError, match=words):
        compare.load(out)


def test_only_a_comparison_is_one(tmp_path):
    assert not compare.is_comparison(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("[]")
    assert not compare.is_comparison(tmp_path)
    (tmp_path / "config.json").write_text('{"command": "compare"}')
    assert compare.is_comparison(tmp_path)
