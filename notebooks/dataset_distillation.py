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
# # A data set in nine points
#
# Data set distillation makes a few synthetic examples such that a network trained on them does well
# on all of the real data. Here the data are three spirals in a plane, so that one can look at it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from lesson import spirals

import jaxdistill as jd
from jaxdistill.dd.classification import accuracy, classification_loss
from jaxdistill.dd.selection import herding, k_center, random_selection
from jaxdistill.dd.train_on import train_points
from jaxdistill.models.classifiers import make_classifier

CLASSES, EACH = 3, 3  # classes, and synthetic examples of each
real, test = (spirals(600, seed, turns=0.5, noise=0.15) for seed in (0, 1))
network = make_classifier("mlp", input_shape=(2,), num_classes=CLASSES, width=64)
loss = classification_loss(network.apply)

# %% [markdown]
# ## Learn the set by meta-gradients
#
# `meta_gradient` trains a *fresh* network on the synthetic set for 30 steps and asks for the
# gradient of its loss on the real data, through all 30 steps, with respect to the set. What is
# learned: the points, their labels as logits, and the learning rate of the inner steps.

# %%
labels = np.repeat(np.arange(CLASSES), EACH)
picked = np.concatenate(
    [np.flatnonzero(np.asarray(real["labels"]) == c)[:EACH] for c in range(CLASSES)]
)
synthetic = jd.Synthetic(
    learned={
        "inputs": real["inputs"][picked],
        "label_logits": 3.0 * jax.nn.one_hot(labels, CLASSES),
        "log_rates": jnp.log(jnp.asarray(0.02)),
    },
    fixed={},
)
method = jd.meta_gradient(loss, loss, network.init, tx=jd.inner_adam(), unroll=jd.Unroll(steps=30))
tx = optax.adam(optax.cosine_decay_schedule(3e-2, 200))
step, state = jd.make_condense_step(method, tx, networks=2), jd.init_condense(synthetic, tx)
curve = []
for _ in range(200):
    state, metrics = step(state, real)
    curve.append(float(metrics["loss"]))
learned = state.synthetic
print(f"loss on real data {curve[0]:.3f} -> {curve[-1]:.3f}")

# %% [markdown]
# ## Judge it beside real examples of the same number
#
# Every set trains ten fresh networks, with the one trainer; the learned set takes the 30 steps and
# the rate that it was made for, the others whichever of several rates and lengths is best for them
# on the training data.


# %%
@jax.jit
def reached(data, rates):
    """Return accuracies [rates, networks, lengths] on the real data and on the test data."""

    def one(rate, key):
        params = train_points(network, data, points=POINTS, rate=rate, key=key)
        score = jax.vmap(lambda p, batch: accuracy(network.apply, p, batch), in_axes=(0, None))
        return score(params, real), score(params, test)

    keys = jax.random.split(jax.random.key(7), 10)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(rates, keys)


POINTS = [30, 60, 200]


def best(data):
    on_real, on_test = (jnp.mean(x, axis=1) for x in reached(data, jnp.array([3e-3, 1e-2, 3e-2])))
    return float(on_test.reshape(-1)[jnp.argmax(on_real)])


def chosen(pick):
    features = np.asarray(real["inputs"])
    rows = []
    for c in range(CLASSES):
        own = np.flatnonzero(np.asarray(real["labels"]) == c)
        rows.append(own[pick(features[own], EACH, 0)])
    index = np.concatenate(rows)
    return jax.tree.map(lambda x: x[index], real)


rate = jnp.exp(learned.learned["log_rates"])[None]
scores = {"full data": best(real)}
scores["learned"] = float(jnp.mean(reached(learned.batch(), rate)[1][0, :, 0]))
picks = {"random": random_selection, "herding": herding, "k-center": k_center}
sets = {name: chosen(pick) for name, pick in picks.items()}
scores |= {name: best(data) for name, data in sets.items()}
for name, score in scores.items():
    size = 600 if name == "full data" else CLASSES * EACH
    print(f"{name:10} {size:4} examples {score:.1%}")

# %% [markdown]
# ## What was learned
#
# The learned points need not look like data: they lie where they move a network's border most, and
# their soft labels may say two classes at once.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.scatter(*np.asarray(real["inputs"]).T, c=np.asarray(real["labels"]), s=6, alpha=0.4)
colors = jax.nn.softmax(learned.learned["label_logits"])
left.scatter(
    *np.asarray(learned.learned["inputs"]).T,
    c=np.asarray(colors),
    s=160,
    marker="*",
    edgecolors="black",
)
left.set(title="real data, and the learned set", aspect="equal")
right.plot(curve)
right.set(xlabel="outer step", ylabel="loss on real data", yscale="log")
figure.tight_layout()

# %% [markdown]
# `jaxdistill condense` does this for images, for features and embeddings of texts, and for rows
# that a small language model learns from; `evaluate-set` judges them as above, over architectures.
