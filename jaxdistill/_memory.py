"""Memory of the process: what is available, and the heap that XLA uses for each step on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

from jaxdistill.errors import UserError

_GROUP = Path("/sys/fs/cgroup")

# Of glibc's malloc.h: what is free is never given back to the system (2 GiB, the largest bound that
# fits, would give back a large model's temporaries each step), no block is mapped by itself, and
# threads share one heap.
_OPTIONS = {-1: -1, -4: 0, -8: 1}


def keep_pages() -> bool:
    """Let glibc's malloc keep the pages of what is freed, and hand them out again.

    XLA on a CPU allocates the temporaries of a step when it begins and frees them when it ends.
    Blocks of that size come fresh from the kernel each time otherwise, page by page, each filled
    with zeros: about a tenth of a training step (``python -m benchmarks``). The command line calls
    this first; other programs may, before they compute and before they import what starts threads
    (``datasets``): those would keep heaps of their own, which blocks of that size do not fit into.
    What was allocated once stays with the process until it ends.

    Returns:
        whether there is such a malloc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another libc, another system
        return False
    return all(mallopt(option, value) for option, value in _OPTIONS.items())


def available_memory() -> int | None:
    """Return how many bytes this process can still take; None where the system does not tell.

    The least of what the machine has free, its control group's limit and the process's own
    (``ulimit -v``) leave.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(free.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        used = int((_GROUP / "memory.current").read_text())
        limits.append(int((_GROUP / "memory.max").read_text()) - used)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(soft - pages * resource.getpagesize())
    return max(0, min(limits)) if limits else None


def check_memory(what: str, size: int, factor: int) -> None:
    """Raise ``UserError`` if reading a number of bytes takes more memory than there is.

    Args:
        what: the thing that is read, which begins the message.
        size: bytes of it.
        factor: bytes of memory that each byte takes.
    """
    available = available_memory()
    if available is not None and size * factor > available:
        raise UserError(
            f"{what} has {size / 1e9:.1f} GB, which take about {size * factor / 1e9:.0f} GB of "
            f"memory, and {available / 1e9:.1f} GB are available; give a part of it"
        )
