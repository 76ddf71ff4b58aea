"""The device mesh, and the few places where a computation says how it lies on it.

A mesh has three axes. ``data`` holds copies of the model that read other rows. ``fsdp`` divides
rows and every large parameter (fully sharded data parallelism, arXiv 2304.11277): a layer's weights
are gathered when it runs. ``tensor`` divides heads and hidden units (arXiv 1909.08053), so that a
layer's products are made in parts. The partitioning itself is XLA's (GSPMD, arXiv 2105.04663); here
stands only what it must be told. Without a mesh nothing here does anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill.errors import UserError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
ROWS = (DATA, FSDP)  # what a batch's rows are divided among
VOCABULARY = (FSDP, TENSOR)  # and the rows of the two vocabulary tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Say how many devices lie along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise UserError(f"a mesh with {name}={size} given; accepted: 1 or more")

    @property
    def size(self) -> int:
        """Return the number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def row_shards(self) -> int:
        """Return the number of parts that a batch's rows are divided into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())


def parse_mesh(text: str) -> MeshShape:
    """Read ``data=2,fsdp=4,tensor=1``; an axis that is left out has size 1.

    Raises:
        UserError: the text says something else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or name in sizes:
            raise UserError(
                f"mesh {text!r} given; accepted: {', '.join(f'{axis}=N' for axis in AXES)}, each "
                "at most once and at least 1, as in data=2,fsdp=4"
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of all devices, or of those given.

    Raises:
        UserError: there are more or fewer devices than the shape holds.
    """
    found = len(jax.devices() if devices is None else devices)
    if found != shape.size:
        raise UserError(
            f"a mesh {shape} of {shape.size} devices given, and there are {found}; accepted: sizes "
            "whose product is the number of devices"
        )
    sizes = (shape.data, shape.fsdp, shape.tensor)
    # Explicit axes, JAX's default, would put the sharding into every array's type.
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Let what is computed inside lie on a mesh; None for the default device."""
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield


def present_mesh() -> Mesh | None:
    """Return the mesh that is computed on, see ``on_mesh``; None without one, and while tracing."""
    mesh = jax.sharding.get_mesh()
    return mesh if isinstance(mesh, Mesh) and not mesh.empty else None


def axis_size(axes: str | Sequence[str]) -> int:
    """Return the number of parts along axes of the present mesh, 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(dict(mesh.shape).get(name, 1) for name in names)


def constrain(x: Any, *axes: str | Sequence[str] | None) -> Any:
    """Say how an array's axes are divided on the present mesh; without one, return it as it is.

    Args:
        x: any array, traced.
        axes: of each axis of ``x`` the mesh axes that divide it, None for whole. Axes of ``x``
            beyond those given are whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    entries = [tuple(axis) if isinstance(axis, (list, tuple)) else axis for axis in axes]
    return lax.with_sharding_constraint(x, PartitionSpec(*entries))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return how a batch is divided: its rows among ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


class HostRows(dict[str, Any]):
    """Hold those rows of a batch that this host's devices hold, ``name -> [n, ...]``.

    Attributes:
        index: which rows of the batch they are, rising.
        batch_size: B, the rows of all hosts together.
    """

    def __init__(self, arrays: Mapping[str, Any], index: np.ndarray, batch_size: int) -> None:
        super().__init__(arrays)
        self.index, self.batch_size = index, batch_size


def rows_of_devices(mesh: Mesh, batch_size: int, devices: Collection[Any]) -> np.ndarray:
    """Return which rows of a batch lie on some devices of a mesh, rising."""
    held = row_sharding(mesh).devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[held[d]] for d in mesh.devices.flat if d in devices]))


def own_rows(batch_size: int) -> np.ndarray:
    """Return which rows of a batch this host's devices hold: on one host, and without a mesh, all.

    So it is too where the rows cannot be divided, and go whole to each device.
    """
    mesh = present_mesh()
    if mesh is None or jax.process_count() == 1 or batch_size % axis_size(ROWS):
        return np.arange(batch_size)
    return rows_of_devices(mesh, batch_size, set(jax.local_devices()))


def place_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch's arrays ``[B, ...]`` on the present mesh; as it is without one.

    Every host gives the same batch, or its own rows of it (``HostRows``), and hands these alone to
    its devices. An array that is no batch of rows (of no axis, or of a number of rows that cannot
    be divided) goes whole to each.
    """
    mesh = present_mesh()
    if mesh is None:
        return batch

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        divides = x.ndim and x.shape[0] % axis_size(ROWS) == 0
        sharding = row_sharding(mesh) if divides else NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def put_own(x: Any) -> jax.Array:
        x, own = np.asarray(x), cast(HostRows, batch)

        def part(index: Any) -> np.ndarray:
            wanted = np.arange(own.batch_size)[index[0]]
            return x[np.searchsorted(own.index, wanted)][(slice(None), *index[1:])]

        shape = (own.batch_size, *x.shape[1:])
        return jax.make_array_from_callback(shape, row_sharding(mesh), part)

    return jax.tree.map(put_own if isinstance(batch, HostRows) else put, dict(batch))


def check_rows(batch_size: int, shape: MeshShape, accumulate: int = 1) -> None:
    """Raise ``UserError`` unless a (micro-)batch's rows can be divided evenly."""
    parts = shape.row_shards * accumulate
    if batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} and --accumulate {accumulate} given with --mesh {shape}, "
            f"which divides rows into {shape.row_shards}; accepted: a multiple of {parts} rows"
        )


def is_primary() -> bool:
    """Return whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def fetch(x: Any) -> np.ndarray:
    """Return an array as numpy on every host; all processes must call this in the same order."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def wait_for_all(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def on_every_host(found: bool) -> bool:
    """Return whether something holds on every host, such as a file that each looks for."""
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.int32(found))))


def on_primary(do: Callable[[], None], name: str) -> None:
    """Let the first process do something that the others wait for; its failure is theirs too.

    Raises:
        UserError: what the first process raised; elsewhere, that it did.
    """
    if jax.process_count() == 1:
        return do()
    from jax.experimental import multihost_utils

    error: BaseException | None = None
    if is_primary():
        try:
            do()
        except BaseException as e:  # told to the others first, who would wait for ever
            error = e
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the first process could not {name}; its own message says why")
