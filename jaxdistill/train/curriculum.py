"""Easy rows first: batches drawn from a share of the data that grows as the run goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdistill.errors import UserError
from jaxdistill.kd.rows import Rows
from jaxdistill.train.packing import Batch, read_rows


def text_lengths(rows: Rows) -> Float[np.ndarray, "N"]:
    """Return the length of each row's longest text, in tokens.

    Rows packed ``by_length`` hold texts of like lengths.
    """
    longest = [rows[i]["positions"].max() + 1 for i in range(len(rows))]
    return np.array(longest, float)


class CurriculumBatches:
    """Serve batches from the easiest rows, more and more of them (competence, arXiv 1903.09848).

    At step i of a rise over R steps the easiest ``sqrt(start^2 + (1 - start^2) i / R)`` of the rows
    may come, after it all. ``self[i]`` is a pure function of rows, difficulty, seed and i, so a run
    resumes exactly by going on at its step. Of several hosts each reads its own rows.
    """

    def __init__(
        self,
        rows: Any,
        difficulty: Float[np.ndarray, "N"],
        *,
        batch_size: int,
        seed: int,
        rise: int,
        start: float = 0.2,
    ) -> None:
        """Order the rows.

        Args:
            rows: ``rows[i]`` gives a dict of arrays ``[T]``.
            difficulty: of each row, the largest hardest; the mean NLL of a model, say.
            batch_size: B.
            seed: of the draws.
            rise: steps until all rows may come.
            start: share of the rows that the first step draws from, above 0 and at most 1.
        """
        if not 0 < start <= 1 or rise < 0 or len(difficulty) != len(rows):
            raise UserError(
                f"a curriculum from {start} of {len(rows)} rows over {rise} steps, with "
                f"{len(difficulty)} difficulties, given; accepted: a start in (0, 1], steps from "
                "0, one difficulty a row"
            )
        self._rows, self._order = rows, np.argsort(difficulty, kind="stable")
        self._batch_size, self._seed, self._rise, self._start = batch_size, seed, rise, start

    def competence(self, step: int) -> float:
        """Return the share of the rows that a step draws from."""
        if step >= self._rise:
            return 1.0
        return float(np.sqrt(self._start**2 + (1 - self._start**2) * step / self._rise))

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step: rows drawn with replacement from those that may come."""
        known = max(1, round(self.competence(step) * len(self._order)))
        drawn = np.random.default_rng([self._seed, step]).integers(0, known, self._batch_size)
        return read_rows(self._rows, self._order[drawn], per_host=True)
