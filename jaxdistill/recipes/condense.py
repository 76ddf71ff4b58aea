"""Data set distillation, the whole job: many real examples into a few that train as well.

Load data and the model that reads them; choose real examples, start from them and learn, or let the
model write some; store the set; say what was learned.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxdistill.dd.selection import select
from jaxdistill.dd.stored_set import StoredSet
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.condense_data import check_real, read_real, shape_of
from jaxdistill.recipes.condense_language import learn_rows
from jaxdistill.recipes.condense_learn import learn, learning
from jaxdistill.recipes.condense_methods import (
    batches_of,
    classifier_of,
    draw_weights,
    first_set,
    keeps_easiest,
    meta_loss_of,
    selected,
)
from jaxdistill.recipes.condense_options import Condense, condense_identity
from jaxdistill.recipes.condense_report import nearest_texts, report_set, settings_of
from jaxdistill.recipes.condense_texts import quotas_of, select_texts
from jaxdistill.recipes.condense_words import likely_texts, words_alone, written_set
from jaxdistill.recipes.parallel import parallel
from jaxdistill.train.labelled import held_out_rows, load_labelled
from jaxdistill.train.run_directory import RunDirectory
from jaxdistill.train.slices import slices_of


@parallel
def condense(o: Condense, console: Console | None = None) -> dict[str, Any]:
    """Run the job.

    Args:
        o: the options.
        console: where progress is shown; standard error by default.

    Returns:
        ``method``, ``level``, ``examples``, ``classes``, ``slices`` (name to number of examples),
        ``seconds``, ``set`` (the directory), and of a learned set the ``first_loss`` and
        ``last_loss``, each the mean of a tenth of the updates.

    Raises:
        UserError: any input is wrong, and nothing is written then; a bad loss; or a full disk.
        Stopped: a signal came while it learned.
    """
    with contextlib.ExitStack() as opened:
        return _condense(o, console or Console(stderr=True), opened)


def _condense(o: Condense, console: Console, opened: contextlib.ExitStack) -> dict[str, Any]:
    """Do what ``condense`` says; what is closed at its end is entered into ``opened``."""
    began = time.perf_counter()
    if o.examples is not None:
        run, stored = (learn_rows if o.learns else select_texts)(o, console, opened)
        return report_set(run, stored, None, time.perf_counter() - began, console)

    # Data; everything that can be wrong with the input is found before writing.
    assert o.per_class is not None  # one of the two, says Condense
    whole = load_labelled(o.data)
    learned_from, _ = held_out_rows(whole.labels)  # the rest is for who judges the set
    data = whole.take(learned_from)
    check_real(data, o.model, o.level)
    slices = slices_of(data.described, o.slice)
    groups, quotas = quotas_of(data, slices, o.per_class, o.per_slice)
    # Refuses a group that is too small.
    select("random", np.zeros(len(data)), groups, quotas, names=data.classes)
    model = load_model(o.model).floats() if o.model else None
    net = classifier_of(o, *shape_of(data, o.level, model, o.seq_len), len(data.classes))
    run = opened.enter_context(RunDirectory(o.out, condense_identity(o), resume=o.resume))
    real = read_real(
        whole,
        level=o.level,
        model=model,
        seq_len=o.seq_len,
        batch_size=o.feature_batch,
        cache=o.feature_cache or o.out,
        console=console,
    ).take(learned_from)

    # The set: selected, or learned from a start.
    rows, texts = np.zeros(0, np.int64), None
    if o.method == "generated":
        synthetic, texts = written_set(o, real, net, console)
    elif o.learns:
        rows = select("random", real.features, groups, quotas, o.seed)
        weights = draw_weights(groups, quotas, slices)
        meta_loss = meta_loss_of(o, net, len(data.classes))
        batches = batches_of(o, real, net, weights)
        print_ = real.data.fingerprint()
        what = learning(o, first_set(o, real, rows), meta_loss, batches, print_)
        synthetic = learn(o, what, run, console)
    else:
        if o.method == "el2n":
            kept = "easiest" if keeps_easiest(o, data.labels) else "hardest"
            console.print(
                f"el2n keeps the {kept} {o.per_class} of each class, of {len(data):,} examples in "
                "all (--hardness)"
            )
        with console.status("selecting"):
            rows = selected(o, real, net, groups, quotas)
        synthetic = Synthetic(
            learned={"inputs": jnp.asarray(real.inputs(rows), jnp.float32)},
            fixed={"labels": jnp.asarray(data.labels[rows])},
        )
    if texts is None:
        texts = nearest_texts(o, real, synthetic, rows)
    if o.as_text == "perplexity":
        with console.status("searching for likely texts"):
            texts = likely_texts(o, real, synthetic)
    as_text = o.as_text is not None or o.method == "generated"
    stored = StoredSet(
        synthetic=words_alone(synthetic) if as_text else synthetic,
        level="text" if as_text else real.level,
        method=o.method,
        classes=data.classes,
        texts=texts,
        settings=settings_of(o, real.reading, whole.fingerprint(), learned_from[rows])
        | {"architecture": net.name, "width": o.width},
        slices={name: np.flatnonzero(mask[rows]).tolist() for name, mask in slices.items()},
    )
    return report_set(run, stored, real, time.perf_counter() - began, console)
