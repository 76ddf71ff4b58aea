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


# Starts the command line; prints how many heaps there are beside the first one.
STARTED = """
import contextlib, sys
from jaxdistill.__main__ import main
sys.argv = ["jaxdistill", "objectives", "--json"]
with contextlib.redirect_stdout(sys.stderr):
    main()
import datasets, jax
jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((512, 512))))
def place(line):
    return [int(x, 16) for x in line.split()[0].split("-")], line.split()[1]
maps = [place(line) for line in open("/proc/self/maps")]
# Of glibc: 64 MiB at a multiple of 64 MiB, what is used, and after it what is not yet.
print(sum(
    start % 2**26 == 0 and (here, rest[1]) == ("rw-p", "---p") and rest[0] == [end, start + 2**26]
    for ((start, end), here), rest in zip(maps, maps[1:])
))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_the_command_line_has_one_heap():
    printed = subprocess.check_output([sys.executable, "-c", STARTED], stderr=subprocess.DEVNULL)
    assert int(printed) == 0


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
