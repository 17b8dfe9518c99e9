"""One device, several, or several machines: Lightning Fabric, as ``fit`` uses it.

Every rank runs the same program on its part of the data. It keeps the whole KL and ``num_data``
over its own batch times its log likelihood; gradients are averaged, so that the KL counts once.
"""

from __future__ import annotations

import atexit
import os
from inspect import signature
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from bayes_svdo.inference.arguments import check_count, check_precision, choose_device

# Buffers are masks of weights, which are equal on all ranks anyway.
_NO_SYNC: dict[str, Any] = {"forward_sync_buffers": False}
if "forward_sync_buffers" not in signature(DistributedDataParallel).parameters:
    _NO_SYNC = {"broadcast_buffers": False}  # its older name


class _Autocast(MixedPrecision):
    """Mixed precision of operations alone: targets of 1000 would be rounded to multiples of 4."""

    def convert_input(self, data: Any) -> Any:
        """The data as they are; Fabric's own would be cast."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Likewise."""
        return data


def make_fabric(
    device: str | torch.device, devices: int | None, num_nodes: int, precision: str
) -> Fabric:
    """A launched Fabric: there are as many processes afterwards as devices in all.

    Args:
        device: Kind of device, or one of several GPUs where there is one process.
        devices: Processes on this machine; None: as many as ``torchrun`` or ``fabric run`` started,
            else one.
        num_nodes: Machines.
        precision: See :func:`~bayes_svdo.inference.fit`.

    Raises:
        ValueError: Too many devices, or what the launcher started is not what is asked for.
    """
    count = None if devices is None else check_count("devices", devices)
    nodes = check_count("num_nodes", num_nodes)
    where = choose_device(device)
    check_precision(precision, where)
    numeric: dict[str, Any] = {"precision": precision}
    if precision in ("bf16-mixed", "16-mixed"):  # as an object: Fabric else announces it
        numeric = {"plugins": _Autocast(precision, where.type)}  # type: ignore[arg-type]
    if os.environ.get("LT_CLI_USED"):  # `fabric run` says all else, and has launched
        fabric = Fabric(**numeric)
        _leave_at_exit()
        return fabric
    count, nodes = _launched(count, nodes)
    one = count * nodes == 1
    if not one and where.type == "cuda":
        _check_gpus(device, count)
    fabric = Fabric(
        accelerator=where.type,
        devices=[where.index] if one and where.index is not None else count,
        num_nodes=nodes,
        strategy="auto" if one else DDPStrategy(**_NO_SYNC),
        **numeric,
    )
    fabric.launch()
    _leave_at_exit()
    return fabric


def _leave_at_exit() -> None:
    """Have the process leave its group while Python still runs.

    Gloo's threads may hold tensors after the last reduction has returned, and abort a process whose
    interpreter has gone by the time they drop them. Fabric sees to NCCL alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.unregister(_leave)
        atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _launched(count: int | None, nodes: int) -> tuple[int, int]:
    """Processes per machine and machines, as ``torchrun`` has started them if it has."""
    if not TorchElasticEnvironment.detect():
        return count or 1, nodes
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if count is not None and count != local:
        raise ValueError(
            f"devices is {count}, but torchrun has started {local} processes on this machine.\n"
            f"  Try leaving devices out, or torchrun --nproc-per-node={count}."
        )
    return local, world // local


def _check_gpus(device: str | torch.device, count: int) -> None:
    if torch.device("cuda" if device == "auto" else device).index is not None:
        raise ValueError(f'device "{device}" is one GPU, but devices is {count}.')
    found = torch.cuda.device_count()
    if count > found:
        raise ValueError(f"devices is {count}, but this machine has {found} CUDA devices.")


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and writes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return bool(distributed.get_rank() == 0)


def seed_of(seed: int, stream: int) -> int:
    """A seed for a stream of random numbers that has nothing in common with others.

    Those of a seed's streams, and those of consecutive seeds, are independent. The 0th is the
    seed's own.
    """
    if stream == 0:
        return seed
    mixed = np.random.SeedSequence(seed % 2**64, spawn_key=(stream,))
    return int(mixed.generate_state(1, np.uint64)[0])


class Ranks:
    """What the processes of a run tell each other; of one alone, nothing."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size

    def agree(self, value: Any) -> Any:
        """The first rank's value, on all of them."""
        return self._fabric.broadcast(value) if self.count > 1 else value

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks."""
        return self._reduced(values, "mean")

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        return self._reduced(values, "sum")

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return bool(self.where(flag))

    def where(self, flag: bool) -> list[int]:
        """The ranks on which it is so."""
        if self.count == 1:
            return [0] if flag else []
        flags = torch.zeros(self.count, device=self._fabric.device)
        flags[self.rank] = float(flag)
        ranks: list[int] = self.total(flags).nonzero().flatten().tolist()
        return ranks

    def equal(self, value: Any) -> bool:
        """Whether all ranks have the same value."""
        return not self.any(value != self.agree(value))

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        if self.count == 1:
            return values
        reduced: torch.Tensor = self._fabric.all_reduce(values, reduce_op=how)  # type: ignore[assignment]
        return reduced
