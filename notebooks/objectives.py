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
# # Objectives of distillation, compared
#
# A student is half of its teacher's layers. What should it make smaller? Each divergence asks
# something else of it: forward KL wants all that the teacher finds possible, reverse KL only what
# it finds likely, cross-entropy does not ask the teacher at all.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from lesson import batches, config, topics, trained

import jaxdistill as jd

train, held_out = topics()
shape, batch, judge = config(), batches(train), batches(held_out)
teacher = trained(shape, batch)
small, start = jd.cut_layers(shape, teacher, 2)

# %% [markdown]
# ## One objective is one line of text
#
# `kd_objective` takes any of `jaxdistill objectives`, with arguments and weights. Nothing else
# changes: the same step, the same teacher, the same batches.

# %%
texts = (
    "ce",
    "forward_kl",
    "reverse_kl",
    "jsd:beta=0.5",
    "0.9*forward_kl:temperature=2+0.1*ce",
)
students = {}
for text in texts:
    objective = jd.kd_objective(jd.make_apply(small), jd.make_apply(shape), text)
    tx = jd.freeze(optax.adam(optax.cosine_decay_schedule(2e-3, 120)))
    step, state = jd.make_step(objective, tx), jd.init_state(start, tx)
    for number in range(120):
        state, _ = step(state, teacher, batch(1000 + number))
    students[text] = state.params

# %% [markdown]
# ## One judge for all
#
# Held-out text: the loss on the text itself (NLL), both KLs, and how often student and teacher
# agree on the next byte.

# %%
applies = jd.make_apply(small), jd.make_apply(shape)
evaluate = jd.make_evaluator(jd.kd_objective(*applies))
reverse_kl = jax.jit(jd.kd_objective(*applies, "reverse_kl"))
looks = [judge(number) for number in range(16)]
table = {}
for text, params in students.items():
    found = evaluate(params, teacher, looks)
    back = [reverse_kl(params, teacher, look)[:2] for look in looks]  # sums and counts
    total, count = np.sum(back, axis=0)
    table[text] = [found["nll"], found["kl"], total / count, found["agreement"]]
print(f"{'':38}    NLL     KL  reverse KL  agreement")
for text, (nll, kl, reverse, agreement) in table.items():
    print(f"{text:38} {nll:.4f} {kl:.4f}      {reverse:.4f}     {agreement:.1%}")

# %% [markdown]
# ## What the numbers say
#
# Cross-entropy comes nearest to the text and ends furthest from the teacher; what asks the teacher
# is the other way round. Which one you want depends on what the student is for. One that answers
# alone needs the text; one that stands in for its teacher, or hands over to it when unsure, needs
# the teacher's probabilities.

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
places = np.arange(len(table))
for axes, column, title in ((both[0], 0, "NLL (nats a byte)"), (both[1], 1, "KL to the teacher")):
    values = [row[column] for row in table.values()]
    axes.barh(places, values)
    axes.set(xlim=(0.95 * min(values), 1.02 * max(values)), title=title)
both[0].set_yticks(places, list(table))
both[0].invert_yaxis()
figure.tight_layout()

# %% [markdown]
# `benchmarks/kd_families` compares all families on one task at an equal budget of tokens.
