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
# # How ov-freeze works
#
# Rounding the weights of a language model to four bits makes each projection's output a little
# wrong, and each layer adds its error to those before it. Distillation repairs them, but what it
# follows are gradients of a disturbed model. "Oh! We Freeze" (arXiv 2403.18159) looked at those
# gradients and froze what they disturb most. This lesson does the same on a model that is trained
# here, in seconds, on Python's own documentation.

# %%
import matplotlib.pyplot as plt
import numpy as np
import optax
from lesson import batches, config, mean, topics, trained

import jaxdistill as jd
from jaxdistill.kd.recommend import recommend_freeze
from jaxdistill.kd.signal import make_signal
from jaxdistill.kd.signal_sums import PROJECTIONS

train, held_out = topics()
shape, batch, judge = config(), batches(train), batches(held_out)
teacher = trained(shape, batch)

# %% [markdown]
# ## Round it
#
# Three bits here: a model this small forgives four. `add_scales` gives each output channel its
# scale, `snap` moves the frozen kernels onto their lattice values once, and `fake_quant_params` is
# the transform that rounds the others in every forward pass.

# %%
policy = jd.default_policy(jd.QuantSpec(bits=3), tied=True)
transform = jd.fake_quant_params(policy)
student = jd.add_scales(teacher, policy)

# %% [markdown]
# ## Follow the signal
#
# Teacher and student read the same text, each by itself. Of every projection we look at how far its
# output stands above its error (SQNR, in decibels) and at how much rounding enlarged the gradient
# of the cross-entropy.

# %%
measure = make_signal(shape, transform=transform)
looks = [judge(number) for number in range(4)]
signal = measure(teacher, student, looks)
inflation = signal["gradient/student"] / signal["gradient/teacher"]
names = [name.removesuffix("_proj") for name in PROJECTIONS]

figure, both = plt.subplots(1, 2, figsize=(9, 3))
for axes, values, title in (
    (both[0], signal["sqnr"], "SQNR of the output, dB"),
    (both[1], np.log2(inflation), "gradient inflation, log2"),
):
    drawn = axes.pcolormesh(values)
    axes.set_xticks(np.arange(7) + 0.5, names)
    axes.set(ylabel="layer", title=title)
    axes.invert_yaxis()
    figure.colorbar(drawn, ax=axes)
figure.tight_layout()

# %% [markdown]
# ## What would the analysis freeze?
#
# `recommend_freeze` names the projections whose gradients rounding enlarges far more than the
# others', or none: in a model this small nothing need stand out. The paper found `v_proj` and
# `o_proj` in Llama models.

# %%
advice = recommend_freeze(signal)
print(advice.projections or "nothing", *advice.reasons, sep="\n")

# %% [markdown]
# ## Train, with and without
#
# `ov_freeze` is a mask around any optax optimizer. What it freezes has no optimizer state, and the
# step does not compute its gradients. Both runs see the same batches.

# %%
objective = jd.kd_objective(jd.make_apply(shape, transform=transform), jd.make_apply(shape))
runs = {
    "nothing frozen": (jd.freeze(optax.adam(1e-3)), student),
    "ov-freeze": (jd.ov_freeze(optax.adam(1e-3)), jd.snap(student, policy, jd.OV_PATTERN)),
}
curves, finished = {}, {}
for name, (tx, start) in runs.items():
    step, state = jd.make_step(objective, tx), jd.init_state(start, tx)
    curves[name] = []
    for number in range(80):
        state, metrics = step(state, teacher, batch(1000 + number))
        curves[name].append(mean(metrics["kl"]))
    finished[name] = state.params

figure, axes = plt.subplots(figsize=(6, 3))
for name, curve in curves.items():
    axes.plot(curve, label=name)
axes.set(xlabel="step", ylabel="KL to the teacher (nats a byte)", ylim=(0, None))
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Look again
#
# The residual stream is the vector that every layer adds to. Its drift is the size of the
# difference to the teacher's over the size of the teacher's. Training brings the student back, and
# what is frozen has not moved at all.

# %%
drift = {"rounded": signal["drift/relative_error"]}
drift |= {n: measure(teacher, p, looks)["drift/relative_error"] for n, p in finished.items()}
figure, axes = plt.subplots(figsize=(6, 3))
for name, values in drift.items():
    axes.plot(values, marker="o", label=name)
axes.set(xlabel="layers passed", ylabel="drift", ylim=(0, None))
axes.legend()
figure.tight_layout()

# %% [markdown]
# Whether the freeze helps depends on model, bits, data and learning rate. Try it on yours:
# `jaxdistill analyze` draws these pictures for a whole model, `jaxdistill quantize --freeze auto`
# follows its advice, and `benchmarks/ov_freeze` holds what we measured.
