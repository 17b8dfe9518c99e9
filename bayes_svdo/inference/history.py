"""The history of a run as a table: one row per epoch, columns by name."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, float]


class History(Sequence[Row]):
    """Rows of numbers, one per epoch; ``pandas.DataFrame(list(history))`` makes a data frame.

    Columns that :func:`~bayes_svdo.inference.fit` writes (``nll``, ``kl`` and ``objective`` are
    means over the epoch, in which a step counts by its data points):

    - ``epoch``, ``step``: counted from 1, at the end of the epoch.
    - ``nll``: negative log likelihood of a training point under the noise, nats.
    - ``kl``: KL of all weights, nats, before ``kl_weight``; ``kl/<site>``: of one site.
    - ``objective``: of ``nll + kl_weight * kl / num_data``, each step with its own ``kl_weight``;
      where that changes within the epoch (KL warm-up), the row's numbers do not add up to it.
    - ``kl_weight``, ``lr``: at the last step of the epoch; the former is the product of the
      schedule's and the objective's own.
    - ``accuracy`` or ``rmse``: of the noisy network on the training batches.
    - ``validation_...``: the same metric, and ``validation_nll``, of the pruned mean network.
    - ``nonzero``, ``compression``: weights with log alpha below the threshold, and all / those.
    - ``sparsity/<site>``: percentage of the site's weights at or above the threshold.
    - ``seconds``: wall time of the epoch.
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = [dict(row) for row in rows]

    def append(self, row: Row) -> None:
        """Add the row of an epoch."""
        self._rows.append(dict(row))

    def column(self, name: str) -> list[float]:
        """One column, NaN where an epoch has no such number.

        Raises:
            KeyError: No row has this column.
        """
        if self._rows and not any(name in row for row in self._rows):
            raise KeyError(f'no column "{name}"; there are: {", ".join(self.columns)}')
        return [row.get(name, float("nan")) for row in self._rows]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"History({len(self)} epochs: {', '.join(self.columns)})"
