"""Locks that outlive no process, and writes that are tried again where that can help."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from jaxdistill import _disk
from jaxdistill._disk import (
    DirectoryLock,
    append,
    errno_of,
    is_full,
    is_passing,
    reason_of,
    retried,
    write_whole,
)
from jaxdistill.errors import UserError

# Takes the lock as DirectoryLock does, without the seconds that importing jax takes.
HOLDER = """
import fcntl, os, sys, time
f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(f, fcntl.LOCK_EX)
os.write(f, b"process 7 on there")
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_of_one_writer_and_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as e:
            DirectoryLock(tmp_path)
        assert str(e.value) == (
            f"{tmp_path} is being written by process 7 on there; wait for it or stop it, or choose "
            "another directory"
        )
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").read_text()  # stale, and no hindrance
    with DirectoryLock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "):
            DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).close()


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_disk.fcntl, "flock", none)
    with DirectoryLock(tmp_path), DirectoryLock(tmp_path):  # nobody can be told from the other
        assert (tmp_path / ".lock").read_text() == ""  # so nobody is said to hold it


@pytest.mark.parametrize(
    ("numbers", "calls", "end"),
    [
        ([errno.EIO, errno.ESTALE], 3, "done"),
        ([errno.EIO] * 3, 3, errno.EIO),
        ([errno.ENOSPC], 1, errno.ENOSPC),
        ([errno.EACCES], 1, errno.EACCES),
    ],
)
def test_what_may_pass_is_tried_three_times(numbers, calls, end, monkeypatch):
    monkeypatch.setattr(_disk, "PAUSES", (0.0, 0.0))
    left, called = list(numbers), []

    def write():
        called.append(1)
        if left:
            raise OSError(left.pop(0), "no")
        return "done"

    if end == "done":
        assert retried(write) == "done"
    else:
        with pytest.raises(OSError) as e:
            retried(write)
        assert e.value.errno == end
    assert len(called) == calls


def test_errors_are_understood_through_what_wraps_them():
    full = ValueError(
        "RESOURCE_EXHAUSTED: Failed writing: Failed to write 538112 bytes to file 30: No space "
        "left on device [os_error_code='28']"  # as tensorstore says it
    )
    assert is_full(full) and not is_passing(full) and reason_of(full) == "No space left on device"
    try:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as e:
            raise RuntimeError("the save failed") from e
    except RuntimeError as e:
        assert errno_of(e) == errno.EIO and is_passing(e)
    assert errno_of(ValueError("shape (3, 28)")) is None
    assert reason_of(ValueError("one\ntwo")) == "one"


def test_links_are_neither_locked_nor_written_through(tmp_path):
    """In a directory that others may write, a link could send what is written elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".lock", "config.json.part", "config.json", "log.jsonl"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError) as e:
        DirectoryLock(tmp_path)
    assert e.value.errno == errno.ELOOP
    write_whole(tmp_path / "config.json", "new")
    with pytest.raises(OSError):
        append(tmp_path / "log.jsonl", "row")
    assert victim.read_text() == "mine" and (tmp_path / "config.json").read_text() == "new"
    assert not (tmp_path / "config.json").is_symlink()
    write_whole(tmp_path / ("x" * 255), "a name of all the bytes that there may be")
