"""Where a recipe runs: on which mesh of devices, and on how many hosts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.mesh import MeshShape, is_primary, make_mesh, on_mesh, parse_mesh
from jaxdistill.recipes.peers import HEARTBEAT, Peers, coordinator

_peers: Peers | None = None  # of the run's processes

Recipe = TypeVar("Recipe", bound=Callable[..., Any])
_HOSTS = "auto, or ADDRESS:PORT,PROCESSES,INDEX as in 10.0.0.1:1234,4,0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """Say which devices a recipe runs on."""

    mesh: str | None = None
    """Devices along each axis, as in data=2,fsdp=4,tensor=1: copies of the model, parts of every
    weight, parts of every layer. auto is fsdp over all devices; by default one device, with --hosts
    auto."""
    hosts: str | None = None
    """Run as one of several processes: auto (SLURM, Kubernetes, TPU pods, Open MPI), or
    ADDRESS:PORT,PROCESSES,INDEX of the first process, their number and this one's. The mesh is over
    the devices of all of them."""


def mesh_shape(o: Parallel) -> MeshShape | None:
    """Return the shape that the options ask for; None for one device.

    Raises:
        UserError: the text is no mesh.
    """
    if o.mesh is None and o.hosts is None:
        return None
    if o.mesh in (None, "auto"):
        return MeshShape(fsdp=jax.device_count())
    return parse_mesh(o.mesh or "")


def join_hosts(hosts: str, heartbeat: float = HEARTBEAT) -> None:
    """Connect this process with the others (``jax.distributed``), before any device is used.

    From then on the process ends within ``heartbeat`` seconds when another one has died.

    Raises:
        UserError: the text is none of the two forms, or the others cannot be reached.
    """
    global _peers
    if jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if hosts != "auto":
        address, *numbers = hosts.split(",")
        if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or ":" not in address:
            raise UserError(f"--hosts {hosts!r} given; accepted: {_HOSTS}")
        count, index = map(int, numbers)
        if index >= count:
            raise UserError(f"--hosts {hosts!r} given: index {index} of {count}, counted from 0")
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=int(2 * heartbeat) + 1)
    except (ValueError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(
            f"--hosts {hosts!r} given, and the processes cannot be joined ({reason}); accepted: "
            f"{_HOSTS}"
        ) from None
    if jax.process_count() > 1:
        _peers = Peers(coordinator(), heartbeat)


def parallel(recipe: Recipe) -> Recipe:
    """Make a recipe run on the mesh and hosts that its options, the first argument, ask for.

    All its arrays then lie where ``models.sharding`` says; only the first process shows progress.
    """

    @functools.wraps(recipe)
    def run(o: Any, console: Console | None = None, **given: Any) -> Any:
        if o.hosts is not None:
            join_hosts(o.hosts)
        shape = mesh_shape(o)
        if not is_primary():
            console = Console(quiet=True)
        try:
            with on_mesh(None if shape is None else make_mesh(shape)):
                return recipe(o, console, **given)
        except (RuntimeError, ValueError) as e:
            if _peers is not None:
                _peers.wait(e)
            raise

    return run  # pyright: ignore[reportReturnType]
