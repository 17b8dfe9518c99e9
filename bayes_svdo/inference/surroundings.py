"""What a run changes around it, and puts back: random numbers, defaults, floating-point modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pyro
import torch
from torch.random import fork_rng


def random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    """The state of torch's random numbers, on the CPU and on ``device``, as it was afterwards."""
    return fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def random_state(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed``, and the state as it was afterwards; nothing if it is None."""
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with random_numbers_kept(device):
        # torch.manual_seed would seed other devices, too.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def new_tensors(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """What is made with no device or dtype of its own gets these."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def pyro_checks(structure: bool) -> Iterator[None]:
    """Pyro's checks read values back, so shapes are checked once, and values are ours to check."""
    settings = pyro.settings.get()
    structural = {
        name: structure and settings[name] for name in ("validate_poutine", "validate_infer")
    }
    with pyro.settings.context(
        validate_distributions_pyro=False, validate_distributions_torch=False, **structural
    ):
        yield


@contextmanager
def denormals_flushed(device: torch.device) -> Iterator[None]:
    """Dead weights end as denormals, on which a CPU is ten times slower."""
    if device.type != "cpu":
        yield
        return
    smallest = torch.tensor(torch.finfo(torch.float32).smallest_normal) / 2
    already = not bool(smallest * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)
