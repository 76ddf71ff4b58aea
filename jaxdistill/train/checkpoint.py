"""Orbax checkpoints of the training state and its place in the data: async, atomic, last n kept."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxdistill.errors import UserError

_policies = ocp.training.preservation_policies


class Checkpoints(contextlib.AbstractContextManager):
    """Save and restore the states of one run; leaving the context waits for the last save.

    The data's place is the step (batch i is a pure function of data, seed and i), so a checkpoint
    holds the state and, as metadata, the fingerprint of the data that the step counts in.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        for name in ("absl", "asyncio"):  # what is wrong comes as an error, and needs no log
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.directory = directory.resolve()
        try:
            self._orbax = ocp.training.Checkpointer(
                str(self.directory),
                # orbax's own policies do not match its protocol: the argument's type is narrower.
                preservation_policy=_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )
            _ = self._orbax.latest
        except Exception as e:  # it reads what every checkpoint says of itself
            raise UserError(
                f"the checkpoints in {self.directory} cannot be read ({_reason(e)}); delete the "
                "damaged one, or start again in another --out"
            ) from None

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """Return the last whole checkpoint's step, None where there is none."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, fingerprint: str) -> None:
        """Start to save, after the save before; training may at once go on and donate the state."""
        # Unforced, orbax leaves out a save that comes while another is under way.
        self._orbax.wait()
        self._orbax.save_async(step, state, force=True, custom_metadata={"data": fingerprint})

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
                f"checkpoint {where} cannot be restored ({_reason(e)}); delete that directory to "
                "resume from the one before, or start again in another --out"
            ) from None
        if saved != fingerprint:
            raise UserError(
                f"checkpoint {where} was trained on data {saved}, these are {fingerprint}; resume "
                "with the same --data, --seq-len and tokenizer"
            )
        return state


def last_checkpoint(directory: Path) -> int | None:
    """Return the step of a run's last whole checkpoint, None where there is none."""
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _shapes(tree: Any) -> list[str]:
    """Return every leaf's shape and type, in no order of the tree's own."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return sorted(f"{tuple(x.shape)} {x.dtype}" for x in leaves)
