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
# # Cascade and cost: who answers, and what it takes
#
# A small model that is wrong sometimes is of use if it knows when. Here two networks tell three
# spirals apart, a small one and a larger one; the small one answers where it is sure enough, and
# the rest goes to the larger one. Language models on multiple choice do the same, by
# `jaxdistill cascade`.

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np
from lesson import spirals

from jaxdistill.dd.train_on import train_classifier
from jaxdistill.evals.cascade import Tier, calibrate, choice_confidence, coverage_curve, outcome
from jaxdistill.evals.cost import cascade_use, serving, stored_bytes, training
from jaxdistill.evals.devices import device
from jaxdistill.models.classifiers import make_classifier
from jaxdistill.models.hub import load_config

train, asked = spirals(1200, 0), spirals(800, 1)
widths, logits = {"student": 8, "teacher": 64}, {}
for name, width in widths.items():
    network = make_classifier("mlp", input_shape=(2,), num_classes=3, width=width)
    params = train_classifier(network, train, steps=400, rate=1e-2, key=jax.random.key(0))
    logits[name] = np.asarray(network.apply(params, asked["inputs"]))

# %% [markdown]
# ## How sure is each of its answer?
#
# Of each question a tier knows whether it was right, and how sure it was: here the probability of
# its choice. Margin and entropy are the other signals.

# %%
labels = np.asarray(asked["labels"])
tiers = [
    Tier(name, found.argmax(1) == labels, cost, choice_confidence(list(found))["max_probability"])
    for (name, found), cost in zip(logits.items(), (1.0, 10.0), strict=True)
]
for tier in tiers:
    print(f"{tier.name} alone: {tier.correct.mean():.1%} right")

# %% [markdown]
# ## A threshold with a promise
#
# One half of the questions chooses the threshold, the other tells what it does. The promise: with
# probability 90 %, over the draw of those questions, at most three of a hundred answers get worse
# than the teacher's.

# %%
half = np.random.default_rng(0).permutation(len(labels)) < len(labels) // 2


def some_of(tiers, index):
    return [t._replace(correct=t.correct[index], confidence=t.confidence[index]) for t in tiers]


own, test = some_of(tiers, half), some_of(tiers, ~half)
found = calibrate(own, max_drop=0.03, confidence=0.9)
there = outcome(test, found.thresholds)
print(f"threshold {found.thresholds[0]:.2f}: {there.shares[0]:.1%} answered by the student,")
print(f"accuracy {there.accuracy:.1%}, the teacher's {test[1].correct.mean():.1%}")

curve = coverage_curve(*test)
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(curve.coverage, curve.accuracy, label="both")
axes.plot(curve.coverage, curve.answered, label="student, where it answers")
axes.plot(there.shares[0], there.accuracy, "k*", ms=11, label="chosen")
axes.set(xlabel="share that the student answers", ylabel="accuracy")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Is the promise kept?
#
# Draw 400 questions 200 times, with replacement; take all 800 for the truth. The share of draws
# that lose no more than 3 % must be 90 % or more.

# %%
kept, shares = [], []
for seed in range(200):
    draw = np.random.default_rng(seed).integers(len(labels), size=400)
    thresholds = calibrate(some_of(tiers, draw), max_drop=0.03, confidence=0.9).thresholds
    everyone = outcome(tiers, thresholds)
    kept.append(tiers[1].correct.mean() - everyone.accuracy <= 0.03)
    shares.append(everyone.shares[0])
print(
    f"promise kept in {np.mean(kept):.1%} of the draws; the student answers {np.mean(shares):.1%}"
)

# %% [markdown]
# ## What does it take?
#
# Operations and bytes follow from a model's shape, time from the device's data sheet and the share
# of it that is reached (`mfu`, `mbu`: yours to state). A Llama 3.1 of 8B in four bits before one of
# 70B, on an H200 at 4 an hour, a question of 512 tokens and an answer of 128:

# %%
h200 = dataclasses.replace(device("h200"), price=4.0)
small, large = load_config("llama-3.1-8b"), load_config("llama-3.1-70b")
uses = {
    "student": serving(small, h200, weights=stored_bytes(small, 4), prompt=512, new=128),
    "teacher": serving(large, h200, weights=stored_bytes(large, 16), prompt=512, new=128),
}
uses["cascade"] = cascade_use([uses["student"], uses["teacher"]], (0.7, 0.3))
for name, use in uses.items():
    print(f"{name}: {use.seconds:.2f} s, {use.joules / 3600:.2f} Wh, {100 * use.price:.2f} cents")
once = training(small, h200, tokens=1e9, seq_len=2048, teacher=large)
saved = uses["teacher"].seconds - uses["cascade"].seconds
print(
    f"training takes {once.seconds / 3600:,.0f} device hours, saved after "
    f"{once.seconds / saved:,.0f} questions"
)

# %% [markdown]
# `jaxdistill cost` prints this for your models, with every formula; `jaxdistill pilot` does all of
# it, from a model and some text.
