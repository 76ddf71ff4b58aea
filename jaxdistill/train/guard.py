"""The guard over a run's losses: NaN and spikes stop it, or send it back to go on with other data.

Going back is PaLM's remedy (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): the run starts
again from a checkpoint before the spike and skips the batches since. The bound is that of OLMo's
skip-step optimizer, a number of deviations above a window of 128 losses, with median and absolute
deviation in place of mean and standard deviation, which one spike cannot move.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Literal

from jaxdistill.errors import UserError
from jaxdistill.train.run_directory import RunDirectory, append_row, read_metrics

WINDOW = 128
LEAST = 64  # losses in the window before a finite one can be a spike
MOST = 3  # rollbacks in a run
LOG = "rollbacks.jsonl"

OnSpike = Literal["stop", "rollback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Say what a run does about a loss that is NaN, infinite or far above the ones before.

    Attributes:
        on_spike: ``stop`` ends the run, its last checkpoint kept. ``rollback`` goes back to it, and
            on with the batches after the bad one; at most three times.
        spike_sigma: a loss this many robust standard deviations (1.4826 times the median absolute
            deviation) above the median of the last 128 is a spike too; 0 for NaN and infinity
            alone. Tens are loose: an ordinary run never sees them.
    """

    on_spike: OnSpike = "stop"
    spike_sigma: float | int = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.spike_sigma < math.inf:
            raise UserError(f"--spike-sigma {self.spike_sigma} given; accepted: 0 or more")


def _first_cause(values: Mapping[str, float | int]) -> str:
    """Tell what is not finite first, in the order in which a step computes it."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if "nll" in bad:
        return "the student's logits are not finite"
    if "kl" in bad:
        return "the teacher's logits are not finite, or the divergence of the student's from them"
    last = {"loss": 1, "grad_norm": 2}
    first = min(bad, key=lambda name: last.get(name, 0))
    if first == "grad_norm":
        return "the loss is finite, its gradient is not"
    return f"{first} is not finite"


class Watch:
    """Watch one run's losses, and count the batches that its rollbacks left out.

    Everything it knows lies in the run's logs and checkpoints, so a resumed run judges as the
    uninterrupted one would: batch ``step + skipped`` makes step ``step + 1``.
    """

    def __init__(self, guard: Guard, run: RunDirectory) -> None:
        self.guard, self.run = guard, run
        self.skipped = self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def take_up(self, step: int, skipped: int) -> None:
        """Go on from a checkpoint: drop what the logs hold of later steps, and read the rest.

        Args:
            step: of the checkpoint.
            skipped: kept with it; a rollback to it, logged since, counts too.
        """
        self.run.rewind(step)
        rows = read_metrics(self.run.path, LOG)
        self.rollbacks = len(rows)
        self.skipped = max([skipped, *(row["skipped"] for row in rows)])
        self._losses.clear()
        rows = read_metrics(self.run.path)
        self._losses.extend(row["loss"] for row in rows if "loss" in row)

    def problem(self, values: Mapping[str, float | int]) -> str | None:
        """Say what is wrong with a step's loss or gradient; None, and remember it, if nothing.

        A step without a target has no loss.
        """
        norm = float(values["grad_norm"])
        if "loss" not in values:
            return None if math.isfinite(norm) else f"gradient norm {norm}"
        loss = float(values["loss"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm} ({_first_cause(values)})"
        if self.guard.spike_sigma and len(self._losses) >= LEAST:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(x - median) for x in self._losses)
            # Losses that hardly differ: a hundredth of the median is no spike.
            sigma = max(1.4826 * spread, 0.01 * abs(median))
            if loss > (bound := median + self.guard.spike_sigma * sigma):
                return f"loss {loss:.4g}, above {bound:.4g} by {len(self._losses)} before it,"
        self._losses.append(loss)
        return None

    def go_back(self, failed: int, problem: str, kept: int | None, within: bool = True) -> str:
        """Log a rollback and return a line that says so.

        Args:
            failed: the step that was bad.
            problem: what was bad.
            kept: the last checkpoint; None where there is none.
            within: it is one that the run can go back to, and not of another optimizer, as at the
                border of a freeze window.

        Raises:
            UserError: the run shall stop, or must.
        """
        where = f"{problem} at step {failed}"
        last = "no checkpoint was saved yet" if kept is None else f"checkpoint {kept} is kept"
        again = "lower --lr or look at the data, then start again in another --out"
        if self.guard.on_spike == "rollback" and self.rollbacks >= MOST:
            raise UserError(f"{where}, after {MOST} rollbacks; {last}; {again}")
        if self.guard.on_spike == "rollback" and kept is not None and within:
            skipped = self.skipped + failed - kept
            row = {"step": kept, "failed": failed, "problem": problem, "skipped": skipped}
            append_row(self.run.path / LOG, row)
            return (
                f"{where}: back to checkpoint {kept}, and on without the {failed - kept} batches "
                f"since (rollback {self.rollbacks + 1} of {MOST})"
            )
        if kept is not None and self.guard.on_spike == "stop":
            again = f"go on without the batches since by --resume --on-spike rollback, or {again}"
        raise UserError(f"{where}; {last}; {again}")
