"""What a student, its teacher and a cascade of them cost: to train, and to answer requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from jaxdistill.errors import UserError
from jaxdistill.evals.cost import (
    Use,
    cache_bytes,
    cascade_use,
    serving,
    stored_bytes,
    stored_bytes_by,
    table_bytes,
    training,
)
from jaxdistill.evals.devices import device
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.models.hub import load_config, shipped_configs
from jaxdistill.models.json_text import read_object
from jaxdistill.models.quantized import is_quantized, load_policy
from jaxdistill.paths import patterns_of, whole_patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Say what training and answering cost, by teacher, student and a cascade of both."""

    student: str
    """The small model: a run, a directory, a .gguf file, a hub name, or a shape as llama-3.1-8b.
    Bits and freeze are the run's own; a shape without weights has 4 bits and ov-freeze."""
    teacher: str | None = None
    """The large model; by default the student's own shape, 16 bits a weight (KD-QAT)."""
    device: str = "h100"
    """Accelerator: a100, h100, h200, v4, v5e, v5p, v6e, or one of --devices."""
    devices: Path | None = None
    """JSON file of more devices, or of other figures for these, a price an hour among them."""
    price: float | None = None
    """Price of an hour of the device, in any currency."""
    student_bits: int | None = None
    """Bits of a weight of the student, where they are to differ from its own."""
    teacher_bits: int = 16
    """Bits of a weight of the teacher."""
    group_size: int | None = None
    """Weights that share a scale, with --student-bits; by default a channel."""
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
    freeze: str | None = None
    """Left untrained: ov, none, or a regex over parameter paths; by default what the run left."""
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
        values fit into one device, the table of tokens too; ``student``, how its weights are stored
        and what training leaves frozen; ``saved``, the share of
        the teacher's device hours that the cascade saves; ``pays_after``, requests after which
        training has paid for itself; ``formulas``, how each figure was made.

    Raises:
        UserError: an option is impossible, or a model or file cannot be read.
    """
    _check(o)
    target = device(o.device, o.devices)
    if o.price is not None:
        target = dataclasses.replace(target, price=o.price)
    student = load_config(o.student)
    teacher = student if o.teacher is None else load_config(o.teacher)
    how = {"prompt": o.prompt, "new": o.new, "batch": o.batch, "mfu": o.mfu, "mbu": o.mbu}
    weights = weights_of(o.student, student)
    if o.student_bits is not None:
        weights = _planned(student, o.student_bits, o.group_size)
    freeze = weights.freeze if o.freeze is None else o.freeze
    held = {"student": weights.read, "teacher": stored_bytes(teacher, o.teacher_bits)}
    tables = {"student": weights.table, "teacher": table_bytes(teacher, o.teacher_bits)}
    small = serving(student, target, weights=held["student"], **how)
    large = serving(teacher, target, weights=held["teacher"], **how)
    nothing = Use(0.0, 0.0, 0.0, 0.0, 0.0)
    # Of adapters only, "" is found in every path.
    patterns = whole_patterns(_patterns(freeze), student.num_layers) if freeze else [""]
    frozen = "|".join(f"(?:{p})" for p in patterns) if patterns else None
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
            name: held[name] + tables[name] + o.batch * (o.prompt + o.new) * cache_bytes(c)
            <= target.memory
            for name, c in (("student", student), ("teacher", teacher))
        },
        "training": _shown(trained),
        "answers": {
            name: _shown(use.times(o.requests)) | {"seconds_a_request": use.seconds * o.batch}
            for name, use in answers.items()
        },
        "weights": held,
        "tables": tables,
        "student": {"weights": weights.words, "freeze": freeze},
        "saved": saving / large.seconds,
        "pays_after": trained.seconds / saving if saving > 0 else None,
        "formulas": FORMULAS,
    }


class Weights(NamedTuple):
    """How a model's weights are stored.

    Attributes:
        read: bytes read for each token.
        table: bytes of the table that tokens are looked up in, where it is not the head's.
        words: a few words for the report.
        freeze: what its training leaves untrained.
    """

    read: float
    table: float
    words: str
    freeze: str


def weights_of(source: str, config: ModelConfig) -> Weights:
    """Return how a model's weights are stored; only small files are read.

    Args:
        source: what ``load_config`` takes. A shape without weights is planned at 4 bits.
        config: its shape.
    """
    path = Path(source).expanduser()
    if source in shipped_configs() or path.suffix.lower() == ".json":
        return _planned(config, 4, None)
    if path.suffix.lower() == ".gguf":
        return Weights(float(path.stat().st_size), 0.0, "as its file", "none")
    student, freeze = path, "none"
    if (path / "student").is_dir():
        student, options = path / "student", read_object(path / "config.json").get("options", {})
        freeze = str(options.get("freeze", "none"))
        freeze = "none" if freeze == "auto" else freeze
        if "lora" in str(options.get("student_init") or ""):
            freeze = ""  # adapters only: every kernel is frozen
    if not is_quantized(student):
        freeze = freeze if freeze != "ov" else "none"
        return Weights(stored_bytes(config, 16), table_bytes(config), "16 bits", freeze)
    policy, paths = load_policy(student), {"/".join(t.path) for t in hf_layout(config)}
    specs = {path: spec for path in paths if (spec := policy.spec(path))}
    widths = sorted({(s.bits, s.group_size or 0) for s in specs.values()})
    words = ", ".join(f"{b} bits" + (f" in groups of {g}" if g else "") for b, g in widths)
    return Weights(stored_bytes_by(config, specs), table_bytes(config), words, freeze)


def _planned(config: ModelConfig, bits: int, group: int | None) -> Weights:
    return Weights(
        stored_bytes(config, bits, group),
        table_bytes(config, max(bits, 16)),
        f"{bits} bits" + (f" in groups of {group}" if group else ""),
        "none" if bits >= 16 else "ov",
    )


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
    if o.group_size is not None and o.student_bits is None:
        raise UserError(f"--group-size {o.group_size} needs --student-bits; a run has its own")
    for name, bits in (("student-bits", o.student_bits), ("teacher-bits", o.teacher_bits)):
        if bits is not None and not 1 <= bits <= 32:
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
