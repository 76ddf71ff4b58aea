"""Will it fit, how fast, what does it cost: the real training step, compiled without weights.

The step of ``distill`` is compiled ahead of time from shapes alone, for a mesh of simulated
devices. Bytes of arrays are exact; temporaries are what XLA's CPU compiler assigns, which keeps
bfloat16 products in float32 and so needs rather more than an accelerator's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from jaxdistill.errors import UserError
from jaxdistill.evals.communication import sent_bytes
from jaxdistill.evals.cost import count_params, training_flops
from jaxdistill.evals.devices import device
from jaxdistill.kd.freeze import freeze
from jaxdistill.kd.schedule import schedule_of
from jaxdistill.kd.states import init_projections
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.losses.loss import parse_loss
from jaxdistill.mesh import MeshShape, check_rows, make_mesh, on_mesh, parse_mesh, row_sharding
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Remat, init_params
from jaxdistill.models.hub import Model, load_config
from jaxdistill.models.sharding import Layout, shardings
from jaxdistill.paths import patterns_of, whole_patterns
from jaxdistill.quant.policy import scale_shapes
from jaxdistill.recipes.distill import objective_of
from jaxdistill.recipes.options import Distill, Quantization, policy_of
from jaxdistill.recipes.trainee import Trainee

_HEADROOM = 0.08  # of a device's memory, for the runtime, the program and fragmentation


# Options are shown in the order of the bases, the last one first.
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Planned:
    model: str
    """Shape of the student: llama-2-7b, llama-3.1-8b, llama-3.1-70b, a config.json, an HF directory
    or a .gguf file. No weights are read."""
    teacher: str | None = None
    """Shape of the live teacher; by default the student's own. none for a cached one."""
    cache_k: int = 64
    """Tokens that a cached teacher keeps of each place."""
    mesh: str = "data=1"
    """Devices along each axis, as in fsdp=64 or data=4,fsdp=8,tensor=2; simulated on this host."""
    batch_size: int = 8
    """Rows a step, over all devices."""
    seq_len: int = 512
    """Tokens a row."""
    device: str = "h100"
    """Accelerator: a100, h100, h200, v4, v5e, v5p, v6e."""
    mfu: float = 0.4
    """Model FLOPs utilisation that computing is stated at: a share of the bfloat16 peak."""
    link_share: float = 0.6
    """Share of the bandwidth between devices that is reached."""
    tokens: float = 1e9
    """Tokens to train on."""
    price: float | None = None
    """Price of one device for one hour; without it no cost is said."""
    objective: str = "forward_kl"
    """See `jaxdistill distill`."""
    freeze: str = "ov"
    """Left untrained: ov, none, weights or a regex, see `jaxdistill quantize`; with --bits none,
    none by default."""
    accumulate: int = 1
    """Micro-batches a step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and products."""
    remat: Remat = "full"
    """What the backward pass makes again, see `jaxdistill quantize`."""
    chunk: int = CHUNK
    """Tokens whose vocabulary logits exist at once, over all devices."""
    teacher_layout: Layout = "sharded"
    """See `jaxdistill distill`."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Quantization, _Planned):
    """Say beforehand whether a run fits its devices, how fast it is and what it costs."""


def plan(o: Plan) -> dict[str, Any]:
    """Compile the step and count.

    Returns:
        ``mesh``, ``devices``, ``params`` (all of the student's); ``bytes`` a
        device: ``student`` (masters, grids), ``optimizer``, ``teacher``, ``batch``, ``activations``
        (kept from forward to backward, an estimate), ``temporaries`` (all others) and ``total``;
        ``memory`` of a device and whether it ``fits``; ``flops`` a step (``model``, ``hardware``);
        ``sent``, bytes that a device sends in a step by mesh axis (`evals.communication`);
        ``seconds`` of a step: ``compute`` at ``mfu``, ``overlapped`` (fsdp and data, sent while it
        computes) and ``waiting`` (tensor), ``max(compute, overlapped) + waiting`` in all;
        ``tokens_per_second``, ``hours``, ``device_hours`` and with a price ``cost``, all null where
        the run does not fit; ``compile_seconds``.

    Raises:
        UserError: an option is wrong, or there are too few devices to simulate the mesh.
    """
    target = device(o.device)
    shape = parse_mesh(o.mesh)
    _check(o, shape)
    student = load_config(o.model)
    teacher = None if o.teacher == "none" else load_config(o.teacher or o.model)
    began = time.perf_counter()
    mesh = make_mesh(shape, _simulated(shape.size))
    with on_mesh(mesh):
        found = _compiled(o, student, teacher, mesh)
    found["total"] = sum(found.values())
    patterns = whole_patterns(frozen_by(o), student.num_layers)
    frozen = "|".join(f"(?:{p})" for p in patterns) or None
    flops = training_flops(student, o.seq_len, teacher=teacher, frozen=frozen, remat=o.remat)
    tokens = o.batch_size * o.seq_len
    sent = sent_bytes(
        student,
        shape,
        tokens=tokens,
        micro_batches=o.accumulate,
        teacher=teacher,
        teacher_layout=o.teacher_layout,
        frozen=frozen,
        remat=o.remat,
        itemsize=jnp.dtype(o.dtype).itemsize,
    )
    rate = math.inf if target.link is None else target.link * o.link_share
    seconds = {
        "compute": tokens * flops["model"] / (o.mfu * target.peak_flops * shape.size),
        "overlapped": (sent["fsdp"] + sent["data"]) / rate,
        "waiting": sent["tensor"] / rate,
    }
    fits = found["total"] <= (1 - _HEADROOM) * target.memory
    speed = hours = None
    if fits:
        speed = tokens / (max(seconds["compute"], seconds["overlapped"]) + seconds["waiting"])
        hours = o.tokens / speed / 3600
    return {
        "model": o.model,
        "teacher": o.teacher or o.model,
        "mesh": str(shape),
        "devices": shape.size,
        "device": target.name,
        "params": count_params(student),
        "bytes": found,
        "memory": target.memory,
        "fits": fits,
        "flops": {k: v * o.batch_size * o.seq_len for k, v in flops.items()},
        "mfu": o.mfu,
        "sent": sent,
        "seconds": seconds,
        "tokens_per_second": speed,
        "hours": hours,
        "device_hours": None if hours is None else hours * shape.size,
        "cost": None if o.price is None or hours is None else hours * shape.size * o.price,
        "compile_seconds": time.perf_counter() - began,
    }


def frozen_by(o: Plan) -> list[str]:
    """Return the patterns that --freeze means."""
    if o.freeze == "auto":
        raise UserError("--freeze auto given, which reads weights; accepted: ov, none or a regex")
    return [] if o.bits == "none" and o.freeze == "ov" else patterns_of(o.freeze, "--freeze")


def _check(o: Plan, shape: MeshShape) -> None:
    least = {"batch_size": 1, "seq_len": 2, "accumulate": 1, "chunk": 1, "cache_k": 1}
    for name, bound in least.items():
        if getattr(o, name) < bound:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(o, name)} given; accepted: {bound} or more")
    if not 0 < o.link_share <= 1:
        raise UserError(f"--link-share {o.link_share} given; accepted: a share up to 1, above 0")
    if not 0 < o.mfu <= 1 or not 0 < o.tokens < math.inf or (o.price or 0) < 0:
        raise UserError(
            f"--mfu {o.mfu}, --tokens {o.tokens}, --price {o.price} given; accepted: a share up to "
            "1, above 0, and 0 or more"
        )
    check_rows(o.batch_size, shape, o.accumulate)


def _simulated(number: int) -> list[Any]:
    """Return that many CPU devices, making them where JAX has not started yet."""
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        pass  # JAX has started: what is there must do
    found = jax.devices("cpu")
    if len(found) < number:
        raise UserError(
            f"a mesh of {number} devices given, and JAX has started with {len(found)}; run "
            "`jaxdistill plan` by itself, or set jax_num_cpu_devices before the first computation"
        )
    return found[:number]


def planned_step(
    o: Plan, student: ModelConfig, teacher: ModelConfig | None, mesh: Any
) -> tuple[Any, tuple[Any, Any, Any], Any]:
    """Return the jitted step, its arguments as shapes in their places, and the loss's sum."""
    base = Model(config=student, params=_shapes(student), tokenizer=None, source=o.model)
    options: dict[str, Any] = {f.name: getattr(o, f.name) for f in dataclasses.fields(Quantization)}
    job = Distill(
        data="",
        out=Path(),
        teacher=None if teacher is None else o.model,
        cache=Path() if teacher is None else None,
        objective=o.objective,
        freeze=o.freeze,
        batch_size=o.batch_size,
        seq_len=o.seq_len,
        accumulate=o.accumulate,
        dtype=o.dtype,
        remat=o.remat,
        chunk=o.chunk,
        student=o.model,
        **options,
    )
    policy = policy_of(job, base)
    params = base.params if policy is None else scale_shapes(base.params, policy)
    loss = parse_loss(o.objective)
    width = (teacher or student).hidden_size
    learned = jax.eval_shape(
        lambda: init_projections(
            loss, student.hidden_size, width, student.num_layers, jax.random.key(0)
        )
    )
    params = params | ({"projections": learned} if learned else {})
    if loss.moving().get("cakld.confidence") == "measured":
        loss = loss.with_argument("cakld.confidence", 0.5)
    schedule = schedule_of(loss, 1000)
    trainee = Trainee(config=student, params=params, policy=policy, merge=None, frozen=())
    guides = []
    if teacher is not None:
        name = o.teacher or o.model
        guides = [Model(config=teacher, params=_shapes(teacher), tokenizer=None, source=name)]
    shared = min(c.vocab_size for c in (student, *(g.config for g in guides)))
    objective = objective_of(job, loss, trainee, guides, shared)
    tx = freeze(adamw(1e-4, 1000), frozen_by(o))
    state = jax.eval_shape(lambda p: init_state(p, tx, schedule), params)
    rows = row_sharding(mesh)
    kinds = {
        "tokens": jnp.int32,
        "loss_mask": jnp.bool_,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
    }
    if teacher is None:
        kinds |= {"teacher_log_probs": jnp.float16, "teacher_log_tail": jnp.float16}
        kinds["teacher_indices"] = jnp.uint16 if student.vocab_size <= 2**16 else jnp.int32
    kept: dict[str, tuple[int, ...]] = {"teacher_log_probs": (o.cache_k,)}
    kept["teacher_indices"] = (o.cache_k,)
    batch = {
        name: jax.ShapeDtypeStruct(
            (o.batch_size, o.seq_len, *kept.get(name, ())), kind, sharding=rows
        )
        for name, kind in kinds.items()
    }
    taught = _placed(guides[0].params, mesh, o.teacher_layout) if guides else None
    step = make_step(objective, tx, accumulate=o.accumulate, schedule=schedule)
    knobs = (schedule.knobs(schedule.init(), jnp.zeros((), jnp.int32)),) if schedule else ()

    def loss_of(params: Any, taught: Any, batch: Any) -> Any:
        return objective(params, taught, batch, *knobs)[0]

    return step, (_placed(state, mesh), taught, batch), loss_of


def _compiled(
    o: Plan, student: ModelConfig, teacher: ModelConfig | None, mesh: Any
) -> dict[str, int]:
    """Return the bytes that one device holds, by what they are."""
    step, arguments, loss_of = planned_step(o, student, teacher, mesh)
    memory = step.lower(*arguments).compile().memory_analysis()
    state, taught, batch = arguments
    # What the backward pass needs of the forward one, weights left out: rows, whole along tensor.
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    saved = _saved(loss_of, state.params, taught, batch, o) // rows
    spare = memory.output_size_in_bytes - memory.alias_size_in_bytes  # metrics; the state is reused
    temporaries = memory.temp_size_in_bytes + max(0, spare)
    return {
        "student": _local_bytes(state.params),
        "optimizer": _local_bytes((state.opt_state, state.step)),
        "teacher": _local_bytes(taught),
        "batch": _local_bytes(batch),
        "activations": min(saved, temporaries),
        "temporaries": temporaries - min(saved, temporaries),
    }


def _saved(loss_of: Any, params: Any, taught: Any, batch: Any, o: Plan) -> int:
    """Return the bytes of a micro-batch's residuals that are not of a parameter's shape."""
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // o.accumulate, *x.shape[1:]), x.dtype), batch
    )
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, taught))

    def backward(params: Any, taught: Any, batch: Any) -> Any:
        return jax.vjp(lambda p: loss_of(p, taught, batch), params)[1]

    kept = jax.eval_shape(backward, *bare, part)
    weights = {leaf.shape for leaf in jax.tree.leaves(bare)}
    weights |= {shape[1:] for shape in weights} | {shape[::-1] for shape in weights}
    leaves = [x for x in jax.tree.leaves(kept) if x.shape not in weights]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _placed(tree: Any, mesh: Any, layout: Layout = "sharded") -> Any:
    return jax.tree.map(
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
        tree,
        shardings(tree, mesh, layout),
    )


def _local_bytes(tree: Any) -> int:
    """Return the bytes of a tree's leaves on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
