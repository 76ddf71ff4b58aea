"""The heap of the process: what XLA on a CPU takes for each step, and gives back after it."""

from __future__ import annotations

import ctypes

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
