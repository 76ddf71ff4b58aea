"""Products by packed weights: the kernel interpreted, and compiled for a GPU without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxdistill.quant.held import held_product, held_values, hold
from jaxdistill.quant.lattice import QuantSpec, quantize
from jaxdistill.quant.packed_matmul import MOST_ROWS, fits, packed_matmul
from jaxdistill.quant.ranges import choose_grid


def held(symmetric=True, group=None, shape=(192, 96)):
    spec = QuantSpec(bits=4, symmetric=symmetric, group_size=group, ranges="absmax")
    w = jax.random.normal(jax.random.key(0), shape) + 0.3
    grid = choose_grid(w, spec, -2)
    return hold(quantize(w, grid, spec, -2), *grid, axis=-2, packed=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_product_is_that_of_the_values(symmetric, group, dtype):
    """96 outputs are packed in 48 rows, three programs of 16; of 192 inputs 64 are read at once."""
    w = held(symmetric, group)
    values = np.asarray(held_values(w).astype(dtype).astype(jnp.float32), np.float64)
    for rows in (1, 5, MOST_ROWS):
        x = jax.random.normal(jax.random.key(rows), (rows, 192)).astype(dtype)
        assert fits(x, w.q, w.scale)
        got = packed_matmul(x, *w, interpret=True)
        want = np.asarray(x.astype(jnp.float32), np.float64) @ values.T
        assert got.shape == (rows, 96) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_it_is_lowered_for_a_gpu():
    """For CUDA and an H100, on a machine without one."""
    kind = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    with use_abstract_mesh(mesh):
        traced = jax.jit(packed_matmul).trace(jnp.ones((1, 192), jnp.bfloat16), *held())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


def branches(x, w):
    """Returns what ``held_product`` does on the platforms it knows."""
    return str(jax.make_jaxpr(held_product)(x, w))


def test_a_gpu_gets_the_kernel_for_few_rows_of_packed_weights():
    x = jnp.ones((1, 192), jnp.bfloat16)
    assert branches(x, held()).count("name=packed_matmul") == 1
    assert "packed_matmul" not in branches(jnp.ones((MOST_ROWS + 1, 192)), held())
    assert "packed_matmul" not in branches(x, held(shape=(192, 24)))  # 12 packed rows: 4 at a time
    one_a_byte = held()._replace(q=held_values(held()).astype(jnp.int8))
    assert "packed_matmul" not in branches(x, one_a_byte)
    for platform in ("cpu", "tpu"):
        traced = jax.jit(held_product).trace(x, held())
        assert "triton" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_mesh_keeps_to_what_xla_can_divide():
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "packed_matmul" not in branches(jnp.ones((1, 192)), held())
