"""Select whole texts for language models: at random, by features, or by meta-gradient score."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

from jaxdistill._progress import ItemProgress
from jaxdistill.dd.inner import inner_optimizer
from jaxdistill.dd.language import objective_loss, row_scores
from jaxdistill.dd.selection import quota_per_class, quotas_with_slices, select
from jaxdistill.dd.stored_set import StoredSet
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.evals.features import check_readable
from jaxdistill.kd.objective import kd_objective
from jaxdistill.mesh import fetch
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.hub import Model, load_model
from jaxdistill.recipes.condense_data import cached_features, check_real
from jaxdistill.recipes.condense_options import Condense, condense_identity
from jaxdistill.recipes.condense_report import settings_of
from jaxdistill.train.data import encode_rows, load_rows, pack
from jaxdistill.train.labelled import Labelled
from jaxdistill.train.pieces import crop
from jaxdistill.train.run_directory import RunDirectory
from jaxdistill.train.slices import slices_of

_OUTER = 64  # texts of other pools that are scored after training on a pool


def select_texts(
    o: Condense, console: Console, opened: contextlib.ExitStack
) -> tuple[RunDirectory, StoredSet]:
    """Select ``o.examples`` texts of plain text; the caller stores them.

    The run directory is entered into ``opened``.

    Raises:
        UserError: rows without text, or too few; nothing is written then.
    """
    assert o.examples is not None
    table = load_rows(o.data)
    texts: list[Any] = list(table["text"]) if "text" in table.column_names else [None]
    if any(not isinstance(text, str) for text in texts):
        raise UserError(
            f"data {o.data!r} has rows without text; accepted with --examples: rows of "
            '{"text"}; give plain text, or labelled data and --per-class'
        )
    columns = {name: list(table[name]) for name in table.column_names if name != "text"}
    nothing = np.zeros(len(texts), np.int32)
    data = Labelled(labels=nothing, classes=("text",), texts=texts, columns=columns, source=o.data)
    slices = slices_of(data.described, o.slice)
    groups, quotas = quotas_of(data, slices, o.examples, o.per_slice)
    select("random", nothing, groups, quotas)
    model = None
    if o.method != "random":
        check_real(data, o.model, "features")
        model = load_model(o.model or "").floats()
        check_readable(model, o.seq_len)
    run = opened.enter_context(RunDirectory(o.out, condense_identity(o), resume=o.resume))
    reading: dict[str, Any] = {}
    found: np.ndarray = nothing[:, None]
    if model is not None:
        prints = model_fingerprint(model.config, model.params)
        reading = {"model": o.model, "model_fingerprint": prints, "seq_len": o.seq_len}
        if o.method == "meta-gradient-score":
            found = text_scores(o, model, texts, console)
        else:
            cache = o.feature_cache or o.out
            found = cached_features(
                model, texts, o.seq_len, prints, o.feature_batch, cache, console
            )
    by = "hardest" if o.method == "meta-gradient-score" else o.method
    rows = select(by, found, groups, quotas, o.seed)
    stored = StoredSet(
        synthetic=Synthetic(learned={}, fixed={"rows": jnp.asarray(rows, jnp.int32)}),
        level="text",
        method=o.method,
        texts=tuple(texts[i] for i in rows),
        settings=settings_of(o, reading, data.fingerprint(), rows),
        slices={name: np.flatnonzero(mask[rows]).tolist() for name, mask in slices.items()},
    )
    return run, stored


def quotas_of(
    data: Labelled, slices: dict[str, np.ndarray], per_class: int, per_slice: int
) -> tuple[np.ndarray, dict[Any, int]]:
    """Return each example's group and the examples wanted of each."""
    if not slices:
        return data.labels, dict(quota_per_class(data.labels, per_class))
    groups, quotas = quotas_with_slices(data.labels, slices, per_class, per_slice, data.classes)
    return groups, dict(quotas)


def text_scores(
    o: Condense, model: Model, texts: list[str], console: Console
) -> Float[np.ndarray, "N"]:
    """Return the meta-gradient score of every text, see ``dd.language.row_scores``.

    The model is trained on a pool of ``--batch-size`` texts for ``--inner-steps`` steps of
    ``--inner-batch`` texts (0: all of the pool), and its loss is taken on texts of other pools. A
    text with nothing to predict comes last.
    """
    rng = np.random.default_rng(o.seed)
    examples = encode_rows([{"text": text} for text in texts], model.text_tokenizer())
    rows = np.asarray([i for i, e in enumerate(examples) if len(e.tokens) >= 2])
    if not len(rows):
        raise UserError(f"data {o.data!r} has no text of two tokens or more; give longer texts")
    packed = pack([crop(examples[i], 0, o.seq_len) for i in rows], o.seq_len, packing="none")
    objective = kd_objective(model.apply_fn(remat="full"), None, "ce", fused=False)
    loss = objective_loss(objective)
    score = row_scores(
        loss,
        loss,
        tx=inner_optimizer(o.inner_optimizer),
        unroll=o.unroll,
        rate=o.inner_rate,
        inner_batch=o.inner_batch or None,
    )
    every = {name: jnp.asarray(x) for name, x in packed[:].items()}
    params = jax.tree.map(jnp.asarray, model.params)
    order = rng.permutation(len(packed))
    size = min(o.batch_size, len(packed))
    scores = np.full(len(texts), -np.inf)
    with ItemProgress(console) as progress:
        task = progress.add_task("meta-gradient score", total=len(packed))
        for at in range(0, len(packed), size):
            own = order[at : at + size]
            # The last pool is filled up with texts of the first: one shape.
            pool = np.concatenate([own, order[: size - len(own)]])
            others = np.setdiff1d(order, pool)
            others = others if len(others) else pool
            outer = rng.choice(others, min(_OUTER, len(others)), replace=len(others) < _OUTER)
            key = jax.random.fold_in(jax.random.key(o.seed), at)
            inner, judged = ({k: x[some] for k, x in every.items()} for some in (pool, outer))
            found = score(params, inner, judged, key)
            scores[rows[own]] = fetch(found)[: len(own)]
            progress.advance(task, len(own))
    return scores
