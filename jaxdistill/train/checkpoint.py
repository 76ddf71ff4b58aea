"""Orbax checkpoints of the training state and its place in the data: async, atomic, last n kept."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxdistill._disk import PAUSES, errno_of, is_full, is_passing, reason_of
from jaxdistill._orbax import prepare_orbax, read_back
from jaxdistill.errors import UserError
from jaxdistill.train.manifest import damage, seal_checkpoint
from jaxdistill.train.preemption import agreed
from jaxdistill.train.run_directory import no_space

_policies = ocp.training.preservation_policies
_HALF = "*.orbax-checkpoint-tmp*"
_TRIES, _PAUSE = 50, 0.02  # to remove it, and seconds between them


class Checkpoints(contextlib.AbstractContextManager):
    """Save and restore the states of one run; leaving the context waits for the last save.

    The data's place is the step (batch i is a pure function of data, seed and i) and the number of
    batches that rollbacks left out, so a checkpoint holds the state and, as metadata, that number
    and the fingerprint of the data. Its manifest of checksums is written before it is given its
    name: a checkpoint that is there was whole. The one before is deleted after that. The first one
    of a process is read back and compared before training continues.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        prepare_orbax()
        self.directory = directory.resolve()
        self._failures, self._proved = 0, False
        self._response: Any = None  # of the save under way
        self._metadata: dict[str, Any] = {}

        def finalize() -> None:  # no method: orbax copies what it is given, and its object too
            self._seal()

        try:
            self._orbax = ocp.training.Checkpointer(
                str(self.directory),
                # orbax's own policies do not match its protocol: the argument's type is narrower.
                preservation_policy=_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
                context=ocp.Context(
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=finalize),
                    # Floats get 8 % smaller by it, and saving takes ten times the processor time.
                    array_options=ocp.options.ArrayOptions(
                        saving=ocp.options.ArrayOptions.Saving(use_compression=False)
                    ),
                ),
            )
            _ = self._orbax.latest
        except Exception as e:  # it reads what every checkpoint says of itself
            raise UserError(
                f"the checkpoints in {self.directory} cannot be read ({reason_of(e)}); delete the "
                "damaged one, or start again in another --out"
            ) from None

    def __exit__(self, kind: object, *_: object) -> None:
        failed = self.settle()
        self._orbax.close()
        if failed is not None and kind is None:
            raise self._lost(failed)

    @property
    def latest(self) -> int | None:
        """Return the last whole checkpoint's step, None where there is none."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(
        self, step: int, state: Any, fingerprint: str, *, skipped: int = 0, wait: bool = False
    ) -> None:
        """Start to save, after the save before; training may at once go on and donate the state.

        A save that fails in a way that may pass is tried up to three times: at once where it fails
        here, by the next one where it failed in the background.

        Args:
            step: of the state.
            state: what is saved.
            fingerprint: of the data.
            skipped: batches left out so far.
            wait: return when it is on disk; the first save of a process always is.

        Raises:
            UserError: it cannot be written; what was saved before is kept.
        """
        failed = self.settle()  # unforced, orbax leaves out a save while another is under way
        for pause in (*PAUSES, None):
            if failed is None:
                self._metadata = {"data": fingerprint, "skipped": skipped}
                try:
                    self._response = self._orbax.save_async(
                        step, state, force=True, custom_metadata=self._metadata
                    )
                except Exception as e:  # orbax and tensorstore raise many kinds
                    failed = self._cleared(e)
                else:
                    failed = self.settle() if wait or not self._proved else None
                    if failed is None:
                        self._prove(step, state)
                        return
            self._failures += 1
            if not is_passing(failed) or pause is None or self._failures > len(PAUSES):
                raise self._lost(failed)
            time.sleep(pause)
            failed = None

    def _prove(self, step: int, state: Any) -> None:
        """Read the first checkpoint back; a later one is written in the same way."""
        if self._proved:
            return
        problem = read_back(lambda abstract: self._orbax.load(step, abstract), state)
        if problem is not None:
            raise UserError(
                f"checkpoint {self.directory / str(step)} was written and does not read back "
                f"({problem}); choose another --out"
            )
        self._proved = True

    def settle(self) -> Exception | None:
        """Wait for the save under way; return the error of one that failed, and clear it away."""
        response, self._response = self._response, None
        if response is None:
            return None
        failed = None
        # The first ends the thread and the event loop of this save; both raise its error.
        for wait in (response.result, self._orbax.wait):
            try:
                wait()
            except Exception as e:
                failed = failed or e
        if failed is not None:
            return self._cleared(failed)
        self._failures = 0
        return None

    def skipped(self, step: int) -> int:
        """Return how many batches had been left out when a checkpoint was saved."""
        return int(dict(self._orbax.metadata(step).custom_metadata or {}).get("skipped", 0))  # pyright: ignore

    def restore(self, like: Any, fingerprint: str) -> Any:
        """Return the last state, shaped and placed as ``like``.

        Raises:
            UserError: the checkpoint is cut off, of another model, or its data are not these.
        """
        step = self.latest
        where = self.directory / str(step)
        try:
            found = self._orbax.metadata(step)
            saved = dict(found.custom_metadata or {}).get("data")  # pyright: ignore
            if not jax.tree.leaves(found.metadata):
                raise ValueError("its description is cut off")
            if _shapes(found.metadata) != _shapes(like):
                raise ValueError("it is of another model or optimizer")
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
            )
            state = self._orbax.load(step, abstract)
        except Exception as e:  # orbax and tensorstore raise many kinds for a damaged directory
            raise UserError(
                f"checkpoint {where} cannot be restored ({reason_of(e)}); delete that directory to "
                "resume from the one before, or start again in another --out"
            ) from None
        if saved != fingerprint:
            raise UserError(
                f"checkpoint {where} was trained on data {saved}, these are {fingerprint}; resume "
                "with the same --data, --seq-len and tokenizer"
            )
        return state

    def _seal(self) -> None:
        """Write the manifest into what is about to become a checkpoint; orbax calls it then."""
        for half in self.directory.glob(_HALF):
            seal_checkpoint(half, self._metadata)

    def _cleared(self, error: Exception) -> Exception:
        """Return a failed save's error, its half-written files removed."""
        for _ in range(_TRIES if jax.process_index() == 0 else 0):
            for half in self.directory.glob(_HALF):  # another write of the save may still add to it
                shutil.rmtree(half, ignore_errors=True)
            if not any(self.directory.glob(_HALF)):
                break
            time.sleep(_PAUSE)
        # Orbax has struck off what a whole save would have replaced.
        self._orbax.reload()
        return error

    def _lost(self, error: Exception) -> Exception:
        """Return what a save's error means to the user; errors that are no disk's are returned."""
        if errno_of(error) is None:
            return error
        if is_full(error):
            return UserError(no_space(self.directory.parent, error))
        last = "no checkpoint" if self.latest is None else f"checkpoint {self.latest}"
        return UserError(
            f"{self.directory} cannot be written ({reason_of(error)}); {last} is kept; look at the "
            "disk, then go on with --resume"
        )


def recover(directory: Path, say: Callable[[str], None] = print) -> int | None:
    """Return the last whole checkpoint's step, None where there is none.

    Damaged ones after it are moved to ``damaged-checkpoints`` beside the directory. It comes before
    ``Checkpoints``: orbax does not open a directory with a damaged description.

    Args:
        directory: of the checkpoints.
        say: is told of each damaged one, in a line.

    Raises:
        UserError: there are checkpoints and all are damaged; they stay where they are.
    """
    directory = directory.resolve()
    first, bad, kept = jax.process_index() == 0, {}, None
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    for step in sorted(steps, reverse=True):
        reason = damage(directory / str(step)) if first else None
        if not agreed(reason is not None):
            kept = step
            break
        bad[step] = reason
    if bad and kept is None:
        step, reason = next(iter(bad.items()))
        raise UserError(
            f"checkpoint {directory / str(step)} is damaged ({reason}) and none before it is "
            "whole; start again in another --out"
        )
    for step, reason in bad.items():
        aside = directory.parent / "damaged-checkpoints" / str(step)
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (directory / str(step)).rename(aside)
            say(
                f"checkpoint {step} is damaged ({reason}): moved to {aside}; going on from "
                f"checkpoint {kept}"
            )
    agreed(bool(bad))  # all wait for the first process
    return kept


def _shapes(tree: Any) -> list[str]:
    """Return every leaf's shape and type, in no order of the tree's own."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return sorted(f"{tuple(x.shape)} {x.dtype}" for x in leaves)
