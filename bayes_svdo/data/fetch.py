"""Where a data set's files come from: a folder that the user names, the cache, or a mirror."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pooch

from bayes_svdo.data.errors import CorruptDataError, DataNotFoundError

ENVIRONMENT_VARIABLE = "BAYES_SVDO_DATA"


@dataclass(frozen=True)
class RemoteFiles:
    """The files of one data set, and where to find them.

    Attributes:
        name: The data set's name.
        folders: Where they may lie below a data folder; downloads go into the first.
        mirrors: Addresses of folders that hold all of them, tried in this order.
        sha256: The checksum of each file as published, by file name.
    """

    name: str
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]


def user_cache() -> Path:
    """The folder that downloads go to, in the place that the operating system has for caches."""
    return Path(pooch.os_cache("bayes_svdo"))


def data_folders(root: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """The folders to search, in order; the last is where downloads go.

    A ``root`` is searched alone: data then come from where the caller said, or not at all.
    Without one, ``$BAYES_SVDO_DATA`` is searched, if set, and then the user's cache.

    Raises:
        DataNotFoundError: If ``root`` or ``$BAYES_SVDO_DATA`` is not a folder.
    """
    if root is not None:
        return (_existing_folder(Path(root), "root"),)
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if not named:
        return (user_cache(),)
    return _existing_folder(Path(named), f"${ENVIRONMENT_VARIABLE}"), user_cache()


def obtain(
    files: RemoteFiles, root: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> dict[str, Path]:
    """Find the files of a data set, or download those that are missing.

    Files that lie uncompressed beside, or instead of, their ``.gz`` are taken as well. Files
    that are already there are used as they are: only downloads are compared with the published
    checksums, and a download takes its final name only after that comparison.

    Args:
        files: What to look for.
        root: A folder to search, and to download to, instead of the usual ones. The files may
            also lie in it directly.
        progress: Whether to show a progress bar while downloading to a terminal.

    Returns:
        The path of each file, by its published name.

    Raises:
        DataNotFoundError: If files are missing and no mirror has them.
        CorruptDataError: If files are missing and a mirror sent something else.
    """
    bases = data_folders(root)
    searched = [base / folder for base in bases for folder in files.folders]
    if root is not None:
        searched.append(bases[0])
    for folder in searched:
        found = _present(files, folder)
        if len(found) == len(files.sha256):
            return found
    own = [folder for folder in searched if folder.is_relative_to(bases[-1])]
    # Complete what an interrupted download began, rather than start beside it.
    target = next((folder for folder in own if _present(files, folder)), own[0])
    found = _present(files, target)
    for file in files.sha256:
        if file not in found:
            found[file] = _download(files, file, target, searched, progress)
    return found


def _existing_folder(path: Path, label: str) -> Path:
    folder = path.expanduser()
    if not folder.is_dir():
        raise DataNotFoundError(
            f"{label} is {str(path)!r}, which is not an existing folder. "
            "Create it or name another one."
        )
    return folder


def _present(files: RemoteFiles, folder: Path) -> dict[str, Path]:
    """The files that are there; a compressed one first, because gzip carries a checksum."""
    found = {}
    for file in files.sha256:
        for path in (folder / file, folder / file.removesuffix(".gz")):
            if path.is_file():
                found[file] = path
                break
    return found


def _download(
    files: RemoteFiles, file: str, target: Path, searched: list[Path], progress: bool
) -> Path:
    attempts: list[str] = []
    wrong_bytes = False
    show_bar = progress and sys.stderr is not None and sys.stderr.isatty()
    for mirror in files.mirrors:
        try:
            with _without_empty_folders(target):
                path = pooch.retrieve(
                    mirror + file,
                    known_hash=f"sha256:{files.sha256[file]}",
                    fname=file,
                    path=target,
                    downloader=pooch.HTTPDownloader(progressbar=show_bar),
                )
            return Path(path)
        except OSError as error:  # every network error of requests, and a full or read-only disk
            attempts.append(f"{mirror + file}: {error}")
        except ValueError as error:  # pooch: the checksum differs
            wrong_bytes = True
            attempts.append(f"{mirror + file}: {error}")
    message = _not_obtained(files, file, target, searched, attempts)
    raise CorruptDataError(message) if wrong_bytes else DataNotFoundError(message)


@contextmanager
def _without_empty_folders(folder: Path) -> Iterator[None]:
    """Remove the folders that came into being and have nothing in them."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):  # not empty, or never made
                each.rmdir()


def _not_obtained(
    files: RemoteFiles, file: str, target: Path, searched: list[Path], attempts: list[str]
) -> str:
    wanted = list(files.sha256)
    lines = [f"data set {files.name!r}: {file} was not found and could not be downloaded."]
    lines.append("Searched:")
    for folder in searched:
        present = _present(files, folder)
        missing = [name for name in wanted if name not in present]
        lines.append(f"  {folder}: {'lacks ' + ', '.join(missing) if present else 'no files'}")
    lines.append("Tried to download from:")
    lines.extend(f"  {attempt}" for attempt in attempts)
    lines.append(
        f"Put the {len(wanted)} files {', '.join(wanted)} (with or without .gz) into {target}, "
        f"or into a folder {files.folders[0]!r} below one that root= or ${ENVIRONMENT_VARIABLE} "
        "names."
    )
    return "\n".join(lines)
