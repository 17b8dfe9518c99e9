"""Several processes find what one finds; what they cannot do is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayes_svdo import fit
from bayes_svdo.experiments import runs
from bayes_svdo.inference import devices
from bayes_svdo.inference.devices import Ranks, is_first_rank, make_fabric

SCRIPT = Path(__file__).parent / "ranks_script.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
BIN = Path(sys.executable).parent


def start(*command, **variables):
    """Run a command to its end; one thread per process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def results(folder, ranks):
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    start(sys.executable, SCRIPT, tmp_path)
    start(*TORCHRUN, SCRIPT, tmp_path)
    (one,), (first, second) = results(tmp_path, 1), results(tmp_path, 2)

    # Without noise all is the same: the KL counts once, and N is split rightly.
    for name in ("without noise", "traced", "loader"):
        np.testing.assert_allclose(first[name], one[name], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(first["history"], one["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)

    # With noise, which is each rank's own, the gradient is the same in expectation.
    assert not set(first["draws"]) & set(second["draws"])
    (mean, error), (other, other_error) = first["gradient"], one["gradient"]
    distance = np.subtract(mean, other) / np.hypot(error, other_error)
    assert np.abs(distance).max() < 4.5
    assert 0.8 < distance.std() < 1.2
    assert np.median(np.divide(error, other_error)) == pytest.approx(1.0, rel=0.1)

    # Ranks stay equal: parameters, masks, statistics, history, and when they end.
    assert first["pruned"] == second["pruned"] > 0
    for name in first.keys() - {"draws"}:
        assert first[name] == second[name], name
    assert first["ended after"] == 2  # because the last rank's callback said so
    assert "epoch 1, step 1" in first["error"]


@pytest.mark.slow
def test_fabric_run_starts_ranks_too(tmp_path):
    """It needs click, which need not be installed; what it does is set these, and torchrun."""
    choice = {"ACCELERATOR": "cpu", "STRATEGY": "ddp", "DEVICES": "2", "NUM_NODES": "1"}
    variables = {f"LT_{name}": value for name, value in choice.items()}
    start(*TORCHRUN, SCRIPT, tmp_path, "--brief", LT_CLI_USED="1", **variables)
    first, second = results(tmp_path, 2)
    assert first["without noise"] == second["without noise"]


@pytest.mark.slow
def test_the_command_line_starts_its_own_ranks_and_writes_one_run(tmp_path):
    done = start(
        BIN / "bayes-svdo", "fit", "--data", "digits", "--model", "64-8-10", "--epochs", 2,
        "--batch-size", 360, "--device", "cpu", "--devices", 2, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.stdout.count("Run folder") == 1
    assert "deprecated" not in done.stderr
    assert done.stderr.count("epoch 2/2") == 1
    run = runs.load(tmp_path / "run")
    assert len(run.posterior.history) == 2
    assert run.posterior.history[-1]["step"] == 4  # 1,437 data points in two parts


def test_one_process_needs_no_strategy():
    fabric = make_fabric("cpu", None, 1, "32-true")
    ranks = Ranks(fabric)
    assert (ranks.rank, ranks.count) == (0, 1)
    assert is_first_rank()
    value = torch.tensor([1.0, 2.0])
    assert ranks.mean(value) is value
    assert ranks.total(value) is value
    assert ranks.agree("anything") == "anything"
    assert ranks.any(True)
    assert not ranks.any(False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": 0}, "devices must be .* but is 0"),
        ({"num_nodes": 0}, "num_nodes must be .* but is 0"),
        ({"devices": 1.5}, "devices must be"),
    ],
)
def test_numbers_that_are_none_are_refused_before_any_training(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        fit(lambda x, y: None, (torch.zeros(2, 1), torch.zeros(2)), **settings)


def test_more_devices_than_torchrun_started_are_refused(monkeypatch):
    monkeypatch.setattr(devices.TorchElasticEnvironment, "detect", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert devices._launched(None, 1) == (2, 3)
    assert devices._launched(2, 1) == (2, 3)
    with pytest.raises(ValueError, match=r"devices is 4, but torchrun has started 2(.|\n)*Try"):
        devices._launched(4, 1)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices._check_gpus("auto", 2)
    with pytest.raises(ValueError, match="devices is 3, but this machine has 2 CUDA devices"):
        devices._check_gpus("cuda", 3)
    with pytest.raises(ValueError, match='device "cuda:1" is one GPU, but devices is 2'):
        devices._check_gpus("cuda:1", 2)
