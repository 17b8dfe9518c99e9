"""Files that are whole or not there."""

from __future__ import annotations

import csv
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def beside(path: Path) -> Path:
    """A hidden name in the same folder that nothing has yet."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which takes the name of ``path`` once it is complete."""
    unfinished = beside(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content``, with null for inf and NaN, which JSON does not have."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for every key, in order of first appearance, empty where a row has none."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
