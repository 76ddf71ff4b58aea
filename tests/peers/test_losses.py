"""The objective against torch's kl_div and cross_entropy, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import Output

torch = pytest.importorskip("torch")

ROWS, SEQ, D, V = 3, 9, 16, 41


def head(params, tokens, positions=None, segment_ids=None):
    return Output(params["h"], params["e"])


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (3.0, 0.25)])
def test_loss_and_gradient_equal_torch(temperature, ce_weight):
    rng = np.random.default_rng(0)
    arrays = {
        k: rng.normal(size=s).astype(np.float32)
        for k, s in (("h", (ROWS, SEQ, D)), ("e", (V, D)), ("th", (ROWS, SEQ, D)), ("te", (V, D)))
    }
    tokens = rng.integers(0, V, (ROWS, SEQ))
    mask = rng.random((ROWS, SEQ)) < 0.7
    terms = {f"forward_kl:temperature={temperature}": 1 - ce_weight, "ce": ce_weight}
    loss = "+".join(f"{weight}*{term}" for term, weight in terms.items() if weight)
    objective = kd_objective(head, head, loss, chunk=5)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "loss_mask": jnp.asarray(mask)}
    student = {k: jnp.asarray(arrays[k]) for k in ("h", "e")}
    teacher = {"h": jnp.asarray(arrays["th"]), "e": jnp.asarray(arrays["te"])}
    got, gradient = jax.value_and_grad(lambda p: objective(p, teacher, batch)[0])(student)

    h, e = (torch.tensor(arrays[k], requires_grad=True) for k in ("h", "e"))
    keep = torch.tensor(mask)[:, 1:]
    z_s = (h @ e.T)[:, :-1][keep]
    z_t = (torch.tensor(arrays["th"]) @ torch.tensor(arrays["te"]).T)[:, :-1][keep]
    f = torch.nn.functional
    kl = f.kl_div(
        f.log_softmax(z_s / temperature, -1),
        f.log_softmax(z_t / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    nll = f.cross_entropy(z_s, torch.tensor(tokens)[:, 1:][keep], reduction="sum")
    want = (1 - ce_weight) * temperature**2 * kl + ce_weight * nll
    want.backward()
    np.testing.assert_allclose(float(got), want.item(), rtol=1e-5)
    for name, leaf in (("h", h), ("e", e)):
        wanted = leaf.grad.numpy()
        np.testing.assert_allclose(
            gradient[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()
        )
