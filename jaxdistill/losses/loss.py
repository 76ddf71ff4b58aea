"""Weighted sums of objectives, read from text: ``0.9*jsd:beta=0.1,temperature=2+0.1*ce``.

An argument may follow the run: ``forward_kl:temperature=4..1`` goes linearly from 4 to 1. Such
arguments are ``knobs``: scalars that the training step hands in, traced and by name
(``forward_kl.temperature``), so that nothing is compiled again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.errors import UserError
from jaxdistill.losses import cross_tokenizer as _cross_tokenizer  # noqa: F401  fills the registry
from jaxdistill.losses import divergences as _divergences  # noqa: F401
from jaxdistill.losses.registry import Entry, Kind, entry_of
from jaxdistill.losses.top_k import TopK, top_k_of, with_tail

GRAMMAR = "NAME[:ARGUMENT=VALUE,...], or a sum such as 0.9*forward_kl+0.1*ce"
_TERM = re.compile(r"(?:(?P<weight>[^*:]+)\*\s*)?(?P<name>[a-z_0-9]+)(?::(?P<arguments>.+))?")
_PLUS = re.compile(r"(?<![0-9.]e)\+", re.IGNORECASE)  # the plus of 1e+3 joins no terms

_LEAST_WEIGHT, _LARGEST_WEIGHT = (
    float(x) for x in (jnp.finfo("float32").tiny, jnp.finfo("float32").max)
)

_FOUND_OUT = ("adaptive", "measured")  # by the run itself


class Ramp(NamedTuple):
    """Go linearly from ``start`` at the first step to ``stop`` at the last."""

    start: float
    stop: float


def _moves(value: Any) -> bool:
    return isinstance(value, Ramp) or value in _FOUND_OUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """Hold one summand: a registered function, its weight and its arguments."""

    entry: Entry
    weight: float = 1.0
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _LEAST_WEIGHT <= self.weight <= _LARGEST_WEIGHT:
            raise UserError(
                f"the weight of {self.entry.name} is {self.weight:g}; accepted: a number above 0 "
                "that float32 holds"
            )

    def given(self, knobs: Mapping[str, Array]) -> dict[str, Any]:
        """Return the arguments, those that follow the run from ``knobs``."""
        found: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if _moves(value):
                key = f"{self.entry.name}.{name}"
                if key not in knobs:
                    raise UserError(
                        f"{key} is {value!r}, which changes as the run goes on, and no value was "
                        "handed in; give make_step a schedule, or write a number"
                    )
                value = knobs[key]
            found[name] = value
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Hold a weighted sum of terms; build one with ``parse_loss``."""

    terms: tuple[Term, ...]

    def of_kind(self, *kinds: Kind) -> tuple[Term, ...]:
        """Return the terms of these kinds."""
        return tuple(term for term in self.terms if term.entry.kind in kinds)

    def moving(self) -> dict[str, Ramp | str]:
        """Return what follows the run: by knob, its ramp or its word (``adaptive``)."""
        return {
            f"{term.entry.name}.{name}": value
            for term in self.terms
            for name, value in term.arguments.items()
            if _moves(value)
        }

    def with_argument(self, knob: str, value: float) -> Loss:
        """Return the loss with ``NAME.ARGUMENT`` set."""
        name, _, argument = knob.partition(".")
        return Loss(
            terms=tuple(
                dataclasses.replace(term, arguments={**term.arguments, argument: value})
                if term.entry.name == name
                else term
                for term in self.terms
            )
        )

    @property
    def needs_teacher(self) -> bool:
        """Return whether any term compares with a teacher."""
        return any(term.entry.inputs != ("student_logits", "targets") for term in self.terms)

    def rows(
        self,
        student_logits: Array,
        teacher: Array | TopK | None,
        targets: Array,
        knobs: Mapping[str, Array],
        *,
        top_k: int = 0,
    ) -> Array:
        """Return the weighted sum of the divergences of each row, ``[N]``.

        Args:
            student_logits: ``[N, V]``.
            teacher: ``[N, V]`` logits, or what was kept of them, or None.
            targets: ``[N]`` token ids.
            knobs: see ``moving``.
            top_k: see the whole teacher through its k likeliest tokens and a tail; 0 for all of it.
        """
        total = jnp.zeros(student_logits.shape[0], jnp.float32)
        for term in self.of_kind("divergence"):
            arguments = term.given(knobs)
            needs, temperature = term.entry.inputs, arguments.get("temperature", 1.0)
            z_student, guide = student_logits, teacher
            if "teacher_logits" in needs and "targets" not in needs:
                if top_k and not isinstance(guide, TopK) and guide is not None:
                    guide = top_k_of(guide, top_k, temperature)
                if isinstance(guide, TopK):
                    z_student, guide = with_tail(student_logits, guide, temperature)
            elif "teacher_logits" in needs and isinstance(guide, TopK):
                raise UserError(
                    f"{term.entry.name} needs the teacher's probability of every token, and a "
                    "cached teacher holds its likeliest alone; give a live teacher"
                )
            inputs = {"student_logits": z_student, "teacher_logits": guide, "targets": targets}
            total = total + term.weight * term.entry.function(
                *(inputs[name] for name in needs), **arguments
            )
        return total


def _value(text: str, where: str) -> Any:
    """Read a number, a ramp ``a..b`` or a word."""
    numbers = text.split("..")
    try:
        found = [float(x) for x in numbers]
    except ValueError:
        if re.fullmatch(r"[a-z_]+", text):
            return text
        raise UserError(
            f"{where} is {text!r}; accepted: a number, a ramp such as 4..1, or a word"
        ) from None
    if not all(map(math.isfinite, found)) or len(found) > 2:
        raise UserError(f"{where} is {text!r}; accepted: a finite number, or a ramp such as 4..1")
    return found[0] if len(found) == 1 else Ramp(*found)


def parse_term(text: str, *kinds: Kind) -> Term:
    """Read ``[WEIGHT*]NAME[:ARGUMENT=VALUE,...]``; see ``parse_loss``."""
    match = _TERM.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{text!r} is not an objective; accepted: {GRAMMAR}")
    weight = _value((match["weight"] or "1").strip(), f"the weight of {match['name']}")
    if not isinstance(weight, float):
        raise UserError(f"the weight of {match['name']} is {match['weight']!r}; accepted: a number")
    entry = entry_of(match["name"], *kinds)
    if match["weight"] and entry.kind in _STILL:
        raise UserError(f"{entry.name} is a {entry.kind}, which takes no weight, got {text!r}")
    arguments: dict[str, Any] = {}
    for pair in (match["arguments"] or "").split(",") if match["arguments"] else ():
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"{pair!r} in {text!r} is no argument; accepted: {GRAMMAR}")
        if name in arguments:
            raise UserError(f"{name!r} stands twice in {text!r}; give it once")
        arguments[name] = _value(value, f"{entry.name}:{name}")
    measured = MEASURED.get(entry.name, {})
    entry.check(measured | arguments)
    for name, value in arguments.items():
        _check_value(entry, name, value, measured.get(name))
    return Term(entry=entry, weight=weight, arguments=measured | arguments)


def _check_value(entry: Entry, name: str, value: Any, word: str | None) -> None:
    """Raise ``UserError`` where a value is of the wrong sort or out of bounds."""
    default = entry.arguments[name]
    if isinstance(default, str) != isinstance(value, str) and value != word:
        number = "a number, a ramp such as 4..1" + f", or {word}" * bool(word)
        accepted = f"a word such as {default}" if isinstance(default, str) else number
        shown = "a ramp" if isinstance(value, Ramp) else value
        raise UserError(f"{entry.name}:{name} is {shown}; accepted: {accepted}")
    if isinstance(value, Ramp) and (name == "heads" or entry.kind in _STILL):
        raise UserError(f"{entry.name}:{name} is a ramp; accepted: one number for the whole run")
    bounds, holds = _BOUNDS.get(name, ("", lambda x: True))
    for x in value if isinstance(value, Ramp) else (value,):
        if x != word and not holds(x):
            raise UserError(f"{entry.name}:{name} is {x}; accepted: {bounds}")
    idle = _IDLE.get((entry.name, name))
    if value == idle or (isinstance(value, Ramp) and set(value) == {idle}):
        raise UserError(f"{entry.name}:{name} is {idle}, where {entry.name} does nothing")


_STILL: tuple[Kind, ...] = ("token_weight", "mixture", "correction")

# What an argument of this name may be, whichever objective's it is.
_BOUNDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("above 0", lambda x: x > 0),
    "scale": ("above 0", lambda x: x > 0),
    "power": ("0 or more", lambda x: x >= 0),
    "share": ("from 0 to below 1", lambda x: 0 <= x < 1),
    "heads": ("a whole number from 1", lambda x: x >= 1 and x == int(x)),
    "align": ("spans or index", lambda x: x in ("spans", "index")),
    "layers": ("uniform or last", lambda x: x in ("uniform", "last")),
}
for _name in ("alpha", "beta", "confidence", "first", "head", "t"):
    _BOUNDS[_name] = ("from 0 to 1", lambda x: 0 <= x <= 1)

# Where a function, though defined, leaves nothing to train by or changes nothing.
_IDLE: dict[tuple[str, str], float] = {
    ("skew_forward_kl", "alpha"): 1.0,
    ("skew_reverse_kl", "alpha"): 1.0,
    ("taid", "t"): 0.0,
    ("certainty", "power"): 0.0,
    ("uncertainty", "power"): 0.0,
    ("label_mix", "share"): 0.0,
}

# What the run itself finds out, where the user gives no number.
MEASURED: dict[str, dict[str, str]] = {
    "taid": {"t": "adaptive"},
    "cakld": {"confidence": "measured"},
}


def parse_loss(text: str, *kinds: Kind) -> Loss:
    """Read a weighted sum of registered objectives.

    Args:
        text: ``forward_kl``, ``jsd:beta=0.1``, ``0.9*forward_kl:temperature=2+0.1*ce``; a value
            ``a..b`` goes linearly from a to b over the run.
        kinds: those that are accepted; all by default.

    Raises:
        UserError: a name or an argument is unknown, a value is of the wrong sort or out of bounds,
            or what must be one of its name stands twice: a term on states, for its projections, and
            one with an argument that moves, for its knob.
    """
    terms = [parse_term(part, *kinds) for part in _PLUS.split(text)]
    names = [term.entry.name for term in terms]
    for term in terms:
        alone = term.entry.kind == "states" or any(map(_moves, term.arguments.values()))
        if alone and names.count(term.entry.name) > 1:
            raise UserError(
                f"{term.entry.name} stands twice in {text!r}; give it once, or only with arguments "
                "that do not change as the run goes on"
            )
    return Loss(terms=tuple(terms))
