"""How many of a CPU's cores a training run has work for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bayes_svdo.inference.arguments import check_count

# Operations (a multiply-add counts as two) of one matrix product that are worth a thread: some 50
# microseconds, several times what it takes to wake one. See benchmarks/results/step.md.
OPERATIONS_OF_A_THREAD = 2**21


def check_threads(num_threads: int | Literal["auto"]) -> int | None:
    """The number, None for ``"auto"``.

    Raises:
        ValueError: It is neither ``"auto"`` nor a whole number of at least 1.
    """
    if isinstance(num_threads, str):
        if num_threads != "auto":
            raise ValueError(
                f'num_threads must be "auto" or an integer of at least 1, but is "{num_threads}".'
            )
        return None
    return check_count("num_threads", num_threads)


@contextmanager
def threads(number: int | None, device: torch.device, step: Callable[[], Any]) -> Iterator[None]:
    """So many threads on a CPU, and as many as before afterwards.

    Args:
        number: How many; None for as many as :func:`threads_for` says.
        device: Nothing is done for a GPU.
        step: Does the matrix products of a step's forward pass, to count their operations.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(step) if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(step: Callable[[], Any]) -> int:
    """How many of torch's threads have enough to do in the matrix products of a call.

    A product is shared among all threads, and the next one waits for the last of them: where it is
    small, more threads take longer. What counts is the size of the product that an operation
    belongs to, on average over operations. torch's own number is the most.
    """
    with torch.no_grad(), _Products() as products:
        step()
    total = sum(products.operations)
    if total == 0:
        return torch.get_num_threads()
    size = sum(size**2 for size in products.operations) / total
    return max(1, min(torch.get_num_threads(), int(size / OPERATIONS_OF_A_THREAD)))


class _Products(TorchDispatchMode):
    """Operations of each matrix product and convolution, a multiply-add as two."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.operations.append(count(*args, **(kwargs or {}), out_val=output))
        return output
