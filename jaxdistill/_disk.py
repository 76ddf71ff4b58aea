"""What a disk does to a run: one writer at a time, writes that are tried again, no space left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxdistill.errors import UserError

T = TypeVar("T")

PAUSES = (0.5, 2.0)  # seconds before the second and the third try of a write
LOCK = ".lock"
_NAME_BYTES = 255

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What may be over in a moment: a network file system's hiccups, a device that answers late.
_PASSING = (
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.EIO,
    errno.ENFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def errno_of(error: BaseException | None) -> int | None:
    """Return the operating system's number for what made a read or write fail; None for others.

    Tensorstore's errors are no ``OSError``; they hold the number in their text:
    ``[os_error_code='28']``.
    """
    seen = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space, quota, or a larger limit on files."""
    return errno_of(error) in _FULL


def is_passing(error: BaseException) -> bool:
    """Return whether a read or write failed in a way that may be over in a moment."""
    return errno_of(error) in _PASSING


def reason_of(error: BaseException) -> str:
    """Return an error as a few words."""
    number = errno_of(error)
    if number is not None:
        return os.strerror(number)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def retried(write: Callable[[], T]) -> T:
    """Return what ``write`` returns; call it up to three times where what fails may pass.

    Raises:
        OSError: the third failure, or the first one that will not pass.
    """
    for pause in PAUSES:
        try:
            return write()
        except OSError as e:
            if not is_passing(e):
                raise
        time.sleep(pause)
    return write()


def check_name(flag: str, value: str) -> None:
    """Raise ``UserError`` where a path cannot be: a name over 255 bytes, bytes that are not UTF-8.

    Args:
        flag: the option that the path was given with.
        value: the path.
    """
    try:
        longest = max(len(part.encode()) for part in value.split("/"))
    except UnicodeEncodeError:
        raise UserError(f"{flag} {value!a} given; accepted: a path in UTF-8") from None
    if longest > _NAME_BYTES:
        raise UserError(
            f"{flag} has a name of {longest} bytes; accepted: at most {_NAME_BYTES} between slashes"
        )


def create(path: Path) -> int:
    """Open a new file for writing, in place of one of that name; a link is replaced, not followed.

    Returns:
        the descriptor.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all, and surely: it is on disk on return.

    A write that fails in a way that may pass is tried again.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f"{path.name[:40]}.part")

    def write() -> None:
        with os.fdopen(create(part), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        retried(write)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Append to a file, or leave it as it was where the text cannot be written whole.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


class DirectoryLock(contextlib.AbstractContextManager):
    """Keep a directory to one writer, by the kernel's advisory lock (flock) on ``DIR/.lock``.

    The kernel lets go when the process ends, however it ends, so a file left behind stands in
    nobody's way. A file system that has no locks gives none, and nothing is kept.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it, or another object in this one.
        """
        self._file: int | None = None
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if e.errno in _NO_LOCKS:
                return
            if not isinstance(e, BlockingIOError):
                raise
            raise UserError(
                f"{directory} is being written by {holder or 'another process'}; wait for it or "
                "stop it, or choose another directory"
            ) from None
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None
