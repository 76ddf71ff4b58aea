"""The signal analysis against dense mathematics in NumPy and an unscanned model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.probe import make_probe
from jaxdistill.kd.signal import by_projection, make_signal, path_of
from jaxdistill.kd.signal_sums import PARTS, PROJECTIONS
from jaxdistill.models.config import ModelConfig
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.measure import clipped_share
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from tests import tiny

CONFIG = tiny.config()
POLICY = default_policy(QuantSpec(group_size=32, ranges="absmax"), tied=True)
TRANSFORM = fake_quant_params(POLICY)


@functools.cache
def teacher() -> dict:
    return tiny.params(CONFIG)


@functools.cache
def student() -> dict:
    """Quantizes with ranges a fifth too narrow, so that weights are clipped."""

    def narrow(path, leaf):
        return leaf * jnp.float16(0.8) if path[-1].key == "kernel_scale" else leaf

    return jax.tree_util.tree_map_with_path(narrow, add_scales(teacher(), POLICY))


@functools.cache
def measurer(**options):
    """Compiles one kind of measurement, once for all tests; the probe's is without remat."""
    return make_signal(CONFIG, chunk=24, remat="full", **options)


@functools.cache
def measured() -> dict[str, np.ndarray]:
    """Measures two different batches."""
    batches = [tiny.batch(CONFIG, seed=s) for s in (0, 1)]
    return measurer(transform=TRANSFORM)(teacher(), student(), batches)


def plain(kernels: list[dict], params: dict, batch: dict, c: ModelConfig = CONFIG):
    """A Llama as a loop over layers: returns logits, every projection's output, and the stream.

    Written out by itself: no scan, no flax; gates, norms and rotations as in the Llama paper.
    """
    B, T = batch["tokens"].shape
    segments, positions = batch["segment_ids"], batch["positions"]

    def norm(x, weight):
        scale = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + c.rms_norm_eps)
        return x / jnp.broadcast_to(scale, x.shape) * jnp.broadcast_to(weight, x.shape)

    half = c.head_dim // 2
    frequency = c.rope_theta ** (-np.arange(half) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        cos, sin = (
            jnp.broadcast_to(f(angle).astype(jnp.float32), a.shape) for f in (jnp.cos, jnp.sin)
        )
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    mask = (segments[:, :, None] == segments[:, None, :]) & (
        positions[:, :, None] >= positions[:, None, :]
    )
    x = params["embed_tokens"]["embedding"][batch["tokens"]]
    seen, stream = [], [x]
    for i, w in enumerate(kernels):
        norms = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        h = norm(x, norms["input_layernorm"]["weight"])
        q, k, v = (h @ w[p] for p in ("q_proj", "k_proj", "v_proj"))
        heads = rotate(q.reshape(B, T, c.num_heads, c.head_dim))
        group = c.num_heads // c.num_kv_heads
        keys, values = (y.reshape(B, T, c.num_kv_heads, c.head_dim) for y in (k, v))
        keys, values = (jnp.repeat(y, group, axis=2) for y in (rotate(keys), values))
        scores = jnp.einsum("bthd,bshd->bhts", heads, keys) / np.sqrt(c.head_dim).astype(np.float32)
        keep = jnp.broadcast_to(mask[:, None], scores.shape)
        weights = jax.nn.softmax(jnp.where(keep, scores, -1e30), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, values).reshape(B, T, -1)
        o = mixed @ w["o_proj"]
        x = x + o
        h = norm(x, norms["post_attention_layernorm"]["weight"])
        gate, up = h @ w["gate_proj"], h @ w["up_proj"]
        down = (gate / (1 + jnp.exp(-gate)) * up) @ w["down_proj"]
        x = x + down
        stream.append(x)
        seen.append([q, k, v, o, gate, up, down])
    final = norm(x, params["norm"]["weight"])
    return final @ params["embed_tokens"]["embedding"].T, seen, stream


def unstacked(params: dict) -> list[dict]:
    """Takes the seven kernels of each layer."""
    return [
        {p: params["layers"][part][p]["kernel"][i] for p, part in PARTS.items()}
        for i in range(CONFIG.num_layers)
    ]


def dense_loss(kernels, params, batch, z_teacher=None):
    """Mean cross-entropy of the next token, or mean KL from the teacher, over target tokens."""
    log_q = jax.nn.log_softmax(plain(kernels, params, batch)[0])[:, :-1]
    counts = batch["loss_mask"][:, 1:].astype(jnp.float32)
    if z_teacher is None:
        rows = -jnp.take_along_axis(log_q, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    else:
        log_p = jax.nn.log_softmax(z_teacher)[:, :-1]
        rows = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return (rows * counts).sum() / counts.sum()


@functools.cache
def expected() -> dict[str, np.ndarray]:
    """Measures the same with the plain model and NumPy."""
    values = TRANSFORM(student())  # what the student's forward sees
    inside = []  # where the straight-through gradient is 1
    for p, part in PARTS.items():
        node = student()["layers"][part][p]
        scale = np.repeat(np.asarray(node["kernel_scale"], np.float32), 32, axis=1)
        place = np.asarray(node["kernel"]) / scale
        inside.append((place >= -8) & (place <= 7))
    run, gradient = jax.jit(plain), jax.jit(jax.value_and_grad(dense_loss))
    found: dict[str, list] = {}
    outputs_t, outputs_s, streams = [], [], []
    for seed in (0, 1):
        batch = tiny.batch(CONFIG, seed=seed)
        keep = np.asarray(batch["segment_ids"] > 0)
        z_t, seen_t, stream_t = run(unstacked(teacher()), teacher(), batch)
        z_s, seen_s, stream_s = run(unstacked(values), values, batch)
        outputs_t.append([[np.asarray(y, np.float64)[keep] for y in layer] for layer in seen_t])
        outputs_s.append([[np.asarray(y, np.float64)[keep] for y in layer] for layer in seen_s])
        streams.append([[np.asarray(x, np.float64)[keep] for x in s] for s in (stream_t, stream_s)])
        for name, params, guide in (
            ("gradient/teacher", teacher(), None),
            ("gradient/student", values, None),
            ("gradient/student_kd", values, z_t),
        ):
            loss, g = gradient(unstacked(params), params, batch, guide)
            masks = inside if "student" in name else [np.ones_like(m) for m in inside]
            squares = [
                [
                    (np.asarray(layer[p], np.float64)[m[i]] ** 2).sum()
                    for p, m in zip(PROJECTIONS, masks, strict=True)
                ]
                for i, layer in enumerate(g)
            ]
            found.setdefault(name, []).append(squares)
            found.setdefault(f"loss {name}", []).append(loss)
    want = {name: np.mean(v, axis=0) for name, v in found.items()}

    def over(pair, function):
        """Joins the places of all batches, then calls `function` for each layer and projection."""
        return np.asarray(
            [
                [
                    function(*(np.concatenate([b[i][j] for b in side]) for side in pair))
                    for j in range(7)
                ]
                for i in range(CONFIG.num_layers)
            ]
        )

    for model, outputs in (("teacher", outputs_t), ("student", outputs_s)):
        want[f"mean/{model}"] = over([outputs], np.mean)
        want[f"rms/{model}"] = over([outputs], lambda y: np.sqrt((y**2).mean()))
    want["sqnr"] = over(
        [outputs_t, outputs_s], lambda t, s: 10 * np.log10((t**2).sum() / ((t - s) ** 2).sum())
    )
    errors, cosines = [], []
    for i in range(CONFIG.num_layers + 1):
        t, s = (np.concatenate([b[side][i] for b in streams]) for side in (0, 1))
        norms = [np.linalg.norm(a, axis=1) for a in (t, s, t - s)]
        errors.append((norms[2] / norms[0]).mean())
        cosines.append(((t * s).sum(1) / (norms[0] * norms[1])).mean())
    return want | {"drift/relative_error": np.asarray(errors), "drift/cosine": np.asarray(cosines)}


@pytest.mark.parametrize(
    "name",
    ["gradient/teacher", "gradient/student", "gradient/student_kd", "rms/teacher", "rms/student"]
    + ["mean/teacher", "mean/student", "sqnr", "drift/relative_error", "drift/cosine"],
)
def test_equals_a_plain_model_and_numpy(name):
    got, want = measured()[name], expected()[name]
    assert got.shape == want.shape
    assert got.shape == ((3,) if name.startswith("drift") else (2, 7))
    scale = np.abs(want).max() if name.startswith("mean") else 0.0
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4 * scale)


def test_losses_are_the_means_over_targets():
    got, want = measured(), expected()
    # Both batches have the same number of targets.
    assert got["tokens"] == 2 * int(tiny.batch(CONFIG)["loss_mask"].sum())
    for name, gradient in (
        ("nll/teacher", "teacher"),
        ("nll/student", "student"),
        ("kl", "student_kd"),
    ):
        assert got[name] == pytest.approx(float(want[f"loss gradient/{gradient}"]), rel=1e-4)


def test_gradients_agree_with_finite_differences():
    """Along the gradient itself the loss rises by its squared norm."""
    batch = tiny.batch(CONFIG)
    measure = measurer(transform=TRANSFORM)
    want = measure(teacher(), student(), [batch])["gradient/teacher"]
    kernels = unstacked(teacher())
    g = jax.jit(jax.grad(dense_loss))(kernels, teacher(), batch)
    loss = jax.jit(dense_loss)
    for layer, p in ((0, "v_proj"), (1, "down_proj")):
        step = 1e-3 / np.sqrt(want[layer, PROJECTIONS.index(p)])
        moved = [
            [
                k | {p: k[p] + sign * step * g[i][p]} if i == layer else k
                for i, k in enumerate(kernels)
            ]
            for sign in (1, -1)
        ]
        rise = (loss(moved[0], teacher(), batch) - loss(moved[1], teacher(), batch)) / (2 * step)
        assert float(rise) == pytest.approx(want[layer, PROJECTIONS.index(p)], rel=2e-2)


def test_padding_does_not_count():
    batch = tiny.batch(CONFIG)
    other = batch["tokens"] + (batch["segment_ids"] == 0).astype(
        jnp.int32
    )  # other tokens in places of padding
    noisy = batch | {"tokens": jnp.minimum(other, CONFIG.vocab_size - 1)}
    measure = measurer(transform=TRANSFORM)
    want = measure(teacher(), student(), [batch])
    assert (noisy["tokens"] != batch["tokens"]).any()
    got = measure(teacher(), student(), [noisy])
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_stored_integers_are_read_as_the_floats_they_stand_for():
    batches = [tiny.batch(CONFIG)]
    stored = quantize_params(student(), POLICY)
    got = measurer()(teacher(), stored, batches)
    want = measurer()(teacher(), dequantize_params(stored), batches)
    straight = measurer(transform=TRANSFORM)(teacher(), student(), batches)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(got["sqnr"], straight["sqnr"], rtol=1e-4)
    # No float kernel is clipped, so its gradient has no hole in it.
    assert (got["gradient/student"] > straight["gradient/student"]).all()


def test_a_float_student_has_no_error():
    signal = measurer()(teacher(), teacher(), [tiny.batch(CONFIG)])
    assert np.isposinf(signal["sqnr"]).all() and np.isposinf(signal["sqnr/hidden"])
    np.testing.assert_allclose(signal["gradient/student"], signal["gradient/teacher"], rtol=1e-5)
    assert (signal["gradient/student_kd"] < 1e-8 * signal["gradient/teacher"]).all()
    np.testing.assert_array_equal(signal["drift/relative_error"], 0)
    np.testing.assert_allclose(signal["drift/cosine"], 1, rtol=1e-6)


def test_data_without_targets_are_refused():
    batch = tiny.batch(CONFIG)
    batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
    measure = measurer()
    for batches in ([], [batch]):
        with pytest.raises(UserError, match="hold no target token; give longer texts"):
            measure(teacher(), teacher(), batches)


def test_probe_is_the_analysis_of_one_batch():
    batch = tiny.batch(CONFIG)
    flat, arrays = make_probe(CONFIG, POLICY, transform=TRANSFORM)(teacher(), student(), batch)
    whole = measurer(transform=TRANSFORM)(teacher(), student(), [batch])
    assert len(flat) == 7 * 4 and all(type(v) is float for v in flat.values())
    for quantity, name in (
        ("gradient", "gradient/student_kd"),
        ("sqnr", "sqnr"),
        ("rms", "rms/student"),
    ):
        np.testing.assert_allclose(arrays[quantity], whole[name], rtol=1e-4)
        for i, p in enumerate(PROJECTIONS):
            assert flat[f"signal/{p}/{quantity}"] == pytest.approx(
                whole[name][:, i].mean(), rel=1e-4
            )
    v = student()["layers"]["self_attn"]["v_proj"]
    place = np.asarray(v["kernel"]) / np.repeat(
        np.asarray(v["kernel_scale"], np.float32), 32, axis=1
    )
    share = ((np.round(place) < -8) | (np.round(place) > 7)).mean(axis=(1, 2))
    assert share.min() > 0
    np.testing.assert_allclose(np.asarray(arrays["clipped"])[:, 2], share, rtol=1e-5)
    assert flat["signal/v_proj/clipped"] == pytest.approx(share.mean(), rel=1e-5)


def test_shares_are_laid_out_by_projection():
    assert path_of("up_proj") == "layers/mlp/up_proj/kernel"
    shares = by_projection({path_of("o_proj"): jnp.asarray([0.25, 0.5])}, 2)
    np.testing.assert_array_equal(shares, [[0, 0, 0, 0.25, 0, 0, 0], [0, 0, 0, 0.5, 0, 0, 0]])
    found = by_projection(clipped_share(student(), POLICY), 2)
    assert found.shape == (2, 7) and (found > 0).all()
