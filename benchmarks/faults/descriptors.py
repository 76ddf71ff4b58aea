"""Does saving leak? Many checkpoints in one process, its descriptors and threads counted.

bash -c 'ulimit -n 64; python -m benchmarks.faults.descriptors --saves 500'
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path

import jax.numpy as jnp

from jaxdistill.train.checkpoint import Checkpoints


def counts() -> tuple[int, int]:
    """Return this process's open descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def main() -> None:
    """Save, and print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=500)
    saves = parser.parse_args().saves
    print(f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} descriptors", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoints"
        with Checkpoints(directory) as checkpoints:
            for step in range(1, saves + 1):
                state = {"step": jnp.asarray(step), "w": jnp.full((64, 64), float(step))}
                checkpoints.save(step, state, "data", wait=step == saves)
                if step in (1, 2) or step % (saves // 5) == 0:
                    print("save {}: {} descriptors, {} threads".format(step, *counts()), flush=True)
            restored = checkpoints.restore(state, "data")
        print(f"step {int(restored['step'])} restored, w is {float(restored['w'][0, 0]):g}")


if __name__ == "__main__":
    main()
