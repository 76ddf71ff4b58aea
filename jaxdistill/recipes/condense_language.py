"""Learn rows of embeddings for language models, with the teacher's answers, by meta-gradients.

A student is made of the teacher (cut, quantized) and trained on the rows for some steps; the rows
are moved so that the student trained on them comes closer to the live teacher on real text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxdistill.dd.inner import inner_optimizer
from jaxdistill.dd.language import embedded_rows, objective_loss, with_teacher_labels
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.stored_set import StoredSet
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import ApplyFn, Params
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.hub import Model, load_model
from jaxdistill.quant.policy import add_scales
from jaxdistill.recipes.condense_learn import learn, learning
from jaxdistill.recipes.condense_options import Condense, condense_identity
from jaxdistill.recipes.condense_report import nearest_words, settings_of
from jaxdistill.recipes.options import Quantization, policy_of
from jaxdistill.recipes.prepare import pack_rows
from jaxdistill.recipes.student_init import student_from
from jaxdistill.recipes.trainee import Trainee
from jaxdistill.train.data import load_rows
from jaxdistill.train.mixing import mixed_rows
from jaxdistill.train.packing import Packed, batches, fingerprint
from jaxdistill.train.run_directory import RunDirectory


def learn_rows(
    o: Condense, console: Console, opened: contextlib.ExitStack
) -> tuple[RunDirectory, StoredSet]:
    """Learn ``o.examples`` rows from as many real ones; the caller stores them, and closes the run.

    Raises:
        UserError: the data hold too few rows, or the student cannot be made so; nothing is written
            then.
    """
    assert o.model is not None  # says Condense
    rows = mixed_rows(load_rows(o.data), o.mix)
    model = load_model(o.model).floats()
    packed = pack_rows(rows, model, o.seq_len, console=console)
    picked = _first_rows(o, packed)
    student, params = _student_of(o, model)
    teacher, guide = model.apply_fn(), jax.tree.map(jnp.asarray, model.params)
    real = {name: jnp.asarray(x[picked]) for name, x in packed[:].items()}
    start = _start(o, real, teacher, guide)
    given = objective_loss(kd_objective(student, None, "forward_kl", fused=False))
    live = objective_loss(kd_objective(student, teacher, "forward_kl", fused=False))
    meta_loss = meta_gradient(
        given,
        live,
        None,
        tx=inner_optimizer(o.inner_optimizer),
        unroll=o.unroll,
        rate=o.inner_rate,
        inner_batch=o.inner_batch or None,
    )
    print_ = fingerprint(packed)
    served = batches(packed, batch_size=o.batch_size, seed=o.seed)
    what = learning(o, start, meta_loss, served, print_, teacher=guide, student=params)
    run = opened.enter_context(RunDirectory(o.out, condense_identity(o), resume=o.resume))
    synthetic = learn(o, what, run, console)
    reading = {
        "level": "embeddings",
        "model": o.model,
        "model_fingerprint": model_fingerprint(model.config, model.params),
        "seq_len": o.seq_len,
    }
    made = {"student_init": list(o.student_init), "bits": o.bits}
    words = np.asarray(real["segment_ids"]) > 0
    stored = StoredSet(
        synthetic=synthetic,
        level="embeddings",
        method=o.method,
        texts=nearest_words(model, np.asarray(synthetic.learned["embeddings"]), words),
        settings=settings_of(o, reading, print_, picked) | made,
    )
    return run, stored


def _first_rows(o: Condense, packed: Packed) -> np.ndarray:
    """Return the real rows that learning starts from, drawn at random."""
    assert o.examples is not None
    full = np.flatnonzero(packed.loss_mask.any(axis=1))
    if len(full) < o.examples:
        raise UserError(
            f"--examples {o.examples} given, and data {o.data!r} make {len(full)} rows of "
            f"{o.seq_len} tokens; accepted: at most as many; give more text, or a smaller --seq-len"
        )
    return np.random.default_rng(o.seed).choice(full, o.examples, replace=False)


def _student_of(o: Condense, model: Model) -> tuple[ApplyFn, Params]:
    """Return the student's ``apply`` and its first params.

    Raises:
        UserError: it has another table than the model, or trains adapters.
    """
    made = student_from(model, o.student_init, o.seed)
    if made.transform is not None:
        raise UserError(
            f"--student-init {' '.join(o.student_init)} given; accepted with learned rows: cut, "
            "whose student trains whole; leave out lora"
        )
    if made.config.hidden_size != model.config.hidden_size:
        raise UserError(
            f"--student-init {' '.join(o.student_init)} makes a student of width "
            f"{made.config.hidden_size}, and the rows are embeddings of width "
            f"{model.config.hidden_size}; cut layers, intermediate or heads alone"
        )
    policy = policy_of(
        Quantization(bits=o.bits),
        dataclasses.replace(model, config=made.config, params=made.params),
    )
    params = jax.tree.map(jnp.asarray, made.params)
    params = params if policy is None else add_scales(params, policy)
    student = Trainee(config=made.config, params=params, policy=policy, merge=None, frozen=())
    return student.apply(), params


def _start(o: Condense, real: dict[str, Any], teacher: ApplyFn, guide: Params) -> Synthetic:
    """Return the real rows as embeddings, with what the teacher says of them."""
    steps = {"rate": o.inner_rate, "steps": o.inner_steps} if o.learn_rates else {}
    start = embedded_rows(real, guide["embed_tokens"]["embedding"], **steps)
    start = jax.jit(lambda s, p: with_teacher_labels(s, teacher, p))(start, guide)
    if not o.soft_labels:
        return start
    fixed = dict(start.fixed)
    answers = {"teacher_logits": fixed.pop("teacher_logits")}
    return Synthetic(learned={**start.learned, **answers}, fixed=fixed)
