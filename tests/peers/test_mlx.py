"""The MLX directory, opened by MLX and mlx-lm: the same packing, values and logits."""

import json

import numpy as np
import pytest

from jaxdistill.export.leaves import pack_words
from jaxdistill.export.mlx import write_mlx
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hub import load_model
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, dequantize_params, quantize_params
from tests import stored, tiny

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

# Both compute in float32 from equal weights; they sum products in another order.
TOLERANCE = 2e-5
IDS = np.random.default_rng(0).integers(0, 96, (2, 24))


def theirs(directory, ids):
    """Logits of the model as mlx-lm loads it."""
    model = mlx_lm.utils.load_model(directory)[0]
    return np.asarray(model(mx.array(np.asarray(ids))).astype(mx.float32))


def ours(config, params, ids):
    apply = make_apply(config, transform=dequantize_params)
    run = jax.jit(lambda p, t: apply(p, t).logits())
    return np.asarray(run(jax.tree.map(jnp.asarray, params), jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_packing_is_mlxs_own(bits):
    """MLX quantizes; its words, read as integers, pack into the same words here."""
    w = mx.array(np.random.default_rng(bits).normal(size=(6, 128)).astype(np.float32))
    words, scales, biases = mx.quantize(w, group_size=32, bits=bits)
    back = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    scale, bias = (np.repeat(np.asarray(x, np.float64), 32, 1) for x in (scales, biases))
    u = np.round((np.asarray(back, np.float64) - bias) / scale).astype(np.uint8)
    assert u.max() == 2**bits - 1
    assert np.array_equal(pack_words(u, bits), np.asarray(words))


@pytest.mark.parametrize("spec", ["channel", "asymmetric group 32", "8 bits"])
def test_mlx_dequantizes_to_the_very_values(spec, tmp_path):
    config, params = stored.model("untied", spec)
    write_mlx(tmp_path / "out", config, params)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    tensors = mx.load(str(tmp_path / "out" / "model.safetensors"))
    values = stored.values(params)
    modules = {
        f"model.layers.1.{module}": stored.node_of(values["layers"], path)["kernel"][1].T
        for path, module in stored.PROJECTIONS.items()
    }
    for module, want in (modules | {"lm_head": values["lm_head"]["kernel"].T}).items():
        entry = entries.get(module, entries)
        parts = [tensors[f"{module}.{k}"] for k in ("weight", "scales", "biases")]
        got = mx.dequantize(*parts, group_size=entry["group_size"], bits=entry["bits"])
        assert np.array_equal(np.asarray(got), want), module


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("tied", "channel"),
        ("tied", "asymmetric group 32"),
        ("untied", "group 32"),
        ("wide heads", "3 bits"),
        ("wide heads", "asymmetric 8 bits"),
        ("qwen3", "asymmetric channel"),
        ("biases", "8 bits"),
    ],
)
def test_mlx_lm_gives_our_logits(name, spec, tmp_path):
    config, params = stored.model(name, spec)
    write_mlx(tmp_path / "out", config, params)
    want = ours(config, params, IDS)
    difference = np.abs(theirs(tmp_path / "out", IDS) - want).max()
    assert np.abs(want).max() > 0.5  # no flat model
    assert difference / np.abs(want).max() < TOLERANCE


def test_mixed_kinds_of_layers_are_read(tmp_path):
    config, params = stored.model("untied", "channel")
    for path, spec in (("mlp/up_proj", "asymmetric group 32"), ("self_attn/v_proj", "8 bits")):
        part, projection = path.split("/")
        node = stored.node_of(stored.model("untied", spec)[1]["layers"], path)
        params["layers"][part][projection] = node
    kernel = stored.values(params)["layers"]["mlp"]["down_proj"]["kernel"]
    params["layers"]["mlp"]["down_proj"] = {"kernel": kernel}
    write_mlx(tmp_path / "out", config, params)
    want = ours(config, params, IDS)
    difference = np.abs(theirs(tmp_path / "out", IDS) - want).max()
    assert difference / np.abs(want).max() < TOLERANCE


def test_tokenizer_and_chat_template_are_read_with_it(tmp_path):
    config, params = stored.model("bytes", "channel")
    tokenizer = tiny.byte_tokenizer()
    write_mlx(tmp_path / "out", config, params, tokenizer)
    _, again = mlx_lm.load(str(tmp_path / "out"))
    chat = [{"role": "user", "content": "hello"}]
    want = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert list(again.apply_chat_template(chat, add_generation_prompt=True)) == list(want)


@pytest.mark.slow
def test_smollm2_gives_our_logits(smollm2_path, tmp_path):
    model = load_model(smollm2_path)
    policy = default_policy(QuantSpec(ranges="absmax"), tied=True)
    params = quantize_params(add_scales(model.params, policy), policy)
    write_mlx(tmp_path / "out", model.config, params, model.tokenizer)
    text = "Question: Natalia sold clips to 48 of her friends in April, and half as many in May. "
    ids = np.array([model.tokenizer(text * 3)["input_ids"][:64]])
    want, got = ours(model.config, params, ids), theirs(tmp_path / "out", ids)
    print(f"SmolLM2, MLX: max abs logit difference {np.abs(got - want).max():.2e}")
    assert np.abs(got - want).max() < 1e-3
    assert (got.argmax(-1) == want.argmax(-1)).all()
