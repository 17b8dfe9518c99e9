"""The map of the project: what is public, and who imports whom."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bayes_svdo

PACKAGE = Path(bayes_svdo.__file__).parent
ORDER = ["distributions", "models", "inference", "analysis", "experiments"]


def _imports(path):
    """Modules of this package that a file imports when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayes_svdo."):
            yield node.module
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("bayes_svdo."))


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_from_itself_or_from_one_to_its_left(folder):
    allowed = {*ORDER[: ORDER.index(folder) + 1], "_names", "_signatures", "data"}
    for path in (PACKAGE / folder).glob("*.py"):
        for module in _imports(path):
            assert module.split(".")[1] in allowed, f"{path.name} imports {module}"


def test_data_knows_nothing_of_the_rest():
    for path in (PACKAGE / "data").glob("*.py"):
        assert {m.split(".")[1] for m in _imports(path)} <= {"data", "_names", "_signatures"}, (
            path.name
        )


@pytest.mark.parametrize("folder", ["", *ORDER, "data"])
def test_every_public_name_exists(folder):
    module = importlib.import_module(f"bayes_svdo.{folder}".rstrip("."))
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)


def test_every_module_imports_and_says_what_it_is():
    for info in pkgutil.walk_packages([str(PACKAGE)], "bayes_svdo."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name


def test_nothing_imports_the_links_at_the_top():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"models", "inference"}, path.name


def test_the_package_loads_torch_when_it_is_asked_for():
    """The help of the command is quick, and Ctrl-C is caught from the start."""
    program = (
        "import sys, bayes_svdo\n"
        "print('torch' in sys.modules)\n"
        "bayes_svdo.__version__\n"
        "print('torch' in sys.modules)\n"
        "from bayes_svdo import *\n"
        "print('torch' in sys.modules, fit is bayes_svdo.inference.fit)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.split() == [b"False", b"False", b"True", b"True"]
    assert {*bayes_svdo.__all__, "inference"} <= set(dir(bayes_svdo))
    assert bayes_svdo.models.BayesianNetwork is bayes_svdo.BayesianNetwork
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = bayes_svdo.fitt


def test_the_toolkit_is_loaded_when_it_is_asked_for():
    program = (
        "import sys, bayes_svdo\n"
        "print('sklearn' in sys.modules)\n"
        "bayes_svdo.inference.VDARDRegressor\n"
        "print('sklearn' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.split() == [b"False", b"True"]
    assert "VDARDRegressor" in dir(bayes_svdo.inference)
    with pytest.raises(AttributeError, match="no attribute 'VDARD'"):
        _ = bayes_svdo.inference.VDARD
