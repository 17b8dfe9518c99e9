"""Weights kept while training goes on, to look at afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayes_svdo._names import unknown_name
from bayes_svdo.inference.arguments import check_count
from bayes_svdo.inference.history import Row
from bayes_svdo.inference.svi import EpochEnd

# What a picture quotes, best first.
_METRICS = ("validation_accuracy", "validation_rmse", "accuracy", "rmse")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One site's weights at the end of an epoch.

    Attributes:
        site: Site name.
        epoch: Counted from 1.
        weights: Posterior means, zero where pruned; a copy of its own, float32, on the CPU.
        row: The epoch's row of the history.
    """

    site: str
    epoch: int
    weights: Tensor = field(repr=False)
    row: Row = field(repr=False)

    @property
    def compression(self) -> float:
        """Weights / nonzero weights of the whole network; inf if none is left."""
        return self.row["compression"]

    @property
    def metric(self) -> tuple[str, float] | None:
        """Column name and value of the accuracy or RMSE: of validation data if there were any."""
        for name in _METRICS:
            if name in self.row:
                return name, self.row[name]
        return None


class Snapshots(Sequence[Snapshot]):
    """A callback for ``fit`` that keeps the pruned means of one site.

    >>> snapshots = Snapshots("fc1.weight", every=5)
    >>> posterior = fit(model, train, callbacks=[snapshots])  # doctest: +SKIP
    >>> [snapshot.epoch for snapshot in snapshots]  # doctest: +SKIP
    [1, 5, 10, 15, ...]

    Each snapshot takes four bytes a weight of main memory. When the next one would exceed
    ``max_bytes``, ``every`` is doubled and the snapshots in between go, so that a run of any
    length is covered from its first epoch on. Two snapshots are always kept, whatever their size.

    Args:
        site: Site name; the network's first if None.
        every: Keep the first epoch and all multiples of this.
        max_bytes: What the weights of all snapshots together may take.

    Raises:
        ValueError: ``every`` or ``max_bytes`` is below 1, or, at the end of the first epoch, the
            network has no such site.
    """

    def __init__(self, site: str | None = None, every: int = 1, max_bytes: int = 2**28) -> None:
        self.site = site
        self.every = check_count("every", every)
        self.max_bytes = check_count("max_bytes", max_bytes)
        self._kept: list[Snapshot] = []

    def __call__(self, end: EpochEnd) -> None:
        """Keep the epoch that has just ended, if its turn has come.

        Raises:
            ValueError: The network has no such site, or the epoch is not later than the last one
                kept: these snapshots belong to another run.
        """
        if self._kept and end.epoch <= self._kept[-1].epoch:
            raise ValueError(
                f"epoch {end.epoch} follows epoch {self._kept[-1].epoch}: these snapshots are of "
                "another run.\n  Try a new Snapshots() for each run."
            )
        if not self._is_due(end.epoch):
            return
        sites = end.posterior.guide.sites
        site = sites[0] if self.site is None else self.site
        if site not in sites:
            raise unknown_name("site", site, sites)
        weights = end.posterior.means()[site].detach().to("cpu", torch.float32, copy=True)
        self._kept.append(Snapshot(site, end.epoch, weights, dict(end.row)))
        while len(self._kept) > 2 and self._bytes() > self.max_bytes:
            self.every *= 2
            self._kept = [kept for kept in self._kept if self._is_due(kept.epoch)]

    def _is_due(self, epoch: int) -> bool:
        first = not self._kept or epoch == self._kept[0].epoch
        return first or epoch % self.every == 0

    def _bytes(self) -> int:
        return sum(kept.weights.numel() * kept.weights.element_size() for kept in self._kept)

    def __getitem__(self, index: int) -> Snapshot:  # type: ignore[override]
        return self._kept[index]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._kept)

    def __repr__(self) -> str:
        epochs = [kept.epoch for kept in self._kept]
        return f"Snapshots(site={self.site!r}, every={self.every}, epochs={epochs})"
