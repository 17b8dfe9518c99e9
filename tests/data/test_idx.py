"""The idx reader gives back what was written, and refuses whatever is not whole."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bayes_svdo.data import CorruptDataError
from bayes_svdo.data.idx import read_idx

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture(params=["plain", "plain.gz"])
def write(request, tmp_path):
    """Write bytes to a file, compressed or not."""

    def to_file(content):
        path = tmp_path / request.param
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return to_file


def test_values_survive_the_file(write, as_idx):
    read = read_idx(write(as_idx(VALUES)), ndim=3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, VALUES)


@given(values=arrays(np.uint8, st.tuples(*[st.integers(0, 5)] * 2)))
def test_any_matrix_survives_the_file(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("idx") / "matrix"
    path.write_bytes(bytes([0, 0, 8, 2]) + struct.pack(">II", *values.shape) + values.tobytes())
    np.testing.assert_array_equal(read_idx(path, ndim=2), values)


@pytest.mark.parametrize("length", [0, 3, 15], ids=lambda n: f"{n} bytes")
def test_file_that_ends_in_its_header_is_refused(write, as_idx, length):
    with pytest.raises(CorruptDataError, match=rf"plain.*ends within its header, after {length} "):
        read_idx(write(as_idx(VALUES)[:length]), ndim=3)


@pytest.mark.parametrize("change", [-1, +1], ids=["one short", "one over"])
def test_wrong_number_of_values_is_refused(write, as_idx, change):
    content = (as_idx(VALUES) + b"\0")[: 16 + 24 + change]
    with pytest.raises(CorruptDataError, match=rf"2 x 3 x 4 = 24 bytes.*; {24 + change} follow"):
        read_idx(write(content), ndim=3)


def test_header_with_huge_dimensions_is_refused_without_allocating_them(write):
    content = bytes([0, 0, 8, 3]) + struct.pack(">III", *[2**32 - 1] * 3) + b"\0" * 10
    with pytest.raises(CorruptDataError, match="10 follow"):
        read_idx(write(content), ndim=3)


@pytest.mark.parametrize(
    ("magic", "ndim"),
    [
        (b"\0\0\x08\x01", 3),  # labels where images belong
        (b"\0\0\x08\x03", 1),  # images where labels belong
        (b"\0\0\x0d\x03", 3),  # 32-bit floats
        (b"\x89PNG", 3),
    ],
)
def test_other_kind_of_file_is_refused_by_its_magic_number(write, magic, ndim):
    with pytest.raises(CorruptDataError, match=f"0x{magic.hex()}.*starts with 0x0000080{ndim}"):
        read_idx(write(magic + b"\0" * 40), ndim=ndim)


def _cut(packed):
    return packed[:-12]


def _without_check(packed):
    return packed[:-8]


def _flip(packed):
    return packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:]


def _invalid_block(packed):
    return packed[:10] + b"\xff" * 20 + packed[-8:]


def _with_tail(packed):
    return packed + b"tail"


def _unpacked(packed):
    return gzip.decompress(packed)


@pytest.mark.parametrize(
    "damage", [_cut, _without_check, _flip, _invalid_block, _with_tail, _unpacked]
)
def test_damaged_compression_is_refused(tmp_path, as_idx, damage):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(as_idx(VALUES))))
    with pytest.raises(CorruptDataError, match=r"images\.gz.*gzip compression is damaged"):
        read_idx(path, ndim=3)
