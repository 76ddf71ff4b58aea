"""Divergences against TRL, Liger and torch's kl_div: value and gradient.

The generalized JSD of TRL and Liger mixes as ours does, ``m = beta teacher + (1 - beta) student``,
and weighs ``KL(teacher || m)`` with beta; it has no factor ``temperature^2``. At the ends it is
another function: beta 0 gives ``KL(teacher || student)``, our ``forward_kl``, and beta 1 gives
``KL(student || teacher)``, our ``reverse_kl``.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.losses.loss import parse_loss
from jaxdistill.models.decoder import Output

torch = pytest.importorskip("torch")
F = torch.nn.functional
N, V, D = 10, 23, 8


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [(2 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def ours(text, z, z_t):
    def total(z):
        return jnp.sum(parse_loss(text).rows(z, jnp.asarray(z_t), jnp.zeros(N, jnp.int32), {}))

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(z))
    return float(value), np.asarray(gradient)


def compare(text, theirs, factor=1.0):
    """Theirs maps torch logits of student and teacher to a sum over rows."""
    z, z_t = drawn((N, V), (N, V))
    leaf = torch.tensor(z, requires_grad=True)
    total = factor * theirs(leaf, torch.tensor(z_t))
    total.backward()
    value, gradient = ours(text, z, z_t)
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    want = leaf.grad.numpy()
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6 * abs(want).max())


JSD = [
    ("jsd:beta={beta},temperature={T}", 0.0),
    ("jsd:beta={beta},temperature={T}", 1.0),
    ("jsd:beta={beta},temperature={T}", 0.1),
    ("jsd:beta={beta},temperature={T}", 0.5),
    ("jsd:beta={beta},temperature={T}", 0.9),
    ("forward_kl:temperature={T}", 0.0),
    ("reverse_kl:temperature={T}", 1.0),
]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("text", "beta"), JSD)
def test_generalized_jsd_of_trl(text, beta, temperature, monkeypatch):
    monkeypatch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")  # else it warns on import
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")

    def theirs(z, z_t):
        return gkd.GKDTrainer.generalized_jsd_loss(
            z[None], z_t[None], beta=beta, temperature=temperature, reduction="sum"
        )

    compare(text.format(beta=beta, T=temperature), theirs, factor=temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("text", "beta"), JSD)
def test_fused_linear_jsd_of_liger(text, beta, temperature):
    """Liger's chunked head in plain torch against ours: value and both gradients."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    h, e, h_t, e_t = (0.5 * x for x in drawn((N + 1, D), (V, D), (N + 1, D), (V, D)))
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, V, N + 1), rng.random(N + 1) < 0.7
    labels = torch.tensor(np.where(mask, tokens, -100)[1:])
    counted = int(mask[1:].sum())
    leaves = [torch.tensor(x, requires_grad=True) for x in (h[:-1], e)]
    mean = liger.LigerFusedLinearJSDFunction.apply(
        *leaves, torch.tensor(h_t[:-1]), torch.tensor(e_t), labels, None, None,
        0.5, 0.5, beta, -100, temperature, False, 4,
    )  # fmt: skip
    mean.backward()

    def head(params, tokens, positions=None, segment_ids=None):
        return Output(params["h"][None], params["e"])

    # Their hard loss is at temperature 1, their soft one has no factor temperature^2.
    loss = f"{0.5 / temperature**2}*{text.format(beta=beta, T=temperature)}+0.5*ce"
    objective = kd_objective(head, head, loss, chunk=4)
    teacher = {"h": jnp.asarray(h_t), "e": jnp.asarray(e_t)}
    batch = {"tokens": jnp.asarray(tokens, jnp.int32)[None], "loss_mask": jnp.asarray(mask)[None]}

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return objective(params, teacher, batch)[0] / counted

    value, gradient = total({"h": jnp.asarray(h), "e": jnp.asarray(e)})
    np.testing.assert_allclose(float(value), mean.item(), rtol=1e-5)
    for got, leaf in ((gradient["h"][:-1], leaves[0]), (gradient["e"], leaves[1])):
        want = leaf.grad.numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


def kl_div(log_p, log_q):
    """KL(p || q), which torch takes the other way round."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def mixed(log_a, log_b, share):
    return torch.log(share * log_a.exp() + (1 - share) * log_b.exp())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        ("forward_kl:temperature={T}", kl_div),
        ("reverse_kl:temperature={T}", lambda p, q: kl_div(q, p)),
        ("jeffreys:temperature={T}", lambda p, q: kl_div(p, q) + kl_div(q, p)),
        ("skew_forward_kl:temperature={T}", lambda p, q: kl_div(p, mixed(p, q, 0.1))),
        ("skew_reverse_kl:temperature={T}", lambda p, q: kl_div(q, mixed(q, p, 0.1))),
        (
            "cakld:confidence=0.3,temperature={T}",
            lambda p, q: 0.3 * kl_div(q, p) + 0.7 * kl_div(p, q),
        ),
        ("total_variation:temperature={T}", lambda p, q: 0.5 * F.l1_loss(p.exp(), q.exp()) * N * V),
    ],
)
def test_composed_of_torchs_kl_div(text, theirs, temperature):
    def total(z, z_t):
        return theirs(*(F.log_softmax(x / temperature, -1) for x in (z_t, z)))

    compare(text.format(T=temperature), total, factor=temperature**2)


def test_taid_with_torchs_detach():
    def total(z, z_t):
        goal = F.log_softmax(0.7 * z.detach() + 0.3 * z_t, -1)
        return kl_div(goal, F.log_softmax(z, -1))

    compare("taid:t=0.3", total)
