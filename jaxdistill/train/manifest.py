"""A checkpoint's manifest: the size and checksum of each of its files, and how to check them.

Tensorstore checks its own index; the values of an array it hands out as it finds them.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_STEP = "_CHECKPOINT_METADATA"
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)  # written after the sealing
_KEYS = ("custom_metadata", "item_handlers", "init_timestamp_nsecs", "commit_timestamp_nsecs")
_CHUNK = 2**20


def seal(directory: Path, metadata: Any) -> None:
    """Write the manifest of a checkpoint whose arrays are all written; it is on disk on return.

    Args:
        directory: of the checkpoint.
        metadata: the run's own, which orbax may write only later.
    """
    found = json.dumps({"files": _checksums(directory), "metadata": metadata})
    with (directory / MANIFEST).open("w") as file:
        file.write(found + "\n")
        file.flush()
        os.fsync(file.fileno())


def damage(directory: Path) -> str | None:
    """Return in a few words how a checkpoint differs from its manifest; None where it does not.

    One without a manifest, of an earlier version of this package, cannot be judged: None.
    """
    if directory.is_dir() and not (directory / MANIFEST).exists():
        return None
    try:
        written = json.loads((directory / MANIFEST).read_text())
        files, metadata = written["files"], written["metadata"]
        found = _checksums(directory)
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    except OSError as e:
        return f"{Path(e.filename or directory).name}: {e.strerror}"
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in files:
            return f"{name} does not belong to it"
        if files[name] != found[name]:
            size = f"{found[name][0]:,} bytes, not {files[name][0]:,}"
            return f"{name} has {size if files[name][0] != found[name][0] else 'other bytes'}"
    return None if metadata == _metadata(directory) else f"{_STEP} has other values"


def _checksums(directory: Path) -> dict[str, list[int]]:
    """Return the size and CRC-32 of every file, by its path in the directory."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file())
    names = [(p, p.relative_to(directory).as_posix()) for p in paths]
    return {name: _checksum(path) for path, name in names if name not in _LATER}


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _metadata(directory: Path) -> Any:
    """Return what orbax keeps of the run's own; its file also holds times, written later."""
    try:
        found = json.loads((directory / _STEP).read_text())
    except (ValueError, OSError):
        return None
    whole = isinstance(found, dict) and all(key in found for key in _KEYS)
    return found["custom_metadata"] if whole else None
