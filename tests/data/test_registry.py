"""Every name loads its set; what is asked wrongly gets an answer that helps."""

import pytest
import torch

from bayes_svdo.data import DataNotFoundError, available, load

NAMES = (
    "digits",
    "diabetes",
    "mnist",
    "fashion-mnist",
    "boston",
    "concrete",
    "energy",
    "kin8nm",
    "yacht",
)


def test_available_lists_every_name_once():
    assert available() == NAMES


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_bundled_sets_need_no_files_and_no_network(name):
    assert load(name).name == name


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets_load_from_root(name, tiny, lay_out, tmp_path):
    lay_out(tmp_path / "root" / name, tiny)
    data = load(name, tmp_path / "root")
    assert (data.name, len(data.x_train)) == (name, 12)


def test_idx_set_loads_from_a_mirror_and_then_from_the_cache(tiny, publish, serve):
    mirror = serve(tiny)
    publish(tiny, mirror.url)
    first, second = load("mnist", progress=False), load("mnist")
    assert torch.equal(first.x_train, second.x_train)
    assert len(mirror.requested) == 4


@pytest.mark.parametrize("name", NAMES[2:])
def test_set_that_is_nowhere_is_not_found_by_name(name):
    with pytest.raises(DataNotFoundError, match=f"data set '{name}'"):
        load(name)


@pytest.mark.parametrize("name", NAMES)
def test_missing_root_is_an_error_for_every_set(name, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"root is '.*nowhere'"):
        load(name, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("wrong", "close"), [("mnsit", "mnist"), ("MNIST", "mnist"), ("fashion", "fashion-mnist")]
)
def test_unknown_name_is_answered_with_the_closest(wrong, close):
    with pytest.raises(ValueError, match=rf'"{wrong}"\. Did you mean "{close}"\? Known: dig'):
        load(wrong)


def test_name_like_no_other_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r'"zzz"\. Known: digits, diabetes, mnist'):
        load("zzz")


@pytest.mark.parametrize("name", ["digits", "diabetes", "mnist", "fashion-mnist"])
def test_split_of_a_set_with_one_split_is_refused(name):
    with pytest.raises(ValueError, match=f"split=0 was given for data set '{name}'.*boston, conc"):
        load(name, split=0)


@pytest.mark.parametrize("split", [-1, 20])
def test_split_out_of_range_is_refused(split):
    with pytest.raises(ValueError, match=f"between 0 and 19.*got {split}"):
        load("yacht", split=split)


def test_fractional_split_is_refused():
    with pytest.raises(TypeError):
        load("yacht", split=0.5)
