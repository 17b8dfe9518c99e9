"""Files are whole or not there."""

import csv
import json
import math

import pytest

from bayes_svdo.experiments.files import replacing, write_csv, write_json


def test_a_file_that_could_not_be_finished_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_json_does_not_have(tmp_path):
    write_json(tmp_path / "a.json", {"x": [math.inf, 1.5], 3: (math.nan, None)})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [None, 1.5], "3": [None, None]}


def test_csv_has_a_column_for_every_key(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": None}, {"a": 2, "c": "x,y"}])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b": "", "c": ""}, {"a": "2", "b": "", "c": "x,y"}]
