"""What every test starts from."""

from __future__ import annotations

import pyro
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: at the end one of them would leave the other cores idle.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _empty_param_store() -> None:
    """Pyro keeps parameters by name, for the whole process."""
    pyro.clear_param_store()
