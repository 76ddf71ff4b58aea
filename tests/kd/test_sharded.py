"""One device against eight simulated ones: the same losses, the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.dd.classification import classification_loss
from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_adam
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll
from jaxdistill.kd.freeze import freeze, ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.step import init_state, make_step
from jaxdistill.mesh import MeshShape, fetch, make_mesh, on_mesh, place_batch
from jaxdistill.models.classifiers import make_classifier
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling
from jaxdistill.models.sharding import make_sharded, place
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from tests import tiny

CONFIG = tiny.config(num_layers=1)
POLICY = default_policy(QuantSpec(bits=4, group_size=32, ranges="absmax"), tied=True)
TEACHER = tiny.params(CONFIG)
STUDENT = add_scales(tiny.params(CONFIG, seed=1), POLICY)
MESHES = [MeshShape(data=8), MeshShape(fsdp=8), MeshShape(data=2, fsdp=2, tensor=2)]
ALL = MESHES[-1]


def cached(batch):
    """The teacher's eight likeliest tokens of each place, as a cache hands them out."""
    out = make_apply(CONFIG)(TEACHER, batch["tokens"], batch["positions"], batch["segment_ids"])
    log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(out.logits()), 8)
    tail = jnp.log1p(-jnp.sum(jnp.exp(log_probs), axis=-1))
    names = ("teacher_log_probs", "teacher_indices", "teacher_log_tail")
    return batch | dict(zip(names, (log_probs, indices, tail), strict=True))


def distilled(shape, *, cache=False, on_policy=False, steps=2):
    """Losses and params of a few steps of KD-QAT on a mesh; None for one device."""
    batches = [tiny.batch(CONFIG, rows=8, seed=i) for i in range(steps)]
    batches = [cached(batch) for batch in batches] if cache else batches
    student = make_apply(CONFIG, transform=fake_quant_params(POLICY), remat="full")
    objective = kd_objective(student, None if cache else make_apply(CONFIG), chunk=32)
    rollout = None
    if on_policy:
        rollout = make_rollout(
            make_apply(CONFIG, transform=dequantize_params),
            CONFIG,
            prompt_length=6,
            how=Sampling(max_new_tokens=8, temperature=1.0),
            stop=(0,),
            share=1.0,
            prepare=lambda p: quantize_params(p, POLICY),
        )
    tx = (freeze if on_policy else ov_freeze)(optax.sgd(0.1))
    with on_mesh(None if shape is None else make_mesh(shape)):
        teacher = None if cache else place(TEACHER)
        state = make_sharded(lambda p: init_state(p, tx), place(STUDENT))
        step, losses = make_step(objective, tx, rollout=rollout), []
        for batch in batches:
            state, metrics = step(state, teacher, place_batch(batch))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return losses, jax.tree.map(fetch, state.params)


def condensed(shape):
    """Losses of a few updates of a synthetic set, and the set."""
    net = make_classifier("mlp", input_shape=(6,), num_classes=3, width=16)
    rng = np.random.default_rng(0)
    real = {
        "inputs": rng.normal(size=(16, 6)).astype(np.float32),
        "labels": rng.integers(0, 3, 16).astype(np.int32),
    }
    loss = classification_loss(net.apply)
    method = meta_gradient(loss, loss, net.init, tx=inner_adam(), unroll=Unroll(steps=4), rate=0.01)
    tx = optax.adam(0.01)
    start = Synthetic(
        learned={"inputs": jnp.asarray(real["inputs"][:6])},
        fixed={"labels": jnp.asarray(real["labels"][:6])},
    )
    with on_mesh(None if shape is None else make_mesh(shape)):
        state = make_sharded(lambda: init_condense(start, tx, 0))
        step, losses = make_condense_step(method, tx), []
        for _ in range(3):
            state, metrics = step(state, place_batch(real))
            losses.append(float(metrics["loss"]))
        return losses, fetch(state.synthetic.learned["inputs"])


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture(scope="module")
def alone():
    return distilled(None)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_kd_qat_is_the_same_on_every_mesh(shape, alone):
    assert alone[0][0] != alone[0][1]
    assert_equal(distilled(shape), alone)


@pytest.mark.parametrize("how", [{"cache": True}, {"on_policy": True, "steps": 1}], ids=str)
def test_cached_and_on_policy_distillation_are_the_same(how):
    assert_equal(distilled(ALL, **how), distilled(None, **how))


def test_meta_gradients_are_the_same():
    expected = condensed(None)
    assert expected[0][-1] < expected[0][0]
    assert_equal(condensed(ALL), expected)
