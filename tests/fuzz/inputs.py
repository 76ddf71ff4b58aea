"""Inputs by number: the same reader, seed and number give the same files."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np

from tests.fuzz.bombs import BOMBS, place
from tests.fuzz.mutate import KINDS, pick
from tests.fuzz.readers import READERS


class Inputs:
    """Makes a reader's valid files once, and any number of damaged copies of them."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.reader, self.root = name, READERS[name], root
        self.bombs = list(BOMBS[name]().items()) if name in BOMBS else []
        self.valid = []
        for number, make in enumerate(self.reader.makes):
            folder = root / "valid" / str(number)
            folder.mkdir(parents=True)
            make(folder)
            self.valid.append(folder)

    def copy(self, number: int) -> Path:
        """A fresh copy of a valid set of files."""
        work = self.root / "work" / "files"
        shutil.rmtree(work.parent, ignore_errors=True)
        shutil.copytree(self.valid[number], work)
        return work

    def bomb(self, number: int) -> tuple[Path, str]:
        """A set with a bomb in it, and what it is."""
        what, files = self.bombs[number]
        work = self.copy(0)
        place(files, work)
        return work, what

    def damaged(self, seed: int, number: int) -> tuple[Path, str]:
        """A damaged set, and which of its files it is."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), number])
        work = self.copy(int(rng.integers(len(self.valid))))
        files = self.reader.targets(work)
        names = []
        count = min(len(files), int(pick(rng, [1, 1, 1, 1, 2])))
        for at in rng.choice(len(files), count, replace=False):
            path, kind = files[at]
            names.append(str(path.relative_to(work)))
            if rng.random() < 0.02:
                path.unlink(missing_ok=True)
                if rng.random() < 0.5:
                    path.mkdir()
                continue
            path.write_bytes(KINDS[kind](rng, path.read_bytes()))
        return work, ", ".join(names)
