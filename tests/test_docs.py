"""What a page of docs/ shows runs as it stands, and its links and pictures are there."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["how_good_is_q.md"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayes_svdo.analysis.NutsWarning")  # of short chains
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """Blocks of one page go on from each other."""
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names = {"__name__": "__main__"}
    for index, block in enumerate(blocks):
        exec(compile(block, f"{page} block {index}", "exec"), names)
        assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target


def test_tables_are_those_of_the_results():
    results = (ROOT / "benchmarks/results/posterior_quality.md").read_text().splitlines()
    page = (DOCS / "how_good_is_q.md").read_text().splitlines()
    rows = [line for line in page if line.startswith("|")]
    assert len(rows) > 20
    assert set(rows) <= set(results)


@pytest.mark.parametrize("name", ["uci_regression", "support_recovery", "vdard_speed"])
def test_tables_say_what_a_count_of_ardregression_is(name):
    table = (ROOT / f"benchmarks/results/{name}.md").read_text()
    assert "| ARDRegression |" in table
    assert "`threshold_lambda=1e4`" in table
