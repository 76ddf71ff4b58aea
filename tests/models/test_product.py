"""Products: sums in float32, and no float32 operands behind bfloat16 ones, backward either."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.product import contract
from tests import tiny

SPECS = {
    "ni,io->no": ((6, 8), (8, 10)),
    "ni,oi->no": ((6, 8), (10, 8)),
    "bkmh,bksh->bkms": ((2, 3, 4, 8), (2, 3, 5, 8)),
    "bkms,bksh->bkmh": ((2, 3, 4, 5), (2, 3, 5, 8)),
}


def operands(how, dtype):
    a, b = SPECS[how]
    keys = jax.random.split(jax.random.key(0), 3)
    out = jax.eval_shape(lambda x, y: jnp.einsum(how, x, y), jnp.ones(a), jnp.ones(b)).shape
    a, b, ct = (jax.random.normal(k, s) for k, s in zip(keys, (a, b, out), strict=True))
    return a.astype(dtype), b, ct


@pytest.mark.parametrize("how", SPECS)
def test_gradients_of_a_bfloat16_product_are_those_of_its_rounded_operands(how):
    a, b, ct = operands(how, jnp.bfloat16)
    y, pull = jax.vjp(lambda a, b: contract(how, a, b), a, b)
    by_a, by_b = pull(ct)
    assert (y.dtype, by_a.dtype, by_b.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)

    def rounded(x):
        return np.asarray(x.astype(jnp.bfloat16), np.float64)

    a64, b64, ct64 = rounded(a), rounded(b), rounded(ct)
    (of_a, of_b), of_ct = how.split("->")[0].split(","), how.split("->")[1]
    np.testing.assert_allclose(y, np.einsum(how, a64, b64), rtol=1e-5, atol=1e-5)
    want = np.einsum(f"{of_ct},{of_b}->{of_a}", ct64, b64)
    np.testing.assert_allclose(np.asarray(by_a, np.float64), want, rtol=2**-7, atol=1e-4)
    want = np.einsum(f"{of_a},{of_ct}->{of_b}", a64, ct64)
    np.testing.assert_allclose(by_b, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", SPECS)
def test_float32_products_are_einsum_in_every_mode(how):
    a, b, ct = operands(how, jnp.float32)

    def ours(a):
        return jnp.sum(ct * contract(how, a, b) ** 2)

    def theirs(a):
        return jnp.sum(ct * jnp.einsum(how, a, b) ** 2)

    along = [jax.jvp(jax.grad(f), (a,), (jnp.ones_like(a),))[1] for f in (ours, theirs)]
    np.testing.assert_allclose(*along, rtol=1e-5, atol=1e-5)


def step_of(dtype, **options):
    c = tiny.config()
    # Weights as training starts from: where attention is sharp, bfloat16 alone turns gradients.
    params, batch, tx = init_params(c, jax.random.key(0)), tiny.batch(c), adamw(1e-2, 10)
    apply = make_apply(c, dtype=dtype, **options)
    teacher = jax.tree.map(lambda x: 3.0 * x, params)
    step = make_step(kd_objective(apply, apply), tx)
    return step, (init_state(params, tx), teacher, batch)


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_a_bfloat16_step_multiplies_by_bfloat16_alone(remat):
    step, args = step_of(jnp.bfloat16, remat=remat)
    text = step.lower(*args).as_text()
    found = re.findall(r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text)
    assert len(found) > 20 and set(found) == {("bf16", "bf16")}


def test_a_bfloat16_step_goes_where_a_float32_one_goes():
    moved = []
    for dtype in (jnp.float32, jnp.bfloat16):
        step, (state, teacher, batch) = step_of(dtype)
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = step(state, teacher, batch)
        total, count = metrics["loss"]
        change = jax.tree.map(lambda a, b: a - b, state.params, before)
        moved.append((float(total / count), float(metrics["grad_norm"][0]), change))
    (loss, norm, change), (loss16, norm16, change16) = moved
    assert abs(loss16 - loss) < 0.02 * loss and abs(norm16 - norm) < 0.02 * norm
    same = optax.tree.vdot(change, change16)
    assert same > 0.9 * optax.tree.norm(change) * optax.tree.norm(change16)
