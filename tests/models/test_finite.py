"""Weights that are not numbers: refused by the one way in, whatever the model is stored as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.export.gguf import write_gguf
from jaxdistill.models.finite import check_finite
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import load_model
from jaxdistill.models.quantized import save_quantized
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params
from tests import tiny
from tests.stored import changed, node_of

C = tiny.config(vocab_size=260)


def spoiled(params, path: str, at: tuple[int, ...], value: float):
    """A copy of params with one weight changed."""
    leaf = np.array(node_of(params, path))
    leaf[at] = value
    return changed(params, path, leaf)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_directory_with_a_bad_weight_is_refused(value, dtype, tmp_path):
    params = spoiled(tiny.params(C), "layers/mlp/up_proj/kernel", (1, 3, 5), value)
    params = spoiled(params, "norm/weight", (0,), value)
    save_hf(tmp_path / "m", C, params, dtype=dtype)
    with pytest.raises(UserError, match=r"m has 2 weights .* in 2 of its arrays, the first in lay"):
        load_model(tmp_path / "m")


def test_a_gguf_file_with_a_bad_weight_is_refused(tmp_path):
    params = spoiled(tiny.params(C), "layers/mlp/down_proj/kernel", (1, 3, 5), np.nan)
    write_gguf(tmp_path / "m.gguf", C, params, tiny.byte_tokenizer())
    with pytest.raises(UserError, match="has 1 weights .*mlp/down_proj/kernel of layer 1"):
        load_model(tmp_path / "m.gguf")


def test_a_quantized_student_with_a_bad_scale_is_refused(tmp_path):
    policy = default_policy(QuantSpec(group_size=32), tied=True)
    stored = quantize_params(add_scales(tiny.params(C), policy), policy)
    stored = spoiled(stored, "layers/self_attn/v_proj/kernel_scale", (0, 1, 2), np.inf)
    save_quantized(tmp_path / "m", C, stored, tiny.byte_tokenizer(), policy)
    with pytest.raises(UserError, match="v_proj/kernel_scale of layer 0"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_large_finite_weights_are_weights(make):
    check_finite({"w": make(np.full((2, 8, 8), 3e38, np.float32)), "q": make([1, 2])}, "m")


def test_weights_on_a_mesh_are_counted_once():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    weights = jax.device_put(jnp.ones((16, 4)).at[3, 2].set(jnp.nan), spread)
    with pytest.raises(UserError, match="has 1 weights"):
        check_finite({"w": weights}, "m")
