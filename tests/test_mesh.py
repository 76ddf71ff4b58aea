"""Meshes: what the user may write, and arrays that come back as they went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdistill.errors import UserError
from jaxdistill.losses.chunked import join_chunks, pad_and_split
from jaxdistill.mesh import (
    HostRows,
    MeshShape,
    axis_size,
    check_rows,
    constrain,
    fetch,
    make_mesh,
    on_mesh,
    parse_mesh,
    place_batch,
    present_mesh,
    rows_of_devices,
)


def test_a_mesh_is_read_and_written_alike():
    shape = parse_mesh("fsdp=4, data=2")
    assert (shape.data, shape.fsdp, shape.tensor, shape.size, shape.row_shards) == (2, 4, 1, 8, 8)
    assert parse_mesh(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "8", "fsdp", "fsdp=x", "fsdp=-1", "rows=2", "data=2,data=4"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(UserError, match=r"accepted: data=N, fsdp=N, tensor=N"):
        parse_mesh(text)


def test_an_axis_of_no_device_is_refused():
    with pytest.raises(UserError, match="tensor=0 given; accepted: 1 or more"):
        parse_mesh("tensor=0")


def test_a_mesh_needs_just_its_devices():
    with pytest.raises(UserError, match=r"of 4 devices given, and there are 8"):
        make_mesh(MeshShape(data=4))


def test_rows_must_divide_evenly():
    check_rows(16, MeshShape(data=2, fsdp=4), accumulate=2)
    with pytest.raises(UserError, match=r"--batch-size 8 .* accepted: a multiple of 16"):
        check_rows(8, MeshShape(data=2, fsdp=4), accumulate=2)


def test_without_a_mesh_nothing_is_said():
    x = jnp.ones((4, 4))
    assert present_mesh() is None
    assert axis_size(("data", "fsdp")) == 1
    assert constrain(x, "data") is x
    assert place_batch({"x": x})["x"] is x


def test_a_constraint_says_where_an_array_lies():
    with on_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        y = jax.jit(lambda x: constrain(x, ("data", "fsdp"), "tensor"))(jnp.ones((8, 4)))
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    assert y.addressable_shards[0].data.shape == (2, 2)


def test_a_batch_is_divided_by_rows_and_else_whole():
    batch = {"tokens": np.arange(32).reshape(8, 4), "odd": np.arange(3), "scalar": np.float32(2)}
    with on_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        placed = place_batch(batch)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 4)
    assert placed["odd"].is_fully_replicated and placed["scalar"].is_fully_replicated
    for name, value in batch.items():
        np.testing.assert_array_equal(fetch(placed[name]), value)


def test_a_host_reads_the_rows_of_its_devices_alone():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    halves = [rows_of_devices(mesh, 8, jax.devices()[at : at + 4]) for at in (0, 4)]
    np.testing.assert_array_equal(halves, [np.arange(4), np.arange(4, 8)])
    # A host that holds a part of every layer of all rows reads all of them.
    across = make_mesh(MeshShape(fsdp=2, tensor=4))
    odd = [d for d in jax.devices() if d.id % 2]
    np.testing.assert_array_equal(rows_of_devices(across, 8, odd), np.arange(8))


def test_rows_of_a_host_take_their_place_in_the_batch(monkeypatch):
    tokens, asked = np.arange(64).reshape(16, 4), []
    mesh = make_mesh(MeshShape(fsdp=8))
    odd = jax.devices()[1::2]  # of a host whose devices lie between another's
    index = rows_of_devices(mesh, 16, odd)
    np.testing.assert_array_equal(index, [2, 3, 6, 7, 10, 11, 14, 15])

    def made(*given):
        asked.append(given)
        return jnp.zeros(given[0])

    monkeypatch.setattr(jax, "make_array_from_callback", made)
    with on_mesh(mesh):
        place_batch(HostRows({"tokens": tokens[index]}, index, 16))
    shape, sharding, part = asked[0]
    assert shape == (16, 4)
    for device in odd:
        held = sharding.devices_indices_map(shape)[device]
        np.testing.assert_array_equal(part(held), tokens[held])


@pytest.mark.parametrize(("rows", "chunk"), [(24, 8), (24, 5), (24, 100), (23, 8)])
def test_chunks_hold_rows_of_every_part_and_come_back_in_order(rows, chunk):
    x = jnp.arange(rows * 2.0).reshape(rows, 2)
    with on_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        chunks = jax.jit(lambda x: pad_and_split(x, chunk))(x)
        back = jax.jit(lambda x: join_chunks(pad_and_split(x, chunk), rows))(x)
    np.testing.assert_array_equal(back, x)
    if rows % 4 == 0:  # four parts of rows: the first chunk begins with the first row of each
        each = chunks.shape[1] // 4
        np.testing.assert_array_equal(chunks[0, ::each], x[:: rows // 4])
