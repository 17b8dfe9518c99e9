"""Several processes find what one finds; what they cannot do is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayes_svdo import fit
from bayes_svdo.experiments import runs
from bayes_svdo.inference import devices
from bayes_svdo.inference.devices import Ranks, is_first_rank, make_fabric, seed_of

SCRIPT = Path(__file__).parent / "ranks_script.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
BIN = Path(sys.executable).parent


def start(*command, timeout=None, **variables):
    """Run a command to its end; one thread per process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True, text=True, env=environment, check=False, timeout=timeout,
    )  # fmt: skip
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
    # Else gloo's threads abort some of the processes, between Python's end and theirs.
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


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


# --- data that come as no tensors -------------------------------------------------------------


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    """What two ranks, each, found in a run over data of several kinds."""
    folder = tmp_path_factory.mktemp("readings")
    start(*TORCHRUN, SCRIPT, folder, "--data", timeout=120)  # ranks that lose each other hang
    return results(folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Dataset, seed 0", 21),
        ("loader, seed 0", 21),
        ("in order", 21),
        ("batch sampler", 21),
        ("subset", 11),
        ("numpy", 21),
        ("distributed", 21),
    ],
)
def test_every_point_comes_to_one_rank(readings, name, number):
    first, second = (each[name] for each in readings)
    steps = 3 if number == 21 else 2  # of five points and what is left
    assert first["steps"] == second["steps"] == [steps, 2 * steps, 3 * steps]
    for mine, theirs in zip(first["epochs"], second["epochs"], strict=True):
        counts = np.bincount(mine + theirs, minlength=number)
        assert len(mine) == len(theirs)
        assert sorted(counts) == [1] * (number - 1) + [2]  # one of them makes parts equal
    for epochs in (first["epochs"], second["epochs"]):
        assert (epochs[0] == epochs[1]) == (name == "in order")
        # No rank has points for itself: by chance for 11 once in 462 pairs of epochs.
        assert (set(epochs[0]) == set(epochs[1])) == (name == "in order")
    assert first["parameters"] == second["parameters"]
    assert first["warnings"] == []


@pytest.mark.slow
def test_batches_that_a_user_puts_together_stay_together(readings):
    parts = [each["own batches"] for each in readings]
    assert [part["steps"] for part in parts] == [[3, 6, 9]] * 2
    for mine, theirs in zip(*(part["epochs"] for part in parts), strict=True):
        assert theirs[-5:] == mine[:5]  # the first batch again, for as many steps
        assert sorted(mine + theirs[:-5]) == list(range(21))
        assert len(mine) == 5 + 5 + 1
    assert parts[0]["epochs"][0] != parts[0]["epochs"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dataset", "loader"])
def test_the_order_of_the_data_is_the_seeds(readings, name):
    for each in readings:
        orders = [each[f"{name}, seed {seed}"]["epochs"] for seed in (0, 1)]
        assert orders[0] != orders[1]


@pytest.mark.slow
def test_noise_is_independent_over_ranks_and_consecutive_seeds(readings):
    draws = [each[f"draws, seed {seed}"] for each in readings for seed in (0, 1)]
    assert len({value for each in draws for value in each}) == 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own numbers", "sampler of train gives another order on each rank.*seeding its own"),
        ("distributed otherwise", "DistributedSampler of train is for rank . of 4.*of 2.*leaving"),
    ],
)
def test_samplers_that_cannot_be_shared_are_refused_on_all_ranks(readings, name, words):
    for each in readings:
        assert re.search(words, each[name]["error"], re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("stream", 3, None),
        ("stream of unknown length", 3, None),
        ("uneven stream", 1, "train ended after step 1 of the epoch on rank 1 of 2"),
        ("same stream", 6, "first batch of train is the same on all ranks.*get_rank"),
        ("same stream, shuffled", 6, "train holds 21 data points.*have read 42.*get_rank"),
    ],
)
def test_ranks_read_streams_until_one_has_no_more(readings, name, steps, words):
    first, second = (each[name] for each in readings)
    assert first["steps"] == second["steps"] == [steps, 2 * steps, 3 * steps]
    assert first["parameters"] == second["parameters"]
    assert first["history"] == second["history"]  # though their batches differ in size
    assert second["warnings"] == []  # the first one speaks, and once
    assert len(first["warnings"]) == (words is not None)
    assert words is None or re.search(words, first["warnings"][0], re.DOTALL)


def test_streams_of_random_numbers_have_seeds_far_apart():
    assert seed_of(-3, 0) == -3  # the 0th is what one device has
    seeds = [seed_of(seed, stream) for seed in range(-5, 50) for stream in range(1, 50)]
    assert len(set(seeds)) == len(seeds)
    assert np.median(np.abs(np.diff(seeds))) > 2**61
    torch.Generator().manual_seed(max(seeds))


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
    assert (ranks.where(True), ranks.where(False)) == ([0], [])
    assert ranks.equal("anything")


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
