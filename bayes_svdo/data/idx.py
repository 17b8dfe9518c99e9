"""The idx format of MNIST's files: a big-endian header, then one byte per value.

Bytes 0 and 1 are zero, byte 2 is the type (8: unsigned byte), byte 3 the number of
dimensions; then each dimension as a 32-bit integer, then the values, last dimension fastest.
https://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bayes_svdo.data.errors import CorruptDataError

_UNSIGNED_BYTE = 8


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:  # (*dims of the header)
    """Read an idx file of unsigned bytes; one whose name ends in ``.gz`` is decompressed.

    Args:
        path: The file.
        ndim: The number of dimensions that it must have.

    Raises:
        CorruptDataError: If the compression is damaged, the header is not that of an idx file
            of ``ndim`` dimensions of unsigned bytes, or the values are not as many as it says.
    """
    raw = _read_bytes(path)
    header_size = 4 + 4 * ndim
    if len(raw) < header_size:
        raise _corrupt(path, f"it ends within its header, after {len(raw)} bytes")
    magic, expected_magic = raw[:4], bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if magic != expected_magic:
        raise _corrupt(
            path,
            f"its magic number is 0x{magic.hex()}; an idx file of unsigned bytes in {ndim} "
            f"dimension(s) starts with 0x{expected_magic.hex()}",
        )
    shape = struct.unpack_from(f">{ndim}I", raw, 4)
    num_values = len(raw) - header_size
    if num_values != math.prod(shape):
        raise _corrupt(
            path,
            f"its header promises {' x '.join(map(str, shape))} = {math.prod(shape)} bytes of "
            f"values; {num_values} follow",
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header_size).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as stream:
            return stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(path, f"its gzip compression is damaged ({error})") from error


def _corrupt(path: Path, reason: str) -> CorruptDataError:
    return CorruptDataError(
        f"{path} cannot be used: {reason}. Replace it, or delete it to have it downloaded again."
    )
