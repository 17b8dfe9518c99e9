"""The demo at two epochs: what it writes, and what it replaces."""

import json
from dataclasses import replace

import pytest

from bayes_svdo.experiments import demo
from bayes_svdo.experiments.runs import PICTURES, RunError
from bayes_svdo.experiments.training import Settings


@pytest.fixture
def short(monkeypatch):
    settings = replace(demo.SETTINGS, epochs=2, batch_size=1437)
    monkeypatch.setattr(demo, "SETTINGS", settings)


def test_the_demo_is_lenet_300_100_on_digits():
    assert (demo.SETTINGS.model, demo.SETTINGS.data) == ("lenet-300-100", "digits")


@pytest.mark.usefixtures("short")
def test_the_demo_draws_everything_and_replaces_an_earlier_one(tmp_path):
    out = tmp_path / "demo"
    run, pictures = demo.demo(out, seed=3)
    assert [path.name for path in pictures] == list(PICTURES)
    assert run.config["settings"]["seed"] == 3
    demo.demo(out, seed=4)
    assert json.loads((out / "config.json").read_text())["settings"]["seed"] == 4


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("config", ['{"command": "fit"}', "[]", "not JSON"])
def test_the_demo_replaces_nothing_else_unless_told(tmp_path, monkeypatch, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RunError, match="not empty"):
        demo.demo(tmp_path)
    taken = []
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: taken.append(kwargs["overwrite"]))
    demo.demo(tmp_path, overwrite=True)
    assert taken == [True]


def test_validation_never_sees_the_test_set(monkeypatch):
    tasks = []
    monkeypatch.setattr(demo, "train", lambda settings, task: tasks.append(task) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.validate(splits=[0])
    (task,) = tasks
    assert len(task.train[0]) + len(task.test[0]) == 1437
    train = {row.numpy().tobytes() for row in task.train[0]}
    test = {row.numpy().tobytes() for row in demo.data.load("digits").x_test}
    held_out = {row.numpy().tobytes() for row in task.test[0]}
    assert not test & (train | held_out)


def test_validation_gives_means_over_splits():
    settings = Settings("64-10", "digits", epochs=1, batch_size=1150, device="cpu")
    one, two, both = (demo.validate(settings, splits) for splits in ([0], [1], [0, 1]))
    for name in ("error_percent", "compression"):
        assert both[name] == pytest.approx((one[name] + two[name]) / 2)
