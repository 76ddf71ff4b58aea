"""A checkpoint's manifest, written before orbax's own description of the checkpoint is final.

Tensorstore checks its own index; it returns the values of an array as it finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxdistill._checksums import MANIFEST, checksums, difference, read_manifest, seal

_STEP = "_CHECKPOINT_METADATA"
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)  # written after the sealing
_KEYS = ("custom_metadata", "item_handlers", "init_timestamp_nsecs", "commit_timestamp_nsecs")


def seal_checkpoint(directory: Path, metadata: Any) -> None:
    """Write the manifest of a checkpoint whose arrays are all written; it is on disk on return.

    Args:
        directory: of the checkpoint.
        metadata: the run's own, which orbax may write only later.
    """
    seal(directory, _LATER, metadata=metadata)


def damage(directory: Path) -> str | None:
    """Return in a few words how a checkpoint differs from its manifest; None where it does not.

    One without a manifest, of an earlier version of this package, cannot be judged: None.
    """
    if directory.is_dir() and not (directory / MANIFEST).exists():
        return None
    try:
        written, now = read_manifest(directory), checksums(directory, _LATER)
    except ValueError as e:
        return str(e)
    except OSError as e:
        return f"{Path(e.filename or directory).name}: {e.strerror}"
    if problem := difference(written["files"], now):
        return problem
    if added := sorted(now.keys() - written["files"].keys()):
        return f"{added[0]} does not belong to it"
    matches = written.get("metadata") == _metadata(directory)
    return None if matches else f"{_STEP} has other values"


def _metadata(directory: Path) -> Any:
    """Return what orbax keeps of the run's own; its file also holds times, written later."""
    try:
        found = json.loads((directory / _STEP).read_text())
    except (ValueError, OSError):
        return None
    whole = isinstance(found, dict) and all(key in found for key in _KEYS)
    return found["custom_metadata"] if whole else None
