"""The manifest of a directory: size and CRC-32 of each of its files, and how to check them."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError

MANIFEST = "checksums.crc32"
_log = logging.getLogger(__name__)
_CHUNK = 2**20
_THREADS = 4

Checksums = dict[str, list[int]]


def checksum(path: Path) -> list[int]:
    """Return the size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def checksums(directory: Path, skip: Collection[str] = (MANIFEST,)) -> Checksums:
    """Return the checksum of every file, by its path in the directory; ``skip`` names some."""
    paths = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    names = sorted(paths.keys() - skip)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(checksum, [paths[name] for name in names]), strict=True))


def seal(directory: Path, skip: Collection[str] = (MANIFEST,), **more: Any) -> None:
    """Write the manifest of a directory whose files are all written; it is on disk on return.

    Args:
        directory: the directory.
        skip: files that may change later.
        **more: other JSON values to keep in the manifest.
    """
    text = json.dumps({"files": checksums(directory, skip)} | more)
    with (directory / MANIFEST).open("x") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return what ``seal`` wrote; raise ``ValueError`` where it is damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if all(type(n) is int for pair in manifest["files"].values() for n in pair):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{MANIFEST} cannot be read")


def difference(written: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> str | None:
    """Name the first file that is not what was written, and say how it differs; None for none."""
    for name in sorted(written):
        if name not in now:
            return f"{name} is missing"
        if written[name] != now[name]:
            size = f"{now[name][0]:,} bytes, not {written[name][0]:,}"
            return f"{name} has {size if written[name][0] != now[name][0] else 'other bytes'}"
    return None


def check_directory(directory: Path, editable: Collection[str] = ()) -> None:
    """Raise ``UserError`` where a file is not what ``seal`` saw; pass what has no manifest.

    Files that were added since do not count.

    Args:
        directory: the directory.
        editable: names of files that a user may change; a change is noted.
    """
    if not (directory / MANIFEST).is_file():
        return
    try:
        written, now = read_manifest(directory)["files"], checksums(directory)
        for name in editable:
            if name in written and (change := difference({name: written.pop(name)}, now)):
                _log.warning("%s: %s; it is read as it is now", directory, change)
        problem = difference(written, now)
    except ValueError as e:
        problem = str(e)
    except OSError as e:
        problem = f"{Path(e.filename or directory).name}: {e.strerror}"
    if problem is not None:
        raise UserError(
            f"{directory} is damaged ({problem}); make it again, or delete its {MANIFEST} if the "
            "change is yours"
        )
