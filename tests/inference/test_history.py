"""The history of a run is a table."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd
import pytest

from bayes_svdo.inference import History

ROWS = [
    {"epoch": 1, "nll": 2.0, "compression": math.inf},
    {"epoch": 2, "nll": 1.0, "validation_nll": 1.5},
]


def test_rows_are_a_sequence() -> None:
    history = History(ROWS)
    assert len(history) == 2
    assert history[-1] == ROWS[1]
    assert list(history) == ROWS


def test_columns_come_in_order_of_first_appearance() -> None:
    assert History(ROWS).columns == ["epoch", "nll", "compression", "validation_nll"]


def test_a_column_is_nan_where_a_row_has_none() -> None:
    column = History(ROWS).column("validation_nll")
    assert math.isnan(column[0])
    assert column[1] == 1.5


def test_unknown_column_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r'no column "loss"; there are: epoch, nll'):
        History(ROWS).column("loss")


def test_an_empty_history_has_empty_columns() -> None:
    assert History().column("nll") == []
    assert History().columns == []


def test_rows_are_copies() -> None:
    row = {"epoch": 1}
    history = History([row])
    history.append(row)
    row["epoch"] = 9
    assert history.column("epoch") == [1, 1]


def test_csv_holds_the_table(tmp_path: Path) -> None:
    History(ROWS).to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"epoch": "1", "nll": "2.0", "compression": "inf", "validation_nll": ""}
    assert [float(row["nll"]) for row in rows] == [2.0, 1.0]


def test_a_data_frame_can_be_made_of_it() -> None:
    frame = pd.DataFrame(list(History(ROWS)))
    assert list(frame["nll"]) == [2.0, 1.0]


def test_repr_says_how_many_epochs() -> None:
    assert repr(History(ROWS)) == "History(2 epochs: epoch, nll, compression, validation_nll)"
