"""How many weights are left, layer by layer."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one site.

    Attributes:
        name: Site name.
        shape: Shape of the weight.
        weights: Number of weights.
        nonzero: Weights with log alpha below the threshold; all, if the prior is not scale-free.
        log_alpha: Quantiles 5 %, 50 % and 95 % of log alpha (nearest values).
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    log_alpha: tuple[float, ...]

    @property
    def percent(self) -> float:
        """Percentage of weights that are zero."""
        return 100.0 * (1 - self.nonzero / self.weights)


@dataclass(frozen=True)
class SparsityTable(Sequence[LayerSparsity]):
    """Sparsity per layer and in all; prints as a table.

    Attributes:
        layers: One entry per site, in the network's order.
        threshold: A weight is zero where ``log alpha >= threshold``.
        num_biases: Parameters that are no weights (biases, normalisation) and are never pruned.
        num_dense: Weights without a prior, which are never pruned either; in ``weights`` they do
            not count.
    """

    layers: tuple[LayerSparsity, ...]
    threshold: float
    num_biases: int = 0
    num_dense: int = 0

    @property
    def weights(self) -> int:
        """Number of weights with a prior."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Number of weights left."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def percent(self) -> float:
        """Percentage of weights that are zero."""
        return 100.0 * (1 - self.nonzero / self.weights)

    @property
    def compression(self) -> float:
        """Weights / nonzero weights, biases not counted (as in the paper); inf if none is left."""
        return self.weights / self.nonzero if self.nonzero else float("inf")

    @property
    def compression_with_biases(self) -> float:
        """All parameters / those that are not zero: biases and weights without a prior count."""
        others = self.num_biases + self.num_dense
        left = self.nonzero + others
        return (self.weights + others) / left if left else float("inf")

    def __getitem__(self, index: int | str) -> LayerSparsity:  # type: ignore[override]
        if isinstance(index, str):
            by_name = {layer.name: layer for layer in self.layers}
            if index not in by_name:
                raise KeyError(f'no layer "{index}"; there are: {", ".join(by_name)}')
            return by_name[index]
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        return {
            "threshold": self.threshold,
            "weights": self.weights,
            "nonzero": self.nonzero,
            "percent": self.percent,
            "compression": self.compression,
            "compression_with_biases": self.compression_with_biases,
            "layers": {
                layer.name: {
                    "weights": layer.weights,
                    "nonzero": layer.nonzero,
                    "percent": layer.percent,
                    "log_alpha": dict(zip(map(str, QUANTILES), layer.log_alpha, strict=True)),
                }
                for layer in self.layers
            },
        }

    def to_rich(self, title: str | None = None) -> Table:
        """The table for a terminal."""
        table = Table(title=title, caption=self._caption(), caption_justify="left")
        for heading, justify in (
            ("layer", "left"),
            ("shape", "left"),
            ("weights", "right"),
            ("nonzero", "right"),
            ("sparsity", "right"),
            ("log α 5 % / 50 % / 95 %", "right"),
        ):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for layer in self.layers:
            table.add_row(
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                f"{layer.nonzero:,}",
                f"{layer.percent:.1f} %",
                " / ".join(f"{value:.1f}" for value in layer.log_alpha),
            )
        table.add_section()
        table.add_row(
            "all", "", f"{self.weights:,}", f"{self.nonzero:,}", f"{self.percent:.1f} %", ""
        )
        return table

    def _caption(self) -> str:
        fewer = f"{self.compression:.1f}x fewer weights" if self.nonzero else "no weight is left"
        others = [f"{self.num_biases:,} biases"] if self.num_biases or not self.num_dense else []
        if self.num_dense:
            others.append(f"{self.num_dense:,} weights without a prior")
        if self.compression_with_biases < float("inf"):
            fewer += f" ({self.compression_with_biases:.1f}x counting {' and '.join(others)})"
        return f"pruned where log α >= {self.threshold:g}: {fewer}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.to_rich())
        return capture.get()


def sparsity_table(
    log_alpha: Mapping[str, Tensor],
    threshold: float,
    num_biases: int = 0,
    num_dense: int = 0,
    prunable: Collection[str] | None = None,
) -> SparsityTable:
    """Sparsity at a threshold, from ``log alpha`` of each site (any shape; inf where pruned).

    Sites outside of ``prunable`` (all, if None) are dense, whatever their log alpha.
    """
    return SparsityTable(
        tuple(
            _layer(name, value, threshold, prunable is None or name in prunable)
            for name, value in log_alpha.items()
        ),
        threshold,
        num_biases,
        num_dense,
    )


def _layer(name: str, log_alpha: Tensor, threshold: float, prunable: bool) -> LayerSparsity:
    flat = log_alpha.flatten().to(torch.promote_types(log_alpha.dtype, torch.float32))
    # Order statistics: between two of which one is inf, nothing lies; and torch.quantile takes no
    # more than 2^24 values.
    ranks = [1 + round(q * (len(flat) - 1)) for q in QUANTILES]
    return LayerSparsity(
        name,
        tuple(log_alpha.shape),
        log_alpha.numel(),
        int((log_alpha < threshold).sum()) if prunable else log_alpha.numel(),
        tuple(float(flat.kthvalue(rank).values) for rank in ranks),
    )
