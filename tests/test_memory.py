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
