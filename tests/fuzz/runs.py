"""Readers of what runs leave: teacher caches, sets, checkpoints, run directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.dd.stored_set import StoredSet, load_set, save_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.export.model_card import read_run
from jaxdistill.kd.cache_writer import write_cache
from jaxdistill.kd.teacher_cache import open_cache
from jaxdistill.models.decoder import Output
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.packing import Packed
from jaxdistill.train.run_directory import RunDirectory, read_metrics
from tests import tiny
from tests.fuzz.reader import Reader, each


def _cache(precision: Any, folder: Path) -> None:
    c = tiny.config()
    rows = Packed(**{name: np.array(a) for name, a in tiny.batch(c, 6, 8).items()})
    h, e = jax.random.normal(jax.random.key(0), (2, c.vocab_size, 8))

    def apply(params: Any, tokens: Any, positions: Any = None, segment_ids: Any = None) -> Output:
        return Output(jnp.take(params["h"], tokens, axis=0), params["e"])

    write_cache(
        folder,
        apply,
        {"h": h, "e": e},
        rows,
        k=4,
        rows_per_shard=2,
        batch_size=2,
        precision=precision,
        fingerprints={"model": "m", "tokenizer": "t", "data": "d"},
    )


def _read_cache(folder: Path) -> None:
    cache = open_cache(folder)
    cache[0], cache[: min(len(cache), 100)]


def _set(level: Any, folder: Path) -> None:
    rng = np.random.default_rng(0)
    learned = {
        "inputs": jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32),
        "label_logits": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "log_rates": jnp.float32(-1.5),
    }
    fixed = {"labels": jnp.array([0, 2, 1, 0], jnp.int32), "mask": jnp.ones((4, 2), bool)}
    made = StoredSet(
        synthetic=Synthetic(learned=learned, fixed=fixed),
        level=level,
        method="random",
        classes=("a", "b", "c"),
        texts=("one", "two", "three", "four"),
        settings={"inner_steps": 7, "rate": 0.05},
        slices={"rare": [1, 3]},
    )
    save_set(folder / "set", made)


def _state(value: float) -> dict[str, Any]:
    return {"step": jnp.asarray(3, jnp.int32), "w": {"kernel": jnp.full((8, 8), value)}}


def _checkpoint(folder: Path) -> None:
    with Checkpoints(folder / "c") as checkpoints:
        checkpoints.save(3, _state(1.0), "data")


def _read_checkpoint(folder: Path) -> None:
    with Checkpoints(folder / "c") as checkpoints:
        if checkpoints.latest is not None:
            checkpoints.restore(_state(0.0), "data")


_OPTIONS = {"model": "m", "bits": 4, "lr": 0.1, "names": ["a"], "out": "x"}


def _run(folder: Path) -> None:
    run = RunDirectory(folder / "run", _OPTIONS, resume=False)
    rows = [{"step": i, "loss": 1.0 / (i + 1), "kl": float("nan")} for i in range(5)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "results.json").write_text(json.dumps({"teacher": {"nll": 1.0}, "seconds": 3}))
    run.student.mkdir()
    weights = {"layers/mlp/up_proj/kernel": {"bits": 4, "group": 32}}
    marks = {"weights": weights, "activations": [["mlp", None]]}
    (run.student / "quantization.json").write_text(json.dumps(marks))


def _read_run(folder: Path) -> None:
    path = folder / "run"
    [row["step"] + 1 for row in read_metrics(path)]
    facts = read_run(path)
    assert facts.name == "run"
    RunDirectory(path, _OPTIONS, resume=True).rewind(3)


READERS = {
    "teacher_cache": Reader(
        each(_cache, ("float16",), ("float32",)), _read_cache, {".json": "json", ".npy": "npy"}
    ),
    "stored_set": Reader(
        each(_set, ("embeddings",), ("text",)),
        lambda folder: load_set(folder / "set"),
        {".safetensors": "safetensors"},
    ),
    "run_directory": Reader((_run,), _read_run, {".json": "json", ".jsonl": "lines"}),
    "checkpoint": Reader(
        (_checkpoint,),
        _read_checkpoint,
        {"": "bytes", "_METADATA": "json", "metadata": "json"},
        slow=True,
    ),
}
