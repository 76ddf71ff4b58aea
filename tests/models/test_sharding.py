"""Where parameters lie: every one by the table, and read straight into its place."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.step import adamw, init_state
from jaxdistill.mesh import MeshShape, make_mesh, on_mesh
from jaxdistill.models.hf import load_hf, save_hf
from jaxdistill.models.hub import load_model
from jaxdistill.models.quantized import load_quantized, save_quantized
from jaxdistill.models.safetensors import SafetensorsFile
from jaxdistill.models.sharding import make_sharded, place, shardings
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params, scale_shapes
from tests import tiny

BOTH = ("fsdp", "tensor")
MESH = MeshShape(data=2, fsdp=2, tensor=2)
CONFIG = tiny.config(tie_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True)
POLICY = default_policy(QuantSpec(bits=4, group_size=32, ranges="absmax"), tied=False)


def specs(tree, layout="sharded"):
    """The spec of every leaf by path, whole axes at the end left out."""
    found = dict(walk(shardings(tree, make_mesh(MESH), layout)))
    return {path: tuple(s.spec) for path, s in found.items()}


def test_every_parameter_lies_by_its_axes():
    found = specs(scale_shapes(tiny.params(CONFIG), POLICY))
    into, out = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    for projection in ("q_proj", "k_proj", "v_proj"):
        assert found[f"layers/self_attn/{projection}/kernel"] == into
        assert found[f"layers/self_attn/{projection}/kernel_scale"] == into
        assert found[f"layers/self_attn/{projection}/bias"] == (None, "tensor")
    assert found["layers/self_attn/o_proj/kernel"] == out
    assert found["layers/mlp/down_proj/kernel"] == out
    assert found["layers/mlp/gate_proj/kernel"] == found["layers/mlp/up_proj/kernel"] == into
    assert found["embed_tokens/embedding"] == (BOTH, None)
    assert found["lm_head/kernel"] == found["lm_head/kernel_scale"] == (None, BOTH)
    whole = [path for path, spec in found.items() if not any(spec)]
    assert all("norm" in path or path.endswith(("o_proj/bias", "down_proj/bias")) for path in whole)


def test_layouts_leave_out_axes():
    params = tiny.params(CONFIG)
    assert specs(params, "tensor")["layers/self_attn/q_proj/kernel"] == (None, None, "tensor")
    assert not any(any(spec) for spec in specs(params, "replicated").values())


def test_an_axis_that_does_not_divide_stays_whole():
    odd = tiny.config(vocab_size=98, intermediate_size=99, tie_embeddings=True)
    policy = default_policy(QuantSpec(bits=4), tied=True)
    found = specs(scale_shapes(tiny.params(odd), policy))
    assert found["embed_tokens/embedding"] == ("fsdp", None)  # 98 is even, no multiple of 4
    assert found["layers/mlp/up_proj/kernel"] == (None, "fsdp", None)
    assert found["layers/mlp/up_proj/kernel_scale"] == (None, None, None)  # one group a channel


def test_the_optimizer_follows_its_parameters():
    tx = ov_freeze(adamw(1e-3, 10))
    with on_mesh(make_mesh(MESH)):
        params = place(tiny.params(CONFIG))
        state = make_sharded(lambda p: init_state(p, tx), params)
    moments = [
        leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "down_proj" in str(keys) and leaf.ndim == 3
    ]
    assert len(moments) == 2
    for leaf in (*moments, state.params["layers"]["mlp"]["down_proj"]["kernel"]):
        assert leaf.sharding.spec == P(None, "tensor", "fsdp")
    assert state.step.is_fully_replicated


@pytest.mark.parametrize("tie", [True, False])
def test_a_directory_is_read_into_its_parts(tmp_path, tie, monkeypatch):
    config = tiny.config(tie_embeddings=tie, qkv_bias=True, o_bias=True)
    params = tiny.params(config)
    save_hf(tmp_path / "m", config, params)
    read = []
    whole = SafetensorsFile.read

    def counted(self, name, rows=slice(None)):
        found = whole(self, name, rows)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    with on_mesh(make_mesh(MeshShape(fsdp=8))):
        _, found = load_hf(tmp_path / "m")
    kernel = found["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 96)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert max(read) <= 4 * 96 * 64  # never more than one layer's tensor at once


def test_a_quantized_model_is_written_and_read_in_parts(tmp_path):
    stored = quantize_params(add_scales(tiny.params(CONFIG), POLICY), POLICY)
    with on_mesh(make_mesh(MESH)):
        save_quantized(tmp_path / "q", CONFIG, place(stored), None, POLICY)
        _, found, _ = load_quantized(tmp_path / "q")
    kernel = found["layers"]["mlp"]["gate_proj"]["kernel_q"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor") and kernel.dtype == "int4"
    jax.tree.map(np.testing.assert_array_equal, found, stored)


def test_a_teacher_may_lie_otherwise(tmp_path):
    path = tiny.save_model(tmp_path / "m")
    with on_mesh(make_mesh(MESH)):
        student, teacher = load_model(path), load_model(path, "replicated")
    pick = lambda model: model.params["layers"]["mlp"]["up_proj"]["kernel"]  # noqa: E731
    assert pick(teacher).is_fully_replicated and not pick(student).is_fully_replicated
