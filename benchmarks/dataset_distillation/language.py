"""Data set distillation and knowledge distillation together, on a language model.

Eight rows of 64 tokens from which a student of stories260K learns in 20 steps: random real rows,
rows selected, and rows of embeddings with soft labels that were learned by meta-gradients through
those 20 steps. Two students: the teacher cut to two layers, and the teacher at 4 bits (KD-QAT).
Each set is trained on by Adam at every rate of one grid; the rate is chosen on validation text, and
the test text's KL to the teacher and NLL are reported. Results go to ``results/language.json``.

    python -m benchmarks.dataset_distillation.language
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.dataset_distillation.problems import ROOT
from benchmarks.stories260k import load_stories
from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_adam
from jaxdistill.dd.language import (
    embedded_rows,
    objective_loss,
    row_scores,
)
from jaxdistill.dd.meta_gradient import inner_rates, meta_gradient
from jaxdistill.dd.selection import herding, k_center
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.cut import cut_layers
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from jaxdistill.train.data import encode_rows, load_rows, pack

DATA = ROOT.parent / "shared" / "data"
OUT = Path(__file__).parent / "results" / "language.json"
ROWS, LENGTH, STEPS, POOL, REAL, UPDATES = 8, 64, 20, 256, 32, 100
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1)


def students(teacher: Any) -> dict[str, tuple[Any, Any]]:
    """Return each student's ``apply`` and first params."""
    config, params = teacher.config, jax.tree.map(jnp.asarray, teacher.params)
    shallow, fewer = cut_layers(config, params, 2)
    policy = default_policy(QuantSpec(bits=4), tied=True, head_group_size=32)
    quantized = make_apply(config, transform=fake_quant_params(policy))
    return {
        "cut to 2 layers": (make_apply(shallow), fewer),
        "4 bits": (quantized, add_scales(params, policy)),
    }


def study(name: str, apply: Any, start: Any, teacher: Any, rows: Any, seed: int) -> dict[str, Any]:
    """Return the results of every set for one student and seed."""
    rng = np.random.default_rng(seed)
    read = teacher.apply_fn()
    guide = jax.tree.map(jnp.asarray, teacher.params)
    table = guide["embed_tokens"]["embedding"]
    live = objective_loss(kd_objective(apply, read, "forward_kl", fused=False))
    given = objective_loss(kd_objective(apply, None, "forward_kl", fused=False))
    judge = jax.jit(lambda p, batch: kd_objective(apply, read)(p, guide, batch)[2])
    some = functools.partial(jax.tree.map, jnp.asarray)
    train_rows, validation, test = rows

    def score(params: Any, held: Any) -> dict[str, float]:
        sums = judge(params, held)
        return {k: float(s / n) for k, (s, n) in sums.items() if k in ("kl", "nll")}

    fit = jax.jit(make_unroll(given, inner_adam(), Unroll(steps=STEPS, levels=0)))

    def trained(batch: Any, rates: Any = None) -> dict[str, float]:
        key = jax.random.key(0)
        if rates is not None:
            return score(fit(start, batch, rates, key), test)
        tried = [fit(start, batch, jnp.full((STEPS,), r, jnp.float32), key) for r in RATES]
        chosen = min(range(len(RATES)), key=lambda i: score(tried[i], validation)["kl"])
        return score(tried[chosen], test) | {"rate": RATES[chosen]}

    pool = some(train_rows[rng.choice(len(train_rows), POOL, replace=False)])
    # Real text is read as tokens, by each model through its own table.
    logits_of = jax.jit(
        lambda b: read(guide, b["tokens"], b["positions"], b["segment_ids"]).logits()
    )

    def label(rows: Any) -> Any:
        return rows | {"teacher_logits": logits_of(rows)}

    def picked(chosen: Any) -> Any:
        return label({k: x[jnp.asarray(chosen)] for k, x in pool.items()})

    hidden = jax.jit(lambda b: read(guide, b["tokens"], b["positions"], b["segment_ids"]).hidden)(
        pool
    )
    features = np.asarray(jnp.mean(hidden, axis=1))
    real = some(train_rows[rng.choice(len(train_rows), REAL * 4, replace=False)])
    unroll = Unroll(steps=STEPS)
    scores = np.asarray(
        row_scores_of(given, live, start, label(pool), real | {"teacher": guide}, seed)
    )
    sets = {
        "random": np.arange(ROWS),
        "herding": herding(features, ROWS),
        "k-center": k_center(features, ROWS),
        "meta-gradient score": np.argsort(-scores)[:ROWS],
    }
    results = {"untrained": score(start, test)}
    results |= {name: trained(picked(chosen)) for name, chosen in sets.items()}

    # Learned: embeddings, soft labels and rates, from random rows.
    began = time.perf_counter()
    first = {k: pool[k][:ROWS] for k in pool}
    logits = label(first)["teacher_logits"]
    synthetic = embedded_rows(first, table, teacher_logits=logits, rate=1e-3, steps=STEPS)
    method = meta_gradient(given, live, lambda key: start, tx=inner_adam(), unroll=unroll)
    tx = optax.adam(optax.cosine_decay_schedule(0.02, UPDATES))
    step, state = make_condense_step(method, tx), init_condense(synthetic, tx, seed)
    for i in range(UPDATES):
        batch = some(train_rows[rng.choice(len(train_rows), REAL, replace=False)])
        state, metrics = step(state, batch | {"teacher": guide})
        if i % 25 == 0:
            print(name, seed, i, float(metrics["loss"]), flush=True)
    learned = state.synthetic
    rates = inner_rates(learned, 1e-3, STEPS)
    results["meta-gradient embeddings, one rate"] = trained(learned.batch())
    results["meta-gradient embeddings, learned rates"] = trained(learned.batch(), rates)
    # The rates alone, on the rows that learning began from: what is left is the embeddings'.
    results["random, those rates"] = trained(picked(sets["random"]), rates)
    results["seconds"] = time.perf_counter() - began
    return results


def row_scores_of(inner: Any, outer: Any, start: Any, pool: Any, real: Any, seed: int) -> Any:
    """Return the meta-gradient score of every row of a labelled pool, through an epoch of it."""
    once = Unroll(steps=POOL // ROWS, levels=1)
    score = row_scores(inner, outer, tx=inner_adam(), unroll=once, rate=1e-3, inner_batch=ROWS)
    return score(start, pool, real, jax.random.key(seed))


def main() -> None:
    """Run all students and seeds."""
    teacher = load_stories(DATA / "models" / "stories260K")
    texts = load_rows(str(DATA / "text" / "tinystories_lower.jsonl.gz"))
    packed = pack(encode_rows(texts, teacher.text_tokenizer()), seq_len=LENGTH)
    order = np.random.default_rng(0).permutation(len(packed))
    validation, test = (
        jax.tree.map(jnp.asarray, packed[order[a:b]]) for a, b in ((0, 64), (64, 320))
    )
    train_rows = _Part(packed, order[320:4320])
    results = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for name, (apply, start) in students(teacher).items():
        for seed in SEEDS:
            if f"{name}-{seed}" in results:
                continue
            found = study(name, apply, start, teacher, (train_rows, validation, test), seed)
            results[f"{name}-{seed}"] = found
            OUT.write_text(json.dumps(results, indent=1) + "\n")
            print(name, seed, json.dumps(found, indent=1), flush=True)


class _Part:
    """Show some rows of a packed data set as if they were all."""

    def __init__(self, rows: Any, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return self.rows[self.chosen[index]]


if __name__ == "__main__":
    main()
