"""The calibration pass: what it computes, in which order, on which tokens, and what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import make_apply, places_of, run_layer
from jaxdistill.models.hub import Model
from jaxdistill.paths import walk
from jaxdistill.quant import calibrate as calibrate_module
from jaxdistill.quant.calibrate import calibrate
from jaxdistill.quant.gptq import gptq
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from jaxdistill.recipes.calibrate import calibrated
from tests import tiny

SPEC = QuantSpec(group_size=16, ranges="absmax")
FLOAT = "mlp/gate_proj"
POLICY = Policy(rules=((FLOAT, None), *default_policy(SPEC, tied=True).rules))
CONFIG = tiny.config(num_kv_heads=4, intermediate_size=64)  # one shape of kernel: fast
NAMES = [f"self_attn/{x}_proj" for x in "qkvo"] + [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
QUANTIZED = [name for name in NAMES if name != FLOAT]


@pytest.fixture(scope="module")
def model():
    """A tiny model whose inputs correlate, and of which a few are large, as in trained models."""
    params = tiny.params(CONFIG, spread=4.0)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(96, 6)) @ rng.normal(size=(6, 64)) + 0.3 * rng.normal(size=(96, 64))
    params["embed_tokens"]["embedding"] = jnp.asarray(table, jnp.float32)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weight = np.exp(rng.normal(size=(CONFIG.num_layers, 64)))
        params["layers"][norm]["weight"] = jnp.asarray(weight, jnp.float32)
    return Model(config=CONFIG, params=params, tokenizer=None, source="tiny")


@pytest.fixture(scope="module")
def text():
    return [tiny.batch(CONFIG, rows=8, seed=seed) for seed in range(3)]


def grams_alive():
    """Count the arrays that may be Gram matrices: square and symmetric."""
    square = (x for x in jax.live_arrays() if x.shape == (64, 64))
    return sum(np.array_equal(x, np.asarray(x).T) for x in square)


@pytest.fixture(scope="module", params=[False, True], ids=["at_once", "sequential"])
def done(request, model, text):
    """GPTQ of the whole model: sequential?, the tree, Gram matrices alive, layers done."""
    alive, layers, before = [], [], grams_alive()  # other tests may hold arrays of that shape

    def spy(w, gram, *args, **options):
        alive.append(grams_alive() - before)
        return gptq(w, gram, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module, "gptq", spy)
        tree = calibrated(
            model,
            POLICY,
            text,
            sequential=request.param,
            progress=lambda *counts: layers.append((*counts, len(alive))),
        )
    return request.param, tree, alive, layers


@jax.jit
def layer_inputs(layer, x, batch):
    """Run one layer; return its outputs and each linear layer's input."""
    places = places_of(CONFIG, batch["tokens"], batch["positions"], batch["segment_ids"])
    x, _, seen = run_layer(CONFIG, layer, x, places)
    return x, {path: rows[0] for path, rows in seen.items() if path.endswith("_proj")}


def test_pass_is_gptq_by_hand_layer_after_layer(model, text, done):
    """Gram matrices in float64 from all rows at once, one kernel after the other."""
    sequential, tree, *_ = done
    got = dict(walk(quantize_params(tree, POLICY)))
    scaled = add_scales(model.params, POLICY)
    table = fake_quant_params(POLICY)(scaled)["embed_tokens"]["embedding"]
    hidden = [table[b["tokens"].reshape(-1)] for b in text]
    counted = np.concatenate([np.asarray(b["segment_ids"]).reshape(-1) != 0 for b in text])
    different = total = 0
    for i in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], scaled["layers"])
        for group in [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]] if sequential else [NAMES]:
            inputs = [
                layer_inputs(_kernels(layer), x, b)[1] for x, b in zip(hidden, text, strict=True)
            ]
            for name in (name for name in group if name in QUANTIZED):
                rows = np.concatenate([seen[f"layers/{name}"] for seen in inputs])[counted]
                gram = (rows.astype(np.float64).T @ rows).astype(np.float32)
                outer, inner = name.split("/")
                node = layer[outer][inner]
                kernel = gptq(node["kernel"], jnp.asarray(gram), (node["kernel_scale"],), SPEC)
                layer = layer | {outer: layer[outer] | {inner: node | {"kernel": kernel}}}
                scale = np.repeat(np.asarray(node["kernel_scale"], np.float32), 16, axis=0)
                want = np.rint(np.asarray(kernel) / scale)
                integers = got[f"layers/{name}/kernel_q"][i].astype(jnp.int32)
                different += int((np.asarray(integers) != want).sum())
                total += want.size
        hidden = [layer_inputs(_kernels(layer), x, b)[0] for x, b in zip(hidden, text, strict=True)]
    # The sums differ in their last bits, and a weight between two integers may go either way.
    assert different <= total // 1000, (different, total)


def _kernels(layer):
    """Drop the scales: here every kernel is run as it stands."""
    return {
        k: _kernels(v) if isinstance(v, dict) else v
        for k, v in layer.items()
        if k != "kernel_scale"
    }


def test_stored_integers_are_those_of_gptq_and_the_rest_is_that_of_add_scales(model, done):
    """Kernels lie on the lattice: fake quantization and storage change nothing of them."""
    tree = done[1]
    leaves, ranges = dict(walk(tree)), dict(walk(add_scales(model.params, POLICY)))
    lattice = dict(walk(fake_quant_params(POLICY)(tree)))
    back = dict(walk(dequantize_params(quantize_params(tree, POLICY))))
    assert leaves.keys() == ranges.keys()
    changed = {path for path in leaves if not np.array_equal(leaves[path], ranges[path])}
    assert changed == {f"layers/{name}/kernel" for name in QUANTIZED}
    for path in changed:
        np.testing.assert_array_equal(leaves[path], lattice[path])
        np.testing.assert_array_equal(leaves[path], back[path])


def test_statistics_of_one_layer_at_a_time(done):
    """Whenever GPTQ runs, the Gram matrices of four inputs are alive, or of one."""
    sequential, _, alive, layers = done
    assert layers == [(1, 2, 6), (2, 2, 12)]
    assert max(alive) == (1 if sequential else 4)


def test_padding_does_not_matter(model, text, done):
    sequential, tree, *_ = done
    other = []
    for batch in text:
        padding = batch["segment_ids"] == 0
        other.append(batch | {"tokens": jnp.where(padding, 95 - batch["tokens"], batch["tokens"])})
    want, got = (
        dict(walk(tree)),
        dict(walk(calibrated(model, POLICY, other, sequential=sequential))),
    )
    for path in want:
        np.testing.assert_array_equal(want[path], got[path])


def test_statistics_are_sums_over_the_rows_that_count():
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    batch = {"segment_ids": jnp.asarray([[1, 2, 0], [1, 0, 0]])}
    sums = calibrate_module._nothing(4)
    for _ in range(2):
        sums = calibrate_module._add(sums, jnp.asarray(rows), batch)
    counted = rows[[0, 1, 3]]
    np.testing.assert_allclose(sums.gram, 2 * counted.T @ counted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums.magnitude, 2 * np.abs(counted).sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("method", "symmetric"), [("gptq", False), ("awq", True)])
def test_output_is_nearer_to_the_float_model_than_by_rounding(model, text, method, symmetric):
    spec = QuantSpec(bits=3, group_size=32, ranges="absmax", symmetric=symmetric)
    policy = default_policy(spec, tied=True)
    apply = jax.jit(make_apply(CONFIG))
    fresh = tiny.batch(CONFIG, rows=32, seed=99)
    places = fresh["tokens"], fresh["positions"], fresh["segment_ids"]
    counted = np.asarray(fresh["segment_ids"]) != 0
    want = np.asarray(apply(model.params, *places).logits())[counted]

    def error(tree):
        stored = dequantize_params(quantize_params(tree, policy))
        return float(np.sum((np.asarray(apply(stored, *places).logits())[counted] - want) ** 2))

    tree = calibrated(model, policy, text, method)
    assert error(tree) < 0.9 * error(add_scales(model.params, policy))
    if method == "awq":  # in float, and with the float table, the function is what it was
        assert tree.keys() == model.params.keys()
        masters = _kernels(tree) | {"embed_tokens": model.params["embed_tokens"]}
        got = np.asarray(apply(masters, *places).logits())[counted]
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
        for norm in ("input_layernorm", "post_attention_layernorm"):
            before, after = (x["layers"][norm]["weight"] for x in (model.params, tree))
            assert float(jnp.std(after / before)) > 0.1


def test_an_input_that_is_shared_is_gathered_once(model, text):
    def layer(params, x, batch):
        return x, {"a": x, "b": x, "c": x + 1.0}

    shared = calibrate_module._shared_inputs(layer, {}, jnp.ones((4, 8)), {})
    assert shared == {"a": ("a", 8), "b": ("a", 8), "c": ("c", 8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn"}, "method 'rtn' given; accepted: gptq, awq"),
        (
            {"method": "awq", "sequential": True},
            "sequential is given with awq; accepted with gptq alone",
        ),
        ({"batches": []}, "the calibration data hold no token; give at least one text"),
        (
            {"batches": [{"segment_ids": np.zeros((2, 3), np.int32)}]},
            "the calibration data hold no token; give at least one text",
        ),
    ],
)
def test_bad_input_says_what_is_accepted(model, options, message):
    options = {"batches": [{"segment_ids": np.ones((2, 3), np.int32)}]} | options
    with pytest.raises(UserError) as e:
        calibrate(
            model.params,
            POLICY,
            options.pop("batches"),
            embed=lambda p, b: b["tokens"],
            layer=lambda p, x, b: (x, {}),
            **options,
        )
    assert str(e.value) == message


def test_unsound_activations_are_named(model, text):
    bad = jax.tree.map(lambda x: x, model.params)
    weight = bad["layers"]["post_attention_layernorm"]["weight"]
    bad["layers"]["post_attention_layernorm"]["weight"] = weight.at[1, 5].set(jnp.nan)
    broken = Model(config=CONFIG, params=bad, tokenizer=None, source="tiny")
    with pytest.raises(UserError, match=r"^the calibration inputs of layers/mlp/up_proj/kernel"):
        calibrated(broken, POLICY, text)
