"""What a reader of files under test is, and which of its files are damaged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAT = [{"role": "user", "content": "hi  there"}, {"role": "assistant", "content": "12 34é"}]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader under test.

    Attributes:
        makes: each writes one valid set of files into a folder.
        read: reads it, as a recipe would, and uses what it read.
        kinds: file name's ending -> how ``mutate.KINDS`` damages it; others are left alone.
        slow: read by orbax: a tenth of a second an input or more, and its threads print.
        beside: names of files that are not the reader's, and stay whole.
    """

    makes: tuple[Callable[[Path], Any], ...]
    read: Callable[[Path], Any]
    kinds: dict[str, str]
    slow: bool = False
    beside: tuple[str, ...] = ()

    def targets(self, folder: Path) -> list[tuple[Path, str]]:
        """The files of a valid set that are damaged, each with the way of it, in a fixed order."""
        found = []
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name in self.beside:
                continue
            names = [end for end in self.kinds if end and path.name.endswith(end)]
            if not names and "" in self.kinds:
                names = [""]
            if names:
                found.append((path, self.kinds[names[-1]]))
        return found


def each(make: Callable[..., Any], *options: tuple[Any, ...]) -> tuple[Callable[[Path], Any], ...]:
    """A maker for each set of arguments."""
    return tuple(functools.partial(make, *chosen) for chosen in options)
