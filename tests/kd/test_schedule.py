"""What changes as a run goes on: ramps to their ends, TAID's t by hand, through the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.schedule import adaptive_taid, ramp, schedule_of
from jaxdistill.kd.step import init_state, make_step
from jaxdistill.losses.loss import Ramp, parse_loss
from jaxdistill.models.decoder import Output


@pytest.mark.parametrize(("start", "stop"), [(4.0, 1.0), (0.1, 0.7), (0.3, 0.3), (1e3, 1e-3)])
@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_a_ramp_is_exact_at_both_ends_and_linear_between(start, stop, steps):
    at = jax.jit(lambda step: ramp(Ramp(start, stop), steps).knobs((), step)[""])
    assert float(at(jnp.int32(0))) == np.float32(start)
    assert float(at(jnp.int32(steps - 1))) == np.float32(stop)
    assert float(at(jnp.int32(steps + 5))) == np.float32(stop)
    np.testing.assert_allclose(at(jnp.int32(1)), start + (stop - start) / (steps - 1), rtol=1e-5)


def taid_by_hand(losses, steps, start, stop, alpha, beta):
    """The t of each step: Algorithm 1 of arXiv 2501.16937, one plain loop."""
    t, momentum, before, seen = start, 0.0, None, []
    for n, loss in enumerate(losses, 1):
        seen.append(t)
        change = 0.0 if before is None else (before - loss) / before
        momentum = beta * momentum + (1 - beta) * change
        rise = alpha / (1 + np.exp(-momentum)) * (1 - t)
        t = min(stop, max(start + (stop - start) * n / steps, t + rise))
        before = loss
    return seen, t


@pytest.mark.parametrize("alpha", [5e-4, 0.8])
def test_adaptive_t_is_the_papers(alpha):
    losses = [5.0, 3.0, 2.0, 2.5, 1.0, 0.9, 0.9, 0.1]
    options = {"start": 0.4, "stop": 1.0, "alpha": alpha, "beta": 0.8}
    want, last = taid_by_hand(losses, len(losses), **options)
    schedule = adaptive_taid(len(losses), **options)
    state, seen = schedule.init(), []
    for step, loss in enumerate(losses):
        seen.append(float(schedule.knobs(state, jnp.int32(step))[""]))
        state = schedule.update(state, jnp.int32(step), jnp.float32(loss))
    np.testing.assert_allclose(seen, want, rtol=1e-5)
    assert float(state["t"]) == pytest.approx(last) and seen == sorted(seen)
    linear = [0.4 + 0.6 * n / len(losses) for n in range(len(losses))]
    ahead = np.array(seen) - linear
    assert (ahead > 0.01).any() if alpha == 0.8 else (ahead < 1e-6).all()


def test_the_step_hands_the_knobs_in_and_moves_them_on():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    student, teacher = {"h": {"kernel": draw(1, 6, 5)}}, {"h": {"kernel": draw(1, 6, 5)}}
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 5, (1, 6)), jnp.int32),
        "loss_mask": jnp.ones((1, 6), bool),
    }

    def apply(params, tokens, positions=None, segment_ids=None):
        return Output(params["h"]["kernel"], jnp.eye(5))

    loss, steps, tx = parse_loss("taid+0.5*forward_kl:temperature=4..1"), 5, optax.sgd(2.0)
    schedule = schedule_of(loss, steps)
    step = make_step(kd_objective(apply, apply, loss), tx, schedule=schedule)
    state, losses, seen, temperatures = init_state(student, tx, schedule), [], [], []
    for _ in range(steps):
        state, metrics = step(state, teacher, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        seen.append(float(metrics["taid.t"][0]))
        temperatures.append(float(metrics["forward_kl.temperature"][0]))
    assert len(set(losses)) == steps
    np.testing.assert_allclose(
        seen, taid_by_hand(losses, steps, 0.4, 1.0, 5e-4, 0.99)[0], rtol=1e-5
    )
    np.testing.assert_allclose(temperatures, [4, 3.25, 2.5, 1.75, 1], rtol=1e-6)
    assert step._cache_size() == 1  # what moves is traced


def test_nothing_moves_or_nobody_knows_how():
    assert schedule_of(parse_loss("jsd:beta=0.3+ce"), 10) is None
    with pytest.raises(UserError, match="cakld.confidence is 'measured'; accepted: a number"):
        schedule_of(parse_loss("cakld"), 10)
    z = jnp.zeros((1, 3))
    with pytest.raises(UserError, match="taid.t is 'adaptive', which changes as the run goes on"):
        parse_loss("taid").rows(z, z, jnp.zeros(1, jnp.int32), {})
