"""Is a flipped bit named? Single bits flipped in a student, a teacher cache and a synthetic set.

python -m benchmarks.faults.flips --flips 60
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.dd.stored_set import StoredSet, load_set, save_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.kd.cache_writer import write_cache
from jaxdistill.kd.teacher_cache import open_cache
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hf import load_hf, save_hf
from jaxdistill.models.quantized import load_quantized, save_quantized
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params
from jaxdistill.train.packing import Packed
from tests import tiny

Loader = Callable[[Path], Any]


def directories(work: Path) -> dict[str, tuple[Path, Loader]]:
    """Write one directory of each kind; return it and what loads it, by name."""
    config = tiny.config(vocab_size=260)
    params, tokenizer = tiny.params(config), tiny.byte_tokenizer()
    policy = default_policy(QuantSpec(), tied=True)
    stored = quantize_params(add_scales(params, policy), policy)
    save_quantized(work / "student", config, stored, tokenizer, policy)
    save_hf(work / "float", config, params, tokenizer)
    rows = Packed(**{name: np.array(x) for name, x in tiny.batch(config, 10).items()})
    prints = {"model": "m", "tokenizer": "t", "data": "d"}
    write_cache(
        work / "cache",
        make_apply(config),
        params,
        rows,
        k=8,
        rows_per_shard=4,
        batch_size=2,
        fingerprints=prints,
    )
    learned = {"inputs": np.asarray(jax.random.normal(jax.random.key(0), (8, 64)))}
    synthetic = Synthetic(learned=learned, fixed={"labels": np.arange(8, dtype=np.int32) % 2})
    save_set(
        work / "set",
        StoredSet(synthetic=synthetic, level="features", method="test", classes=("a", "b")),
    )
    return {
        "student, integers": (work / "student", load_quantized),
        "student, float": (work / "float", load_hf),
        "teacher cache": (work / "cache", lambda path: open_cache(path, prints)),
        "synthetic set": (work / "set", load_set),
    }


def named(directory: Path, load: Loader, flips: int, rng: np.random.Generator) -> int:
    """Flip bits one by one, files drawn by size; count the loads that end in one line."""
    load(directory)  # undamaged
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock"]
    files = [p for p in files if p.stat().st_size]
    sizes = np.sqrt([p.stat().st_size for p in files])  # small files are hit too
    count = 0
    for _ in range(flips):
        file = files[int(rng.choice(len(files), p=sizes / sizes.sum()))]
        good = file.read_bytes()
        data = bytearray(good)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            load(directory)
            print(f"not noticed: {file.name}")
        except UserError as e:
            count += 1
            print(str(e).replace(str(directory.parent), "")[:110]) if count == 1 else None
        file.write_bytes(good)
    return count


def main() -> None:
    """Print how many flips were named, by kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=60)
    flips = parser.parse_args().flips
    with tempfile.TemporaryDirectory() as folder:
        for name, (directory, load) in directories(Path(folder)).items():
            count = named(directory, load, flips, np.random.default_rng(0))
            print(f"{name}: {count} of {flips} flips named", flush=True)


if __name__ == "__main__":
    main()
