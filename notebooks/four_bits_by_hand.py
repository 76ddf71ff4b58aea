# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Four bits by hand
#
# What 4-bit quantization does to a weight, why the range matters, how a gradient gets through
# rounding, and what ov-freeze leaves out. It runs in under a minute on a laptop, on a tiny random
# model.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jaxdistill as jd
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params
from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_grid

# %% [markdown]
# ## The lattice
#
# A kernel `[in, out]` gets one float16 scale `s` for each output channel, and integers `q` in
# [-8, 7]. The value that the model computes with is `s * q`. Two ways to choose `s`: so that the
# largest weight just fits (`absmax`), or so that the error is least (`mse`), which clips a few
# large weights.

# %%
w = jax.random.normal(jax.random.key(0), (2048, 64))
errors = {}
for ranges in ("absmax", "mse"):
    for group_size in (None, 128, 32):
        spec = QuantSpec(bits=4, group_size=group_size, ranges=ranges)
        grid = choose_grid(w, spec)
        off = dequantize(quantize(w, grid, spec), grid) - w
        errors[ranges, group_size or "channel"] = float(jnp.linalg.norm(off) / jnp.linalg.norm(w))
print({k: round(v, 3) for k, v in errors.items()})

# %% [markdown]
# ## Straight through
#
# Rounding has no useful derivative, so the backward pass takes 1 inside the range and 0 where a
# weight is clipped. The forward pass is exactly the stored value.

# %%
spec = QuantSpec(bits=4)
x = jnp.linspace(-3.0, 3.0, 301)[:, None]
grid = (jnp.full((1, 1), 0.25, jnp.float16),)  # one scale
slope = jax.grad(lambda x: jnp.sum(fake_quant(x, grid, spec)))(x)
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(x[:, 0], fake_quant(x, grid, spec)[:, 0], label="forward")
axes.plot(x[:, 0], slope[:, 0], "--", label="derivative")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## A quantized student
#
# The model never knows that it is quantized: a *transform* of its params, called inside the layer
# scan, turns master weights into lattice values.

# %%
config = ModelConfig(
    model_type="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_embeddings=True,
)
teacher = init_params(config, jax.random.key(1))
teacher = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, teacher)  # peaked logits
policy = jd.default_policy(QuantSpec(bits=4), tied=True)
student = jd.snap(jd.add_scales(teacher, policy), policy, jd.OV_PATTERN)
objective = jd.kd_objective(
    jd.make_apply(config, transform=jd.fake_quant_params(policy)), jd.make_apply(config)
)


def batch(seed):
    tokens = jax.random.randint(jax.random.key(seed), (16, 32), 0, config.vocab_size)
    return {"tokens": tokens, "loss_mask": jnp.ones_like(tokens, bool).at[:, 0].set(False)}


# %% [markdown]
# ## With ov-freeze and without
#
# `ov_freeze` is a mask around any optax optimizer. The frozen kernels get no optimizer state, and
# the step does not compute their gradients. Four batches, again and again.

# %%
curves, sizes = {}, {}
for name, wrap in (("KD-QAT", jd.freeze), ("KD-QAT + ov-freeze", jd.ov_freeze)):
    tx = wrap(optax.adam(1e-3))
    step, state = jd.make_step(objective, tx), jd.init_state(student, tx)
    sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    curves[name] = []
    for i in range(60):
        state, metrics = step(state, teacher, batch(i % 4))
        curves[name].append(float(metrics["kl"][0] / metrics["kl"][1]))

figure, axes = plt.subplots(figsize=(6, 3))
for name, curve in curves.items():
    axes.plot(curve, label=f"{name}: {sizes[name]:,} bytes of optimizer state")
axes.set(xlabel="step", ylabel="KL (nats a token)")
axes.legend()
figure.tight_layout()
