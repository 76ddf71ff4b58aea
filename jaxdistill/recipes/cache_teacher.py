"""Run a teacher over training text once and keep what it says, for any number of students."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from jaxdistill._progress import ItemProgress
from jaxdistill.errors import UserError
from jaxdistill.kd.cache_writer import write_cache
from jaxdistill.kd.teacher_cache import CachedRows
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.losses.loss import parse_term
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.hub import Model, check_same_vocabulary, load_model
from jaxdistill.models.tokenizer import Tokenizer
from jaxdistill.models.tokenizer import fingerprint as tokenizer_fingerprint
from jaxdistill.recipes.parallel import Parallel, parallel
from jaxdistill.recipes.prepare import pack_rows, split_rows
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import Packing, fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheTeacher(Parallel):
    """Cache a teacher's likeliest tokens on disk; distill from them with --cache."""

    teacher: str
    """Teacher, or several of one vocabulary, separated by commas: HF directories, .gguf files, run
    directories or hub names."""
    data: str
    """Training text: .jsonl[.gz], .txt, .parquet, a directory of such files, or a hub data set."""
    out: Path
    """Directory of the cache."""
    k: int = 64
    """Tokens kept of each place; the probability of all others is kept as one number."""
    temperature: float = 1.0
    """Of the teacher's softmax; the loss that is trained with the cache must have the same."""
    precision: Literal["float16", "float32"] = "float16"
    """Type of the log-probabilities on disk."""
    mixture: str = "mean"
    """How several teachers become one: mean, confidence or agreement."""
    seq_len: int = 512
    """Tokens a row, as the student will be trained."""
    packing: Packing = "best-fit"
    """How texts share rows, as the student will be trained: best-fit, wrap, none."""
    curriculum: Literal["none", "length"] = "none"
    """length packs texts of like length together, for a student that is trained with it."""
    batch_size: int = 8
    """Rows that the teacher reads at once."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that carry loss, as the student will be trained."""
    eval_data: str | None = None
    """Give it where the student's training is given it: without it every 20th row of the data is
    held out, and not cached."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products."""
    chunk: int = CHUNK
    """Tokens whose vocabulary logits exist at once."""
    resume: bool = False
    """Go on with the cache in --out; what is whole is kept."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def cache_fingerprints(
    rows: Any, tokenizer: Tokenizer, teachers: Sequence[Model] = ()
) -> dict[str, str]:
    """Return the fingerprints that a cache is opened with.

    Args:
        rows: the training rows.
        tokenizer: that made them.
        teachers: float models, in the order in which they were cached; none where the cache alone
            is at hand, and is then not compared with a model.
    """
    found = {"tokenizer": tokenizer_fingerprint(tokenizer), "data": fingerprint(rows)}
    if not teachers:
        return found
    models = [model_fingerprint(t.config, t.params) for t in teachers]
    return {"model": "+".join(models)} | found


def _check(o: CacheTeacher) -> list[str]:
    """Return the teachers' names; raise ``UserError`` on options that do not fit."""
    for name, least in (("k", 1), ("seq_len", 2), ("batch_size", 1), ("chunk", 1)):
        if getattr(o, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(o, name)} given; accepted: {least} or more")
    if not 0 < o.temperature < float("inf"):
        raise UserError(f"--temperature {o.temperature} given; accepted: above 0")
    parse_term(o.mixture, "mixture")
    names = [name for name in o.teacher.split(",") if name]
    if not names:
        raise UserError(
            f"--teacher {o.teacher!r} given; accepted: one model, or several with commas"
        )
    return names


@parallel
def cache_teacher(o: CacheTeacher, console: Console | None = None) -> dict[str, Any]:
    """Run the job.

    Args:
        o: the options.
        console: where progress is shown; standard error by default.

    Returns:
        ``rows``, ``tokens``, ``bytes`` on disk, ``bytes_per_token``, ``seconds``,
        ``tokens_per_second`` (of what was made now), the mean ``kept`` probability of the k tokens,
        and the ``fingerprints``.

    Raises:
        UserError: any input is wrong, and nothing is written then; or the disk is full.
    """
    console = console or Console(stderr=True)
    names = _check(o)
    rows = load_rows(o.data)
    if o.eval_data is None:
        rows, _ = split_rows(rows, o.data, console)
    teachers = [load_model(name).floats() for name in names]
    sizes = [check_same_vocabulary(teachers[0], t) for t in teachers[1:]]
    packed = pack_rows(
        rows,
        teachers[0],
        o.seq_len,
        o.loss_on,
        o.packing,
        by_length=o.curriculum == "length",
        name="training data",
        console=console,
    )
    for other in teachers[1:]:
        if o.seq_len > other.config.max_position_embeddings:
            raise UserError(
                f"--seq-len {o.seq_len} exceeds the {other.config.max_position_embeddings} "
                f"positions of {other.source}; choose a smaller one"
            )
    prints = cache_fingerprints(packed, teachers[0].text_tokenizer(), teachers)
    began, made = time.perf_counter(), 0
    with ItemProgress(console) as progress:
        task = progress.add_task("caching rows", total=len(packed))

        def advance(done: int, new: bool) -> None:
            nonlocal made
            made += done * new
            progress.advance(task, done)

        cache = write_cache(
            o.out,
            [t.apply_fn(dtype=jnp.dtype(o.dtype)) for t in teachers],
            [t.params for t in teachers],
            packed,
            k=o.k,
            temperature=o.temperature,
            mixture=o.mixture,
            precision=o.precision,
            batch_size=o.batch_size,
            vocab_size=min(sizes, default=teachers[0].config.vocab_size),
            chunk=o.chunk,
            fingerprints=prints,
            teachers=names,
            dtype=o.dtype,
            resume=o.resume,
            progress=advance,
        )
    seconds = time.perf_counter() - began
    return {
        "rows": len(packed),
        "packing": dataclasses.asdict(packed.counts) if packed.counts else None,
        "tokens": packed.tokens.size,
        "bytes": sum(file.stat().st_size for file in cache.path.glob("*.npy")),
        "bytes_per_token": cache.header.bytes_per_token,
        "seconds": seconds,
        "tokens_per_second": made * o.seq_len / seconds,
        "kept": CachedRows(packed, cache).kept(),
        "fingerprints": prints,
    }
