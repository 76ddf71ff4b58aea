"""Knowledge distillation, the whole job: any teacher, any objective, any student.

Load teachers, student and data; make the student (cut, quantized, LoRA); train it by the objective,
on the data's text, the teacher's, its own, or on learned rows; store it; evaluate it beside its
teacher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.evals.compare import compare, summarize
from jaxdistill.evals.confidence import teacher_confidence
from jaxdistill.evals.perplexity import make_row_evaluator
from jaxdistill.evals.slices import report_slices
from jaxdistill.kd.cross_tokenizer import cross_tokenizer_objective
from jaxdistill.kd.freeze import (
    freeze,
    freeze_mask,
    freeze_phases,
    migrate,
)
from jaxdistill.kd.objective import Objective, kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.schedule import Schedule, schedule_of
from jaxdistill.kd.states import tap_of
from jaxdistill.kd.step import TrainState, adamw, init_state, make_step
from jaxdistill.kd.teacher_cache import CachedRows
from jaxdistill.losses.loss import Loss, parse_loss
from jaxdistill.mesh import check_rows
from jaxdistill.models.decoder import Params
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model, check_same_vocabulary, load_model
from jaxdistill.models.sharding import make_sharded
from jaxdistill.paths import patterns_of
from jaxdistill.quant.measure import weight_bytes
from jaxdistill.quant.policy import Policy
from jaxdistill.recipes.command import command_of
from jaxdistill.recipes.learned_rows import LearnedRows, check_width
from jaxdistill.recipes.options import Distill, Quantize, identity
from jaxdistill.recipes.parallel import mesh_shape, parallel
from jaxdistill.recipes.run_report import BY, Results, check_student, report_run
from jaxdistill.recipes.samples import run_samples
from jaxdistill.recipes.signal_looks import recommended, signal_looks
from jaxdistill.recipes.slices import watched
from jaxdistill.recipes.trainee import Trainee, make_trainee
from jaxdistill.recipes.transfer_set import (
    contents_of,
    serve,
    transfer_set,
    with_teacher_text,
    with_vocabulary,
    write_counts,
)
from jaxdistill.train.checkpoint import recover
from jaxdistill.train.loop import Look, train
from jaxdistill.train.packing import batches
from jaxdistill.train.run_directory import RunDirectory


@parallel
def distill(
    o: Distill,
    console: Console | None = None,
    *,
    known: Mapping[str, Any] | None = None,
    said: Mapping[str, Any] | None = None,
) -> Results:
    """Run the job.

    Args:
        o: the options.
        console: where progress and tables are shown; standard error by default.
        known: the results of ``"teacher"`` or ``"ptq"`` where the same model and held-out text were
            evaluated before; they are not evaluated again.
        said: the options as the user gave them, for the run's config.json, where it was by another
            verb.

    Returns:
        ``{"teacher", "start" or "ptq", "student"}``, each with its evaluation and ``bytes``; no
        teacher's where none is live, ``"teacher 2"`` and so on where there are several.

    Raises:
        UserError: any input is wrong, and nothing is written then; a bad loss; or a full disk.
        Stopped: a signal came while it trained.
    """
    with contextlib.ExitStack() as opened:
        return _distill(o, console or Console(stderr=True), known or {}, said, opened)


def _distill(
    o: Distill,
    console: Console,
    known: Mapping[str, Any],
    said: Mapping[str, Any] | None,
    opened: contextlib.ExitStack,
) -> Results:
    """Do what ``distill`` says; what is closed at its end is entered into ``opened``."""
    # Models and data; everything that can be wrong with the input is found before writing.
    loss = parse_loss(o.objective)
    shape = mesh_shape(o)
    if shape is not None:
        check_rows(o.batch_size, shape, o.accumulate)
    teachers = [load_model(name, o.teacher_layout).floats() for name in o.teachers]
    base = load_model(o.student).floats() if o.student else teachers[0]
    crossed = bool(loss.of_kind("cross_tokenizer"))
    sizes = [] if crossed else [check_same_vocabulary(t, base) for t in teachers]
    shared = min(sizes, default=base.config.vocab_size)
    notes = io.StringIO()  # of the data, shown once nothing is refused
    found = transfer_set(o, base, teachers, loss, Console(file=notes))
    if isinstance(found.rows, CachedRows):
        shared = min(shared, found.rows.cache.header.vocab_size)
    plain = [t.apply_fn(dtype=jnp.dtype(o.dtype)) for t in teachers]
    some = batches(found.rows, batch_size=o.batch_size, seed=o.seed)  # looked at before training
    student = make_trainee(o, base, teachers[0] if teachers else None, loss, some, console)
    if isinstance(found.rows, LearnedRows):
        check_width(found.rows, student.config)
    patterns = _patterns(o, student, teachers, some, console)
    phases = freeze_phases(patterns, o.steps, o.freeze_start, o.freeze_stop) if o.steps else []
    fixed = list(student.frozen)
    if all(x is True for x in jax.tree.leaves(freeze_mask(student.params, patterns + fixed))):
        raise UserError(
            f"--freeze {o.freeze} leaves nothing to train; give fewer patterns, or --learn-ranges"
        )
    loss = measured(loss, plain, teachers, found.rows, some)
    schedule = schedule_of(loss, o.steps)
    watch = watched(o, found.held_rows, base)
    objective = objective_of(o, loss, student, [] if found.answered else teachers, shared)
    rollout = _rollout(o, student, base, shared)
    guides = tuple(t.params for t in teachers)
    taught = None if found.answered else (guides if len(guides) != 1 else guides[0])
    _check_step(objective, rollout, schedule, student, taught, some[0])
    contents = contents_of(o, teachers, base, found)
    run = opened.enter_context(
        RunDirectory(o.out, said or identity(o), resume=o.resume, contents=contents)
    )
    write_counts(run.path, found)
    console.out(notes.getvalue(), end="", highlight=False)
    if o.text_from == "teacher":
        where = run.path / "teacher_text.npz"
        found = with_teacher_text(
            o, found, teachers[0], with_vocabulary(plain[0], shared), where, console
        )
    data = serve(o, found, teachers, plain, shared)

    # Evaluation reads the stored form, the very one that is saved and exported.
    beside = [] if crossed else plain
    own = student.apply(trained=False, dtype=jnp.dtype(o.dtype))
    score = functools.partial(kd_objective, mixture=o.mixture, vocab_size=shared, chunk=o.chunk)
    by_row = make_row_evaluator(score(own, beside or None, by_row=True))

    def judge(stored: Params, on: list[Any]) -> dict[str, Any]:
        policy = student.policy or Policy(rules=())
        return summarize(by_row(stored, guides if beside else None, on)) | {
            "bytes": weight_bytes(stored, policy)
        }

    results: Results = {label: dict(result) for label, result in known.items()}
    before = student.stored(student.params)
    name = "ptq" if student.policy else "start"
    with console.status("evaluating before training"):
        for i, (teacher, apply) in enumerate(zip(teachers, plain, strict=True)):
            label = "teacher" if i == 0 else f"teacher {i + 1}"
            if label not in results and not crossed:
                results[label] = judge_teacher(o, teacher, apply, shared, found.held)
                results[label] |= {"kl": 0.0, "agreement": 1.0} if len(teachers) == 1 else {}
        if name not in results:
            results[name] = judge(before, found.held)

    # Training: any objective, any transform, any freeze.
    stored = before
    if o.steps:
        quarter = max(1, o.steps // 4)
        say = functools.partial(console.print, highlight=False, soft_wrap=True)
        resumed = recover(run.checkpoints, say) if o.resume else None
        probe = found.held[: max(1, 2048 // (o.batch_size * o.seq_len))]
        looks = [
            Look(
                o.eval_every or quarter,
                lambda _, params: {
                    f"eval/{k}": v
                    for k, v in judge(student.stored(params), probe).items()
                    if isinstance(v, float | int)
                },
            )
        ]
        if _is_its_teacher(o, student, teachers):
            since = None if resumed else before
            assert student.policy is not None
            looks += signal_looks(o, teachers[0], student.policy, since, found.held, run.path)
        optimizer = adamw(o.lr, o.steps, weight_decay=o.weight_decay)
        state = None
        for phase in phases:
            if phase.stop < (resumed or 0):
                continue
            tx = freeze(optimizer, phase.patterns + fixed)
            state = enter_phase(state, student, tx, phase.patterns, schedule)
            state = train(
                make_step(
                    objective,
                    tx,
                    accumulate=o.accumulate,
                    rollout=rollout,
                    schedule=schedule,
                ),
                state,
                taught,
                data,
                steps=phase.stop,
                run=run,
                fingerprint=found.fingerprint,
                resume=o.resume and (phase.start == 0 or (resumed or 0) > phase.start),
                checkpoint_every={0: quarter, -1: 0}.get(o.checkpoint_every, o.checkpoint_every),
                keep=o.keep,
                guard=o.guard,
                looks=looks,
                console=console,
            )
        assert state is not None  # a run of one step or more has a phase
        stored = student.stored(state.params)
        with console.status("evaluating the student"):
            results["student"] = judge(stored, found.held)
        check_student(results["student"], o.lr)
    else:
        results["student"] = results[name]
    compare(results, name)
    student.save(run.student, stored, base.tokenizer)
    slices = None
    if watch is not None:
        with console.status("evaluating slices"):
            states = {name: before, "student": stored} if o.steps else {"student": stored}
            seen = guides if beside else None
            sums = {k: watch.texts.sums(by_row, params, seen) for k, params in states.items()}
            if beside:
                alone = make_row_evaluator(score(plain[0], None, by_row=True))
                sums = {"teacher": watch.texts.sums(alone, teachers[0].params, None)} | sums
        slices = report_slices(sums, watch.masks, by=BY)
    samples = []
    if o.samples:
        with console.status("answering held-out prompts"):
            rounded = before if student.policy else None
            known_to = teachers[0] if teachers and not crossed else None
            samples = run_samples(run.path, known_to, rounded, found.held_rows, o.samples)
    kind = Distill if said is None else Quantize
    command = command_of(kind, {**vars(o), "model": o.teacher, "resume": False, "json": False})
    report_run(run, results, console, _title(o), slices, samples, command)
    return results


def _check_step(
    objective: Objective,
    rollout: Any,
    schedule: Schedule | None,
    student: Trainee,
    taught: Any,
    batch: Any,
) -> None:
    """Trace a step's parts, so that what cannot be computed is said before anything is written."""
    step = jnp.zeros((), jnp.int32)
    knobs = schedule.knobs(schedule.init(), step) if schedule else {}
    jax.eval_shape(objective, student.params, taught, batch, knobs)
    if rollout:
        jax.eval_shape(rollout, student.params, batch, step)


def _is_its_teacher(o: Distill, student: Trainee, teachers: Sequence[Model]) -> bool:
    """Return whether the student is its only teacher quantized, and can be compared inside."""
    same = len(teachers) == 1 and o.student is None and not o.student_init
    return same and student.policy is not None


def _patterns(
    o: Distill, student: Trainee, teachers: Sequence[Model], data: Any, console: Console
) -> list[str]:
    """Return the patterns that the user's word for --freeze means."""
    if o.freeze != "auto":
        return patterns_of(o.freeze, "--freeze")
    if not _is_its_teacher(o, student, teachers):
        raise UserError(
            "--freeze auto compares a quantized student with the float model it was made from; "
            "give --bits and that model as the only --teacher, or name the patterns"
        )
    assert student.policy is not None
    params = {k: v for k, v in student.params.items() if k != "projections"}
    return recommended(teachers[0], params, student.policy, data, console)


def measured(
    loss: Loss, applies: Sequence[Any], teachers: Sequence[Model], rows: Any, data: Any
) -> Loss:
    """Return the loss with what is measured before a run: CAKLD's mean top probability."""
    if loss.moving().get("cakld.confidence") != "measured":
        return loss
    if isinstance(rows, CachedRows | LearnedRows):
        return loss.with_argument("cakld.confidence", rows.confidence())
    some = [data[i] for i in range(4)]
    value = teacher_confidence(applies[0], teachers[0].params, some)
    return loss.with_argument("cakld.confidence", value)


def objective_of(
    o: Distill, loss: Loss, student: Trainee, teachers: Sequence[Model], shared: int
) -> Objective:
    """Return the training objective that the options name, of the teachers that are live.

    Raises:
        UserError: the devices cannot attend so.
    """
    tap = tap_of(loss)
    if o.attention == "splash" and (found := jax.default_backend()) != "tpu":
        raise UserError(
            f"--attention splash given, and the devices are {found}s; accepted there: xla"
            + (", cudnn" if found == "gpu" else "")
        )
    how: dict[str, Any] = {"dtype": jnp.dtype(o.dtype), "unroll": o.unroll, "tap": tap}
    how["attention"] = o.attention
    learner = student.apply(remat=o.remat, **how)
    guides = [t.apply_fn(**how) for t in teachers]
    if loss.of_kind("cross_tokenizer"):
        return cross_tokenizer_objective(learner, guides[0], loss, chunk=o.chunk)
    teacher = guides[0] if len(guides) == 1 else guides or None
    return kd_objective(
        learner,
        teacher,
        loss,
        mixture=o.mixture,
        token_weight=o.token_weight,
        correction=o.correction,
        top_k=o.top_k,
        vocab_size=shared,
        chunk=o.chunk,
    )


def _rollout(o: Distill, student: Trainee, base: Model, shared: int) -> Any:
    """Return what puts the student's own text in place of the data's; None for off-policy."""
    if not o.on_policy:
        return None
    return make_rollout(
        with_vocabulary(student.apply(trained=False, dtype=jnp.dtype(o.dtype)), shared),
        student.config,
        prompt_length=o.prompt_length,
        how=Sampling(max_new_tokens=o.seq_len - o.prompt_length, temperature=o.sample_temperature),
        stop=base.stop_ids,
        share=o.on_policy,
        seed=o.seed,
        prepare=student.transform,
        dtype=jnp.dtype(o.dtype),
    )


def judge_teacher(
    o: Distill, teacher: Model, apply: Any, shared: int, held: list[Any]
) -> dict[str, Any]:
    """Return a teacher's own evaluation."""
    objective = kd_objective(apply, None, vocab_size=shared, chunk=o.chunk, by_row=True)
    found = make_row_evaluator(objective)(teacher.params, None, held)
    return summarize(found) | {"bytes": weight_bytes(teacher.params)}


def enter_phase(
    state: TrainState | None,
    student: Trainee,
    tx: optax.GradientTransformation,
    patterns: list[str],
    schedule: Schedule | None,
) -> TrainState:
    """Return the state that a phase starts from: what it freezes snapped, the optimizer carried on.

    Args:
        state: the last phase's state; None at the start of a run.
        student: what a run starts from.
        tx: the phase's optimizer.
        patterns: what the phase freezes.
        schedule: the run's.
    """
    params = student.snapped(student.params if state is None else state.params, patterns)
    if state is None:
        return make_sharded(lambda p: init_state(p, tx, schedule), params)
    moved = make_sharded(lambda old, p: migrate(old, tx, p), state.opt_state, params)
    return dataclasses.replace(state, params=params, opt_state=moved)


def _title(o: Distill) -> str:
    """Say in a few words what a run was."""
    what = f"{o.bits}-bit KD-QAT" if o.bits != "none" else "knowledge distillation"
    return what if o.objective == "forward_kl" else f"{what} by {o.objective}"
