"""Pictures and numbers on disk: complete, or as they were."""

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bayes_svdo.experiments import figures, kl_approximations, shrinkage


def columns(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_kl_is_written_as_a_picture_and_its_numbers(tmp_path):
    written = figures.write("kl", tmp_path / "new" / "folder")
    assert written == [tmp_path / "new/folder/kl.png", tmp_path / "new/folder/kl.csv"]
    assert sorted(written) == sorted((tmp_path / "new/folder").iterdir())
    with Image.open(written[0]) as image:
        assert (image.format, image.width) == ("PNG", 1500)
    table, result = columns(written[1]), kl_approximations.kl_approximations()
    assert [float(row["exact"]) for row in table] == result.exact.tolist()
    assert table[-1]["kingma2015"] == ""
    assert float(table[0]["kingma2015"]) == result.kl["kingma2015"][0]


def test_shrinkage_replaces_an_earlier_picture(tmp_path):
    for name in ("shrinkage.png", "shrinkage.csv", "other.txt"):
        (tmp_path / name).write_text("old")
    picture, numbers = figures.write("shrinkage", tmp_path)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    table = columns(numbers)
    factors = [float(row["factor_vd_ard"]) for row in table if row["z"]]
    np.testing.assert_array_equal(factors, shrinkage.shrinkage().factor["vd_ard"])
    assert (tmp_path / "other.txt").read_text() == "old"


def test_gradient_variance_writes_what_was_measured(tmp_path, monkeypatch):
    class Result:
        def rows(self):
            return [{"log_alpha": 1.0, "noise": "a"}, {"log_alpha": 2.0, "ratio": 0.5}]

    result = Result()
    monkeypatch.setattr(figures.gradient_variance, "compare_noise", lambda: result)
    monkeypatch.setattr(
        figures.gradient_variance, "plot_noise", lambda it: Figure() if it is result else None
    )
    _, numbers = figures.write("gradient-variance", tmp_path)
    assert numbers.read_text().splitlines() == ["log_alpha,noise,ratio", "1.0,a,", "2.0,,0.5"]


def test_all_writes_every_figure(tmp_path, monkeypatch):
    drawn = {name: figures._Drawn(Figure(), [{"a": 1.0}]) for name in figures.FIGURES}
    monkeypatch.setattr(figures, "FIGURES", {name: lambda name=name: drawn[name] for name in drawn})
    written = figures.write("all", tmp_path)
    assert {path.stem for path in written} == {"kl", "gradient-variance", "shrinkage"}
    assert len(written) == len(list(tmp_path.iterdir())) == 6


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    def fails(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "kl.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        figures.write("kl", tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kl.png", b"old")]


def test_an_unknown_name_gives_the_closest_and_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r'"gradient".*Did you mean "gradient-variance"'):
        figures.write("gradient", tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_a_folder_without_permission_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"kl": lambda: pytest.fail("was computed")})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        figures.write("kl", tmp_path / "file")
    monkeypatch.setattr(figures.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission"):
        figures.write("kl", tmp_path)
