"""What a student is trained on: packed text, prompts and answers, pairs, a cache, learned rows."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxdistill._disk import write_whole
from jaxdistill.errors import UserError
from jaxdistill.evals.perplexity import make_row_evaluator
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.sequence_level import teacher_text
from jaxdistill.kd.teacher_cache import CachedRows, check_loss, open_cache
from jaxdistill.losses.loss import Loss
from jaxdistill.mesh import on_primary, wait_for_all
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model
from jaxdistill.recipes.cache_teacher import cache_fingerprints
from jaxdistill.recipes.learned_rows import check_learned, learned_rows
from jaxdistill.recipes.options import Distill
from jaxdistill.recipes.prepare import (
    check_length,
    counts_of,
    eval_batches_of,
    pack_rows,
    say_counts,
    split_rows,
)
from jaxdistill.train.chat_rows import row_form
from jaxdistill.train.curriculum import CurriculumBatches, text_lengths
from jaxdistill.train.data import load_rows
from jaxdistill.train.encode import Example, encode_rows
from jaxdistill.train.mixing import mixed_rows
from jaxdistill.train.packing import (
    Batch,
    Counts,
    Packed,
    batches,
    batches_fingerprint,
    fingerprint,
)
from jaxdistill.train.pairing import Paired, pair_rows
from jaxdistill.train.prompts import prompt_rows
from jaxdistill.train.rationale import answer_rows, rationale_rows
from jaxdistill.train.run_directory import write_json


class TransferSet(NamedTuple):
    """Hold a run's data.

    Attributes:
        rows: ``rows[i]`` is a dict of arrays, of one row or of a slice of rows.
        held: the batches that are evaluated.
        held_rows: the texts that they were made of.
        fingerprint: of the training rows, kept with each checkpoint.
        held_counts: what became of the texts' tokens in the batches' rows.
        answered: whether the rows bring their teacher's answers, and no live one trains.
        by_length: whether rows come in the order of their texts' length.
    """

    rows: Any
    held: list[Batch]
    held_rows: Any
    fingerprint: str
    held_counts: Counts | None = None
    answered: bool = False
    by_length: bool = False


def transfer_set(
    o: Distill, student: Model, teachers: list[Model], loss: Loss, console: Console
) -> TransferSet:
    """Load, split and lay out the data that the options name, with the student's tokenizer.

    Raises:
        UserError: the data cannot be read, or do not suit the way of training.
    """
    learned = learned_rows(o.data)
    if learned is not None:
        check_learned(learned, o, student, teachers, loss)
    rows: Any = load_rows(o.data) if learned is None else learned
    if o.eval_data is None:
        rows, held_rows = cast(Any, split_rows(rows, o.data, console))
    else:
        held_rows = cast(Any, load_rows(o.eval_data))
    if o.mix and (learned is not None or o.cache is not None):
        what = "learned rows" if learned is not None else "--cache"
        raise UserError(f"--mix given with {what}, which hold what is trained on; leave it out")
    rows = mixed_rows(rows, o.mix)
    if o.rationale_weight is not None:
        rows = rationale_rows(rows, o.rationale_weight)
        held_rows = answer_rows(held_rows)
    for teacher in [] if loss.of_kind("cross_tokenizer") else teachers:
        check_length(o.seq_len, teacher)
    packing = functools.partial(
        pack_rows, model=student, seq_len=o.seq_len, loss_on=o.loss_on, packing=o.packing
    )
    held = packing(held_rows, add_eos=False, name="held-out data", console=console)
    made = functools.partial(
        TransferSet,
        held=eval_batches_of(held, o.batch_size, o.eval_tokens),
        held_rows=held_rows,
        held_counts=held.counts,
    )
    if learned is not None:
        return made(rows=learned, fingerprint=fingerprint(learned), answered=True)
    if loss.of_kind("cross_tokenizer"):
        paired = _paired(o, rows, student, teachers)
        say_counts(console, "training data", paired)
        return made(rows=paired, fingerprint=fingerprint(paired))
    generates = o.on_policy > 0 or o.text_from == "teacher"
    by_length = o.curriculum == "length" and not generates
    if generates:
        check_length(o.seq_len, student)
        packed = prompt_rows(
            _prompts_and_answers(rows, student),
            seq_len=o.seq_len,
            prompt_length=o.prompt_length,
            pad_id=cast(int, student.text_tokenizer().pad_token_id or 0),
        )
        say_counts(console, "training data", packed)
    else:
        packed = packing(rows, by_length=by_length, name="training data", console=console)
    if o.cache is not None:
        cached, told = _cached(o, packed, student, teachers, loss)
        return made(rows=cached, fingerprint=told, answered=True, by_length=by_length)
    return made(rows=packed, fingerprint=fingerprint(packed), by_length=by_length)


def contents_of(
    o: Distill, teachers: list[Model], base: Model, found: TransferSet
) -> dict[str, str]:
    """Return fingerprints of what a run learns from, for its resume."""
    models = {"teacher" if i == 0 else f"teacher {i + 1}": t for i, t in enumerate(teachers)}
    models |= {"student": base} if o.student else {}
    prints = {name: model_fingerprint(m.config, m.params) for name, m in models.items()}
    held = batches_fingerprint(found.held)
    return prints | {"training text": found.fingerprint, "held-out text": held}


def _prompts_and_answers(rows: Any, student: Model) -> list[Example]:
    """Encode rows so that answers alone are targets; of plain texts, which have none, all is."""
    tokenizer, found = student.text_tokenizer(), {}
    forms = [row_form(row, f"row {i}") for i, row in enumerate(rows, 1)]
    for plain in (True, False):
        picked = [i for i, form in enumerate(forms) if (form == "text") is plain]
        loss_on = "all" if plain else "completion"
        made = encode_rows((rows[i] for i in picked), tokenizer, loss_on=loss_on)
        found |= dict(zip(picked, made, strict=True))
    return [found[i] for i in range(len(forms))]


def with_vocabulary(apply: Any, size: int) -> Any:
    """Return an ``apply`` with a cache, whose head has no row of padding: none is ever a word."""

    def cut(*inputs: Any) -> Any:
        out, cache = apply(*inputs)
        return out._replace(head=out.head[:size]), cache

    return cut


def _paired(o: Distill, rows: Any, student: Model, teachers: list[Model]) -> Paired:
    """Return texts as both tokenizers read them, with the places where they meet."""
    if len(teachers) != 1 or o.cache is not None or o.on_policy or o.text_from == "teacher":
        raise UserError(
            "a cross-tokenizer objective learns from one live teacher on the data's text; give one "
            "--teacher, and no --cache, --on-policy or --text-from"
        )
    for model in (student, teachers[0]):
        check_length(o.seq_len, model)
    return pair_rows(
        rows,
        student.text_tokenizer(),
        teachers[0].text_tokenizer(),
        o.seq_len,
        teacher_seq_len=min(2 * o.seq_len, teachers[0].config.max_position_embeddings),
        loss_on=o.loss_on,
    )


def _cached(
    o: Distill,
    packed: Packed,
    student: Model,
    teachers: list[Model],
    loss: Loss,
) -> tuple[CachedRows, str]:
    """Return the rows with their teacher's cached answers, and their fingerprint."""
    prints = cache_fingerprints(packed, student.text_tokenizer(), teachers)
    assert o.cache is not None
    cache = open_cache(o.cache, prints)
    check_loss(cache, loss, correction=o.correction)
    if cache.header.vocab_size > student.config.vocab_size:
        raise UserError(
            f"{o.cache} is of a teacher of {cache.header.vocab_size} tokens, and the student "
            f"{student.source} has {student.config.vocab_size}; accepted: a cache of no more "
            "tokens than the student has; cache a teacher of the student's family"
        )
    header = cache.header
    told = f"{fingerprint(packed)}, cached from {header.fingerprints['model']}, k={header.k}"
    return CachedRows(packed, cache), told


def with_teacher_text(
    o: Distill, found: TransferSet, teacher: Model, apply: Any, where: Any, console: Console
) -> TransferSet:
    """Return the set with the teacher's answers to its prompts (sequence-level distillation).

    Answers are written to ``where`` (an .npz file) once; a resumed run reads them from there.
    """
    there = where.is_file()
    wait_for_all("teacher_text")  # before any process writes it
    if not there:
        with console.status("the teacher writes its answers") as status:
            made = teacher_text(
                apply,
                teacher.params,
                teacher.config,
                found.rows[:],
                prompt_length=o.prompt_length,
                how=Sampling(
                    max_new_tokens=o.seq_len - o.prompt_length, temperature=o.sample_temperature
                ),
                stop=teacher.stop_ids,
                batch_size=o.batch_size,
                seed=o.seed,
                dtype=jnp.dtype(o.dtype),
                progress=lambda n: status.update(f"the teacher writes its answers: {n} done"),
            )
        on_primary(lambda: _save(where, made), f"write {where}")
    try:
        with np.load(where, allow_pickle=False) as saved:
            rows = Packed(**{name: saved[name] for name in saved.files})
    except Exception as e:  # numpy raises a dozen kinds for a damaged file
        raise UserError(
            f"{where} is damaged ({type(e).__name__}); delete it to have the teacher answer again"
        ) from None
    return found._replace(rows=rows, fingerprint=fingerprint(rows))


def _save(where: Path, arrays: Any) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(where, file.getvalue())


def write_counts(run: Path, found: TransferSet) -> None:
    """Write ``data.json``: what became of the tokens of training and held-out texts."""
    known = {"train": counts_of(found.rows), "held_out": found.held_counts}
    counts = {k: dataclasses.asdict(v) for k, v in known.items() if v is not None}
    on_primary(lambda: write_json(run / "data.json", counts), f"write {run / 'data.json'}")


def serve(
    o: Distill, found: TransferSet, teachers: list[Model], applies: list[Any], shared: int
) -> Any:
    """Return ``data[i]``, the batch of step i, in the order that the options ask for."""
    if o.curriculum == "none":
        return batches(found.rows, batch_size=o.batch_size, seed=o.seed, per_host=True)
    if o.curriculum == "length":
        difficulty = (
            np.arange(len(found.rows)) * 1.0 if found.by_length else text_lengths(found.rows)
        )
    else:
        objective = kd_objective(applies[0], None, "ce", vocab_size=shared, by_row=True)
        difficulty = _nll_of_rows(objective, teachers[0].params, found.rows, o.batch_size)
    return CurriculumBatches(
        found.rows,
        difficulty,
        batch_size=o.batch_size,
        seed=o.seed,
        rise=o.steps // 2,
    )


def _nll_of_rows(objective: Any, params: Any, rows: Any, batch_size: int) -> np.ndarray:
    """Return each row's mean NLL by a model."""
    names = ("tokens", "loss_mask", "positions", "segment_ids")

    def batch(at: int) -> Batch:
        index = np.minimum(np.arange(at, at + batch_size), len(rows) - 1)
        picked = [rows[int(i)] for i in index]
        return {k: np.stack([row[k] for row in picked]) for k in names}

    made = (batch(at) for at in range(0, len(rows), batch_size))
    total, count = make_row_evaluator(objective)(params, None, made)["nll"]
    return (total / np.maximum(count, 1.0))[: len(rows)]
