"""What a run changes around it is as it was afterwards."""

from __future__ import annotations

import pyro
import pytest
import torch

from bayes_svdo.inference.surroundings import (
    denormals_flushed,
    new_tensors,
    pyro_checks,
    random_numbers_kept,
    random_state,
)

CPU = torch.device("cpu")


def flushes() -> bool:
    return not bool(torch.tensor(1e-40) * 1.0)


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_flushed_for_the_time_being(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        with denormals_flushed(CPU):
            assert flushes()
        assert flushes() == before
    finally:
        torch.set_flush_denormal(False)


def test_denormals_are_numbers_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), denormals_flushed(CPU):
        raise ZeroDivisionError
    assert not flushes()


def test_denormals_of_a_cpu_are_nothing_to_a_gpu() -> None:
    with denormals_flushed(torch.device("cuda", 0)):
        assert not flushes()


def test_random_numbers_that_are_drawn_meanwhile_come_again() -> None:
    with random_numbers_kept(CPU):
        meanwhile = torch.rand(3)
    assert torch.equal(torch.rand(3), meanwhile)


def test_a_seed_gives_the_same_numbers_and_takes_none() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numbers = []
    for _ in range(2):
        with random_state(5, CPU):
            numbers.append(torch.rand(3))
    assert torch.equal(*numbers)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_stream_goes_on() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with random_state(None, CPU):
        assert torch.equal(torch.rand(3), expected)


def test_new_tensors_are_of_the_dtype_for_the_time_being() -> None:
    with new_tensors(CPU, torch.float64):
        assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32
    with new_tensors(torch.device("meta"), None):
        assert torch.zeros(1).is_meta
    assert not torch.zeros(1).is_meta


@pytest.mark.parametrize("structure", [True, False])
def test_pyro_checks_structure_at_most_and_only_if_asked_to(structure: bool) -> None:
    before = pyro.settings.get()
    with pyro_checks(structure):
        during = pyro.settings.get()
    assert pyro.settings.get() == before
    assert not during["validate_distributions_torch"]
    assert during["validate_infer"] == during["validate_poutine"] == structure
    with pyro.validation_enabled(False), pyro_checks(structure):
        assert not pyro.settings.get()["validate_infer"]


@pytest.mark.cuda
def test_a_seed_takes_no_numbers_of_the_gpu() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(0)
    before = torch.cuda.get_rng_state()
    numbers = []
    for _ in range(2):
        with random_state(5, device):
            numbers.append(torch.rand(3, device=device))
    assert torch.equal(*numbers)
    assert torch.equal(torch.cuda.get_rng_state(), before)
