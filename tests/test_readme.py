"""What the README shows runs as it stands."""

import re
from pathlib import Path

import matplotlib as mpl
import pyro
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_runs(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    pyro.clear_param_store()
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_first_screen_has_code_and_both_commands():
    first = TEXT.splitlines()[:50]
    assert any("```python" in line for line in first[:12])
    assert any("make demo" in line for line in first)
    assert any("make test" in line for line in first)


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
