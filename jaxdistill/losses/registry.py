"""The registry of objectives by name: what each is, what it takes, and where it comes from.

A function that is registered says by its parameters' names what it needs; those after the ``*`` are
the arguments that a user may give. Where one has no default, it must be given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxdistill.errors import UserError

Kind = Literal["divergence", "states", "cross_tokenizer", "token_weight", "mixture", "correction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Describe one registered function.

    Attributes:
        name: what the user writes.
        kind: which place of an objective it fits.
        function: the function itself.
        formula: in plain text, p the teacher and q the student.
        source: paper or other origin.
        when: what it is good for.
        cost: what it costs beyond both models' forward passes.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    formula: str
    source: str
    when: str
    cost: str

    @property
    def summary(self) -> str:
        """Return the first line of the function's docstring."""
        return inspect.getdoc(self.function).partition("\n")[0]  # pyright: ignore

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return what the function must be handed: the names of its positional parameters."""
        return tuple(p.name for p in self._parameters() if p.kind is not p.KEYWORD_ONLY)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the user's arguments and their defaults; ``inspect.Parameter.empty`` for none."""
        return {p.name: p.default for p in self._parameters() if p.kind is p.KEYWORD_ONLY}

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise ``UserError`` where an argument is unknown or a needed one is missing."""
        accepted = self.arguments
        unknown = [name for name in given if name not in accepted]
        if unknown:
            names = ", ".join(accepted) or "no argument"
            raise UserError(f"{self.name} has no argument {unknown[0]!r}; accepted: {names}")
        for name, default in accepted.items():
            if default is inspect.Parameter.empty and name not in given:
                raise UserError(
                    f"{self.name} needs its argument {name!r}; write {self.name}:{name}=VALUE"
                )


REGISTRY: dict[str, Entry] = {}


def register(
    kind: Kind, *, formula: str, source: str, when: str, cost: str, name: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that enters a function under its own name, or under ``name``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = Entry(
            name=name or function.__name__,
            kind=kind,
            function=function,
            formula=formula,
            source=source,
            when=when,
            cost=cost,
        )
        assert entry.name not in REGISTRY, f"{entry.name} is registered twice"
        REGISTRY[entry.name] = entry
        return function

    return enter


def entry_of(name: str, *kinds: Kind) -> Entry:
    """Return the entry of a name; raise ``UserError`` where there is none of these kinds."""
    entry = REGISTRY.get(name)
    if entry is None or (kinds and entry.kind not in kinds):
        names = sorted(n for n, e in REGISTRY.items() if not kinds or e.kind in kinds)
        raise UserError(
            f"no {' or '.join(kinds) or 'objective'} is named {name!r}; accepted: "
            f"{', '.join(names)}; see `jaxdistill objectives`"
        )
    return entry
