"""Transfer of hidden states and attention: each term by hand, and in one loss of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.states import (
    attention,
    hidden,
    init_projections,
    layer_map,
    relations,
    states_tap,
    tap_of,
)
from jaxdistill.losses.loss import parse_loss
from jaxdistill.models.decoder import make_apply
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from tests import tiny

B, T, H = 2, 5, 4


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "pairs"),
    [
        (2, 4, "uniform", [(0, 1), (1, 3)]),
        (3, 3, "uniform", [(0, 0), (1, 1), (2, 2)]),
        (2, 5, "uniform", [(0, 1), (1, 4)]),
        (4, 2, "uniform", [(0, 0), (1, 0), (2, 1), (3, 1)]),  # a student may be the deeper one
        (1, 6, "uniform", [(0, 5)]),
        (2, 4, "last", [(1, 3)]),
    ],
)
def test_which_layer_learns_from_which(student, teacher, layers, pairs):
    assert layer_map(student, teacher, layers) == pairs


def test_an_unknown_map_is_refused():
    with pytest.raises(UserError, match="layers=first given; accepted: uniform, last"):
        layer_map(2, 4, "first")


# --- each term by hand --------------------------------------------------------------------------


def drawn(layers, heads, keys, width, seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden": (layers, B * T, width),
        "queries": (layers, B, T, heads, H),
        "keys": (layers, B, T, keys, H),
        "values": (layers, B, T, keys, H),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def causal():
    return np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))


def look(a, b, t):
    """The distribution of place t over the places up to it."""
    scores = np.array([a[t] @ b[s] / np.sqrt(len(a[t])) for s in range(t + 1)], float)
    e = np.exp(scores - scores.max())
    return e / e.sum()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def test_hidden_is_a_relative_squared_error():
    s, t = drawn(2, 4, 2, 6, 0), drawn(4, 4, 2, 3, 1)
    t["hidden"][:, 0] = 0  # such as padding: not relative, and no division by it
    kernel = np.random.default_rng(2).normal(size=(2, 6, 3)).astype(np.float32)
    projections = to_jax({"hidden": {"kernel": kernel}})
    got = hidden(to_jax(s), to_jax(t), projections, jnp.asarray(causal()))
    for n in range(B * T):
        parts = []
        for pair, (i, j) in enumerate([(0, 1), (1, 3)]):
            error = s["hidden"][i, n] @ kernel[pair] - t["hidden"][j, n]
            parts.append((error**2).sum() / ((t["hidden"][j, n] ** 2).sum() if n else 1))
        assert float(got[n]) == pytest.approx(np.mean(parts), rel=1e-4)


def test_attention_of_equal_heads_and_grouped_keys():
    s, t = drawn(2, 4, 2, 6, 0), drawn(3, 4, 1, 6, 1)
    got = attention(to_jax(s), to_jax(t), {}, jnp.asarray(causal())).reshape(B, T)
    for b, place in np.ndindex(B, T):
        parts = []
        for head in range(4):  # two queries share a key of the student, four of the teacher
            mine = look(s["queries"][1, b, :, head], s["keys"][1, b, :, head // 2], place)
            theirs = look(t["queries"][2, b, :, head], t["keys"][2, b, :, 0], place)
            parts.append(kl(theirs, mine))
        assert float(got[b, place]) == pytest.approx(np.mean(parts), rel=1e-4, abs=1e-6)


def test_attention_of_unequal_heads_compares_their_means():
    s, t = drawn(2, 2, 2, 6, 0), drawn(2, 4, 4, 6, 1)
    got = attention(to_jax(s), to_jax(t), {}, jnp.asarray(causal()), layers="uniform")
    for b, place in np.ndindex(B, T):
        parts = []
        for layer in range(2):
            maps = [
                np.mean(
                    [
                        look(x["queries"][layer, b, :, h], x["keys"][layer, b, :, h], place)
                        for h in range(heads)
                    ],
                    axis=0,
                )
                for x, heads in ((t, 4), (s, 2))
            ]
            parts.append(kl(*maps))
        assert float(got.reshape(B, T)[b, place]) == pytest.approx(np.mean(parts), 1e-4, 1e-6)


@pytest.mark.parametrize("heads", [1, 2.0])
def test_relations_of_models_that_share_nothing(heads):
    s, t = drawn(2, 2, 1, 6, 0), drawn(3, 4, 2, 8, 1)
    got = relations(to_jax(s), to_jax(t), {}, jnp.asarray(causal()), heads=heads).reshape(B, T)
    number = int(heads)
    for b, place in np.ndindex(B, T):
        parts = []
        for name in ("queries", "keys", "values"):
            mine, theirs = (
                x[name][-1, b].reshape(T, number, -1).transpose(1, 0, 2) for x in (s, t)
            )
            parts += [
                kl(look(theirs[h], theirs[h], place), look(mine[h], mine[h], place))
                for h in range(number)
            ]
        assert float(got[b, place]) == pytest.approx(np.mean(parts), rel=1e-4, abs=1e-6)


def test_relation_heads_must_divide_the_states():
    s, t = drawn(2, 2, 1, 6, 0), drawn(3, 4, 2, 8, 1)
    with pytest.raises(UserError, match="relations:heads=3 does not divide the 8 entries"):
        relations(to_jax(s), to_jax(t), {}, jnp.asarray(causal()), heads=3)


# --- inside a loss of real models ---------------------------------------------------------------

SMALL = tiny.config()
LARGE = tiny.config(hidden_size=48, num_layers=4, num_heads=2, num_kv_heads=2)
TEXT = "0.5*hidden+0.3*relations:heads=2+0.2*attention+2*forward_kl:temperature=2"
LOSS = parse_loss(TEXT)


@pytest.fixture(scope="module")
def setting():
    student, teacher = tiny.params(SMALL), tiny.params(LARGE, seed=1)
    student["projections"] = init_projections(LOSS, 64, 48, 2, jax.random.key(0))
    assert student["projections"]["hidden"]["kernel"].shape == (2, 64, 48)
    return student, teacher, tiny.batch(SMALL, rows=2, seq_len=8)


def compiled(batch, text=TEXT, **options):
    """(student, teacher) -> the loss, (count, metrics), and its gradients by both."""
    tap = tap_of(parse_loss(text))
    apply, guide = make_apply(SMALL, tap=tap, **options), make_apply(LARGE, tap=tap)
    objective = kd_objective(apply, guide, text, chunk=5)

    def loss(pair):
        total, count, metrics = objective(*pair, batch)
        return total, (count, metrics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def run(setting):
    """With rematerialisation, as in training; what it gives is held against plain numpy."""
    return compiled(setting[2], remat="full")


def test_the_loss_is_the_weighted_sum_of_masked_means(setting, run):
    student, teacher, batch = setting
    total, (count, metrics) = run((student, teacher))[0]
    tap = states_tap("hidden")
    (output, mine), (guide, theirs) = (
        make_apply(c, tap=tap)(p, batch["tokens"], batch["positions"], batch["segment_ids"])
        for c, p in ((SMALL, student), (LARGE, teacher))
    )
    kernel = np.asarray(student["projections"]["hidden"]["kernel"], float)
    errors = []
    for pair, (i, j) in enumerate([(0, 1), (1, 3)]):
        goal = np.asarray(theirs["hidden"][j], float)
        error = np.asarray(mine["hidden"][i], float) @ kernel[pair] - goal
        errors.append((error**2).sum(-1) / (goal**2).sum(-1))
    counts = np.roll(np.asarray(batch["loss_mask"]), -1, axis=1)
    counts[:, -1] = False
    want = np.mean(errors, axis=0)[counts.reshape(-1)].sum()
    np.testing.assert_allclose(metrics["hidden"], (want, counts.sum()), rtol=1e-4)

    p, q = (softmax(np.asarray(o.logits(), float)[counts] / 2) for o in (guide, output))
    want = 2 * 4 * sum(map(kl, p, q)) + sum(
        weight * metrics[name][0]
        for name, weight in (("hidden", 0.5), ("relations", 0.3), ("attention", 0.2))
    )
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert float(count) == counts.sum() == float(metrics["loss"][1])


def test_gradients_reach_the_student_and_its_projections_and_not_the_teacher(setting, run):
    student, teacher, _ = setting
    _, (gradient, by_teacher) = run((student, teacher))
    for path, g in walk(gradient):
        assert float(jnp.abs(g).max()) > 0, path
    assert not any(np.asarray(g).any() for _, g in walk(by_teacher))
    # Along a random direction in each of these, the loss rises as the gradient says.
    for part in ("layers", "projections"):
        keys = iter(jax.random.split(jax.random.key(0), 64))
        way = jax.tree.map(
            lambda x, keys=keys: jax.random.normal(next(keys), x.shape) * jnp.std(x), student[part]
        )
        slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient[part], way)))
        found = []
        for step in (1e-3, -1e-3):
            moved = jax.tree.map(lambda x, w, step=step: x + step * w, student[part], way)
            found.append(float(run((student | {part: moved}, teacher))[0][0]))
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(float(slope), rel=0.03), part


def test_a_quantized_student_learns_from_states_too(setting):
    student, teacher, batch = setting
    policy = default_policy(QuantSpec(bits=4, group_size=16), tied=True)
    quantized = add_scales(student, policy)
    run = compiled(batch, "0.5*hidden+2*forward_kl", transform=fake_quant_params(policy))
    (_, (_, metrics)), (gradient, _) = run((quantized, teacher))
    # The states are those of the fake-quantized model.
    lattice = fake_quant_params(policy)(quantized)
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    tap = states_tap("hidden")
    mine = make_apply(SMALL, tap=tap)(lattice, *inputs)[1]
    theirs = make_apply(LARGE, tap=tap)(teacher, *inputs)[1]
    mask = jnp.ones((2, 8, 8), bool)
    values = np.asarray(hidden(mine, theirs, lattice["projections"], mask))
    counts = np.roll(np.asarray(batch["loss_mask"]), -1, axis=1)
    counts[:, -1] = False
    want = values[counts.reshape(-1)].sum()
    np.testing.assert_allclose(metrics["hidden"][0], want, rtol=1e-3)
    gradients = dict(walk(gradient))
    kernels = [path for path, _ in walk(student) if path.endswith("kernel")]
    assert len(kernels) == 8  # seven of a layer and the projection
    for path in kernels:
        assert np.isfinite(gradients[path]).all() and np.asarray(gradients[path]).any(), path


def test_equal_models_have_nothing_to_learn():
    params, batch = tiny.params(SMALL), tiny.batch(SMALL, rows=2, seq_len=8)
    loss = parse_loss("hidden+attention:layers=uniform+relations:heads=4,layers=uniform")
    student = params | {"projections": init_projections(loss, 64, 64, 2, jax.random.key(0))}
    apply = make_apply(SMALL, tap=tap_of(loss))
    total = jax.jit(lambda s, t: kd_objective(apply, apply, loss)(s, t, batch)[0])(student, params)
    assert abs(float(total)) < 1e-4


def test_projections_are_for_hidden_states_alone():
    assert init_projections(parse_loss("attention+ce"), 8, 4, 3, jax.random.key(0)) == {}
    last = init_projections(parse_loss("hidden:layers=last"), 8, 4, 3, jax.random.key(0))
    assert last["hidden"]["kernel"].shape == (1, 8, 4)
    same = init_projections(parse_loss("hidden"), 3, 3, 2, jax.random.key(0))
    np.testing.assert_array_equal(same["hidden"]["kernel"], np.stack([np.eye(3)] * 2))
    assert tap_of(parse_loss("forward_kl+ce")) is None


def test_what_is_missing_is_said(setting):
    student, teacher, batch = setting
    tapped = make_apply(SMALL, tap=states_tap("hidden"))
    bare = {name: x for name, x in student.items() if name != "projections"}
    with pytest.raises(UserError, match="hidden compares states inside the models; give a live"):
        kd_objective(make_apply(SMALL), make_apply(LARGE), "hidden")(student, teacher, batch)
    with pytest.raises(UserError, match="needs params\\['projections'\\]; see kd.states.init"):
        kd_objective(tapped, tapped, "hidden")(bare, bare, batch)
