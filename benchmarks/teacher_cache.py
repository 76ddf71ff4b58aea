"""What does a teacher on disk weigh, how near is it to the live one, and what time does it save?

Teacher and student are one model, the student rounded to 4 bits. Caches some text at several k and
precisions, and takes the student's mean forward KL from each cache, from the live teacher, and from
the live teacher seen through the same k tokens and a tail. For SmolLM2-135M-Instruct also times the
KD-QAT step with the live teacher and with the cache, in turns. Writes ``results/teacher_cache.md``.

    python -m benchmarks.teacher_cache STORIES260K_DIRECTORY STORIES.jsonl.gz
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.stories260k import load_stories
from jaxdistill.kd.cache_writer import write_cache
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.kd.teacher_cache import CachedRows
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hub import load_model
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from jaxdistill.recipes.demo import embedded_model, write_text
from jaxdistill.recipes.prepare import pack_rows
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import eval_batches

HEAD = (
    "| model | V | k | precision | bytes a token | kept | KL, live | KL, live top k | "
    "KL, cache | against live top k | against live | cached, tokens/s |\n"
    "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def mean_loss(objective, params, teacher, rows) -> float:
    """Return the mean loss over all rows."""
    objective, total, count = jax.jit(objective), 0.0, 0.0
    for batch in eval_batches(rows, 8):
        loss, number, _ = objective(params, teacher, batch)
        total, count = total + float(loss), count + float(number)
    return total / count


def student_of(model):
    """Return a 4-bit student of a model: its ``ApplyFn`` and its params."""
    policy = default_policy(QuantSpec(), tied=model.config.tie_embeddings)
    apply = make_apply(model.config, transform=fake_quant_params(policy))
    return apply, add_scales(model.params, policy)


def compare(name, model, rows, ks, work: Path) -> list[str]:
    """Return a table line for each k and precision."""
    apply, student = student_of(model)
    teacher = make_apply(model.config)
    live = mean_loss(kd_objective(apply, teacher, "forward_kl"), student, model.params, rows)
    lines = []
    for k in ks:
        objective = kd_objective(apply, teacher, "forward_kl", top_k=k)
        same = mean_loss(objective, student, model.params, rows)
        for precision in ("float16", "float32"):
            began = time.perf_counter()
            cache = write_cache(
                work / f"{name}-{k}-{precision}",
                teacher,
                model.params,
                rows,
                k=k,
                precision=precision,
                fingerprints={},
            )
            seconds = time.perf_counter() - began
            cached = CachedRows(rows, cache)
            got = mean_loss(kd_objective(apply, None, "forward_kl"), student, None, cached)
            size = sum(f.stat().st_size for f in cache.path.glob("*.npy"))
            lines.append(
                f"| {name} | {model.config.vocab_size:,} | {k} | {precision} | "
                f"{size / rows.tokens.size:.1f} | {cached.kept():.2%} | {live:.5f} | {same:.5f} | "
                f"{got:.5f} | {got / same - 1:+.0e} | {got / live - 1:+.1%} | "
                f"{rows.tokens.size / seconds:,.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def step_times(model, rows, work: Path, turns: int = 4) -> str:
    """Time steps with the live teacher and with the cache, in turns; the first of each compiles."""
    apply, student = student_of(model)
    teacher, tx = make_apply(model.config), adamw(1e-4, 100)
    cache = write_cache(work / "steps", teacher, model.params, rows, k=64, fingerprints={})
    cases = {
        "live teacher": (kd_objective(apply, teacher), model.params, rows[:2]),
        "cache, k = 64": (kd_objective(apply, None), None, CachedRows(rows, cache)[:2]),
    }
    steps = {name: make_step(objective, tx) for name, (objective, _, _) in cases.items()}
    states = {name: init_state(student, tx) for name in cases}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _, (name, (_, guide, batch)) in itertools.product(range(turns + 1), cases.items()):
        began = time.perf_counter()
        states[name], metrics = steps[name](states[name], guide, batch)
        jax.block_until_ready((states[name], metrics))
        times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    first, second = medians.values()
    said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items())
    return (
        f"A KD-QAT step of SmolLM2-135M on 2 x {rows.tokens.shape[1]} tokens (float32, 4 bits, "
        f"AdamW, no freeze), median of {turns} in turns: {said}: "
        f"{1 - second / first:.0%} less."
    )


def main() -> None:
    """Measure and write the tables."""
    folder, stories = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        small = load_stories(folder)
        small = dataclasses.replace(small, params=jax.tree.map(jnp.asarray, small.params))
        rows = pack_rows(load_rows(stories).select(range(200)), small, 256)
        lines = compare("stories260K", small, rows, (16, 64, 256), work)
        large = load_model(embedded_model())
        text, _ = write_text(work / "text")
        rows = pack_rows(load_rows(str(text)), large, 128)
        few = dataclasses.replace(rows, **{name: a[:24] for name, a in rows[:].items()})
        lines += compare("SmolLM2-135M-Instruct", large, few, (64,), work)
        said = step_times(large, few, work)
    (Path(__file__).parent / "results" / "teacher_cache.md").write_text(
        "# A teacher on disk\n\n"
        "`python -m benchmarks.teacher_cache`; 2 CPU cores, shared with other work, float32. The "
        "student is the teacher rounded to 4 bits, per channel. Bytes a token are the files', "
        "headers included. A divergence of k tokens and a tail is a lower bound of the whole one; "
        "float16 adds what rounding adds, and losses renormalise what they read.\n\n"
        + "\n".join([HEAD, *lines])
        + f"\n\n{said}\n"
    )
    print(said)


if __name__ == "__main__":
    main()
