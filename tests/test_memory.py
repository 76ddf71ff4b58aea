"""Pages that a process has freed are handed out again, to any of its threads."""

import platform
import subprocess
import sys

import pytest

# Fills and frees 64 MiB again and again in another thread; prints the page faults of the last time.
CHILD = """
import resource, sys, threading
if sys.argv[1] == "keep":
    from jaxdistill._memory import keep_pages
    assert keep_pages()
faults = []
def work():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * 2**26
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_pages_are_kept():
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", CHILD, how]))
        for how in ("keep", "not")
    }
    assert faults["keep"] < 100 < 2**26 // 4096 * 0.9 < faults["not"]


# Takes and frees 3 GiB that it never touches; prints how much longer the heap is then.
LARGE = """
import ctypes
from jaxdistill._memory import keep_pages
assert keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
before = libc.sbrk(0)
block = libc.malloc(3 * 2**30)
assert block
libc.free(block)
print(libc.sbrk(0) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_temporaries_of_a_large_model_are_kept_too():
    kept = int(subprocess.check_output([sys.executable, "-c", LARGE]))
    assert kept > 2.5 * 2**30
