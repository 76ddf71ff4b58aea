"""What a student, its teacher and a cascade of them cost: to train, and to answer requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxdistill.errors import UserError
from jaxdistill.evals.cost import Use, cache_bytes, cascade_use, serving, stored_bytes, training
from jaxdistill.evals.devices import device
from jaxdistill.models.hub import load_config
from jaxdistill.paths import patterns_of, whole_patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Say what training and answering cost, by teacher, student and a cascade of both."""

    student: str
    """The small model: a run, a directory, a .gguf file, or a hub name; its shape alone is read,
    its bits are --student-bits."""
    teacher: str | None = None
    """The large model; by default the student's own shape, 16 bits a weight (KD-QAT)."""
    device: str = "h100"
    """Accelerator: a100, h100, h200, v4, v5e, v5p, v6e, or one of --devices."""
    devices: Path | None = None
    """JSON file of more devices, or of other figures for these, a price an hour among them."""
    price: float | None = None
    """Price of an hour of the device, in any currency."""
    student_bits: int = 4
    """Bits of a weight of the student."""
    teacher_bits: int = 16
    """Bits of a weight of the teacher."""
    group_size: int | None = None
    """Weights that share a scale; by default a channel."""
    prompt: int = 512
    """Tokens of a prompt."""
    new: int = 128
    """Tokens of an answer."""
    batch: int = 1
    """Requests that are answered at once."""
    requests: float = 1e6
    """Requests that are counted."""
    coverage: float = 0.7
    """Share of the requests that the student answers, as `jaxdistill cascade` reports."""
    person: float = 0.0
    """Share of the requests that go on to a person."""
    person_price: float = 0.0
    """Price of a person's answer."""
    tokens: float = 1e8
    """Tokens that the student is trained on."""
    seq_len: int = 512
    """Tokens of a training row."""
    freeze: str = "ov"
    """Left untrained: ov, none, or a regex over parameter paths."""
    mfu: float = 0.4
    """Share of the device's operations that is reached."""
    mbu: float = 0.6
    """Share of its memory's bandwidth that is reached."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def cost(o: Cost) -> dict[str, Any]:
    """Return the costs.

    Returns:
        ``device``; ``training``, of the student; ``answers``: by ``teacher``, ``student``,
        ``cascade`` what all requests take: ``flops``, ``bytes``, ``device_hours``, ``kwh``,
        ``price`` (null where unknown) and ``seconds_a_request``, the time of a batch; ``people``,
        what people are paid for the requests that come to them; ``fits``, whether weights, keys and
        values fit into one device; ``saved``, the share of
        the teacher's device hours that the cascade saves; ``pays_after``, requests after which
        training has paid for itself; ``formulas``, how each figure was made.

    Raises:
        UserError: an option is impossible, or a model or file cannot be read.
    """
    _check(o)
    patterns = _patterns(o.freeze)
    target = device(o.device, o.devices)
    if o.price is not None:
        target = dataclasses.replace(target, price=o.price)
    student = load_config(o.student)
    teacher = student if o.teacher is None else load_config(o.teacher)
    how = {"prompt": o.prompt, "new": o.new, "batch": o.batch, "mfu": o.mfu, "mbu": o.mbu}
    held = {
        "student": stored_bytes(student, o.student_bits, o.group_size),
        "teacher": stored_bytes(teacher, o.teacher_bits, o.group_size),
    }
    small = serving(student, target, weights=held["student"], **how)
    large = serving(teacher, target, weights=held["teacher"], **how)
    nothing = Use(0.0, 0.0, 0.0, 0.0, 0.0)
    frozen = "|".join(f"(?:{p})" for p in whole_patterns(patterns, student.num_layers)) or None
    shares = (o.coverage, max(0.0, 1 - o.coverage - o.person), o.person)
    both = cascade_use([small, large, nothing], shares)
    trained = training(
        student,
        target,
        tokens=o.tokens,
        seq_len=o.seq_len,
        teacher=teacher,
        frozen=frozen,
        mfu=o.mfu,
    )
    answers = {"teacher": large, "student": small, "cascade": both}
    saving = large.seconds - both.seconds
    return {
        "device": target.name,
        "requests": o.requests,
        "people": o.requests * o.person * o.person_price,
        "fits": {
            name: held[name] + o.batch * (o.prompt + o.new) * cache_bytes(c) <= target.memory
            for name, c in (("student", student), ("teacher", teacher))
        },
        "training": _shown(trained),
        "answers": {
            name: _shown(use.times(o.requests)) | {"seconds_a_request": use.seconds * o.batch}
            for name, use in answers.items()
        },
        "weights": held,
        "saved": saving / large.seconds,
        "pays_after": trained.seconds / saving if saving > 0 else None,
        "formulas": FORMULAS,
    }


FORMULAS = {
    "flops": "prompt * (2 N + 2 L T W) + (new - 1) * (2 N + 4 L W (prompt + new / 2)): N weights "
    "of linear layers and head, L layers, W query heads times their width, T the prompt (PaLM, "
    "arXiv 2204.02311, appendix B, a token attending to half of T)",
    "bytes": "max(1, new) * weights / batch + (new - 1) * (prompt + new / 2) * keys and values of "
    "a token, 2 bytes each (Pope et al., arXiv 2211.05102)",
    "device_hours": "prompt and answer each max(flops / (peak * mfu), bytes / (bandwidth * mbu)) / "
    "3600 (roofline, Williams et al. 2009); peak and bandwidth from data sheets, see devices.json",
    "kwh": "device_hours * greatest power / 1000",
    "price": "device_hours * price of an hour; people are paid requests * person * person_price",
    "cascade": "student + (1 - coverage) * teacher + person's",
    "training": "tokens * (3 forward passes of the student, less frozen weights' gradients, and "
    "one of the teacher), at mfu",
}


def _patterns(freeze: str) -> list[str]:
    """Return the patterns that --freeze means."""
    if freeze == "auto":
        raise UserError("--freeze auto needs the weights; accepted here: ov, none, or a regex")
    return patterns_of(freeze, "--freeze")


def _check(o: Cost) -> None:
    numbers = {"requests": o.requests, "tokens": o.tokens, "person-price": o.person_price}
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name} {value} given; accepted: 0 or more")
    for name, bits in (("student-bits", o.student_bits), ("teacher-bits", o.teacher_bits)):
        if not 1 <= bits <= 32:
            raise UserError(f"--{name} {bits} given; accepted: 1 to 32")
    if o.coverage < 0 or o.person < 0 or o.coverage + o.person > 1 + 1e-9:
        raise UserError(
            f"--coverage {o.coverage} and --person {o.person} given; accepted: shares of 0 or "
            "more, 1 in all at most"
        )
    if o.seq_len < 2 or (o.price is not None and not 0 <= o.price < float("inf")):
        raise UserError(
            f"--seq-len {o.seq_len} and --price {o.price} given; accepted: 2 or more, 0 or more"
        )
    if o.group_size is not None and o.group_size < 1:
        raise UserError(f"--group-size {o.group_size} given; accepted: 1 or more")


def _shown(use: Use) -> dict[str, float | None]:
    return {
        "flops": use.flops,
        "bytes": use.bytes,
        "device_hours": use.seconds / 3600,
        "kwh": None if use.joules is None else use.joules / 3.6e6,
        "price": use.price,
    }
