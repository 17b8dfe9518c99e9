from __future__ import annotations

import pytest

from bayes_svdo._names import closest, unknown_name

KNOWN = ["digits", "mnist", "fashion-mnist"]


@pytest.mark.parametrize(
    ("name", "match"),
    [("digit", "digits"), ("MNIST", "mnist"), ("fashion", "fashion-mnist")],
)
def test_the_closest_name_is_offered(name: str, match: str) -> None:
    assert closest(name, KNOWN) == f' Did you mean "{match}"?'


@pytest.mark.parametrize("name", ["cifar10", "", "xyz"])
def test_nothing_is_offered_where_nothing_is_close(name: str) -> None:
    assert closest(name, KNOWN) == ""
    assert closest(name, []) == ""


def test_the_error_names_what_came_and_what_is_known() -> None:
    error = unknown_name("data set", "minst", (name for name in KNOWN))
    assert isinstance(error, ValueError)
    assert str(error) == (
        'unknown data set "minst". Did you mean "mnist"? Known: digits, mnist, fashion-mnist.'
    )


@pytest.mark.parametrize("name", [None, 3, ["mnist"]])
def test_names_that_are_no_strings_are_named_all_the_same(name: object) -> None:
    assert str(unknown_name("data set", name, ["abc"])).startswith(f'unknown data set "{name}".')
