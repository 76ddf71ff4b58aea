"""On-policy text: whose it is, where it stands, when it is drawn, and that no gradient passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.sequence_level import teacher_text
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling, generate
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from tests import tiny

C = tiny.config(vocab_size=24, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1)
APPLY, STUDENT = make_apply(C), tiny.params(C)
TEACHER = tiny.params(C, seed=1)
POLICY = default_policy(QuantSpec(ranges="absmax"), tied=True)
T, P = 14, 5
LENGTHS = (3, 5, 1, 4)  # of the prompts
GREEDY, DRAWN = Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, temperature=1.0)


def make_batch(lengths=LENGTHS):
    """Makes rows of a prompt and an answer that fills the row up to two places."""
    rng = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(T), (len(lengths), T))
    text = place < T - 2
    return {
        "tokens": jnp.asarray(np.where(text, rng.integers(1, 24, place.shape), 0), jnp.int32),
        "loss_mask": jnp.asarray(text & (place >= np.array(lengths)[:, None])),
        "segment_ids": jnp.asarray(text, jnp.int32),
        "positions": jnp.asarray(np.where(text, place, 0), jnp.int32),
    }


BATCH = make_batch()


@functools.cache  # what is compiled is shared
def rollout_of(how=DRAWN, share=1.0, stop=(), **options):
    options = {"prompt_length": P} | options
    return jax.jit(make_rollout(APPLY, C, how=how, share=share, stop=stop, **options))


def drawn(step, seed=0):
    return {k: np.asarray(v) for k, v in rollout_of(seed=seed)(STUDENT, BATCH, step).items()}


def expected(prompts, answers):
    """Lays prompts and answers out by hand."""
    out = {k: np.zeros((len(prompts), T), np.asarray(v).dtype) for k, v in BATCH.items()}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = [*prompt, *answer][:T]
        out["tokens"][row, : len(text)] = text
        out["loss_mask"][row, len(prompt) : len(text)] = True
        out["segment_ids"][row, : len(text)] = 1
        out["positions"][row, : len(text)] = range(len(text))
    return out


@functools.cache
def fake_student():
    """Makes the student's lattice values, in the tree that a float student has."""
    return jax.jit(fake_quant_params(POLICY))(add_scales(STUDENT, POLICY))


def prompts_of(batch, lengths=LENGTHS):
    return [np.asarray(row)[:n].tolist() for row, n in zip(batch["tokens"], lengths, strict=True)]


def test_greedy_text_is_that_of_generate_behind_untouched_prompts():
    prompts = prompts_of(BATCH)
    answers = generate(APPLY, STUDENT, C, prompts, how=GREEDY, stop=[])
    found = rollout_of(GREEDY)(STUDENT, BATCH, 0)
    jax.tree.map(np.testing.assert_array_equal, dict(found), expected(prompts, answers))
    assert not np.array_equal(found["tokens"], BATCH["tokens"])


def test_a_stop_token_ends_a_row_and_is_its_last_target():
    prompts = prompts_of(BATCH)
    free = generate(APPLY, STUDENT, C, prompts, how=GREEDY, stop=[])
    stop = free[0][2]
    answers = [a[: a.index(stop) + 1] if stop in a else a for a in free]
    assert len(answers[0]) < 6 == max(map(len, answers))
    found = rollout_of(GREEDY, stop=(stop,))(STUDENT, BATCH, 0)
    jax.tree.map(np.testing.assert_array_equal, dict(found), expected(prompts, answers))
    # A row that stops at once is one target, even where every row does.
    batch = {k: v[:1] for k, v in BATCH.items()}
    found = rollout_of(GREEDY, stop=tuple(range(24)))(STUDENT, batch, 0)
    jax.tree.map(np.testing.assert_array_equal, dict(found), expected(prompts[:1], [free[0][:1]]))


def test_long_prompts_keep_their_end_long_answers_their_start_and_padding_stays():
    lengths = (8, 2, 12)  # the last row has no target left
    batch = make_batch(lengths)
    prompts = [np.asarray(batch["tokens"])[0, 3:8].tolist(), prompts_of(batch, lengths)[1]]
    how = Sampling(max_new_tokens=50)
    answers = generate(APPLY, STUDENT, C, prompts, how=Sampling(max_new_tokens=13), stop=[])
    found = rollout_of(how)(STUDENT, batch, 0)
    want = expected(prompts, answers)
    for name, x in found.items():
        np.testing.assert_array_equal(x[:2], want[name], err_msg=name)
        np.testing.assert_array_equal(x[2], batch[name][2], err_msg=name)


def test_seed_and_step_decide_what_is_drawn():
    jax.tree.map(np.testing.assert_array_equal, drawn(3), drawn(3))
    assert not np.array_equal(drawn(3)["tokens"], drawn(4)["tokens"])
    assert not np.array_equal(drawn(3)["tokens"], drawn(3, seed=1)["tokens"])
    assert prompts_of(drawn(3)) == prompts_of(drawn(4)) == prompts_of(BATCH)


def test_a_share_of_the_steps_is_on_policy():
    never, half = rollout_of(share=0), rollout_of(share=0.5)
    own = []
    for step in range(64):
        found = half(STUDENT, BATCH, step)
        own.append(not np.array_equal(found["tokens"], BATCH["tokens"]))
        want = drawn(step) if own[-1] else BATCH
        jax.tree.map(np.testing.assert_array_equal, dict(found), dict(want))
    assert 20 <= sum(own) <= 44  # 32 +- 3 standard deviations
    jax.tree.map(np.testing.assert_array_equal, dict(never(STUDENT, BATCH, 0)), BATCH)
    # On the other steps nothing is sampled: the compiled program has the loop behind a condition.
    assert "cond" in str(jax.make_jaxpr(half)(STUDENT, BATCH, 0))
    assert "while" not in str(jax.make_jaxpr(never)(STUDENT, BATCH, 0))


def log_probs_of(params, batch):
    """Returns each target's log-probability by a full forward, [B, T]."""
    out = APPLY(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    found = jax.nn.log_softmax(out.logits()[:, :-1], axis=-1)
    found = jnp.take_along_axis(found, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.where(batch["loss_mask"], jnp.pad(found, ((0, 0), (1, 0))), 0.0)


def test_behaviour_log_probs_are_those_of_a_full_forward():
    """Cached, left-padded sampling sees what the loss will see, right-padded and whole."""
    found = rollout_of(log_probs=True)(STUDENT, BATCH, 0)
    want = log_probs_of(STUDENT, found)
    assert float(jnp.abs(want).max()) > 0.1
    np.testing.assert_allclose(found["behaviour_log_probs"], want, atol=2e-5, rtol=0)


def test_no_gradient_passes_through_the_sampling():
    """The batch's float depends on the params in value, and must not in gradient.

    Were the params not stopped, the gradient would have a second part (or, for the loop within,
    fail).
    """
    rollout = rollout_of(log_probs=True)

    def loss(params, batch):
        ratio = log_probs_of(params, batch) - batch["behaviour_log_probs"]
        return jnp.sum(jnp.exp(ratio))

    through = jax.jit(jax.grad(lambda params: loss(params, rollout(params, BATCH, 0))))(STUDENT)
    fixed = jax.jit(jax.grad(loss))(STUDENT, rollout(STUDENT, BATCH, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), through, fixed)
    assert optax.tree.norm(fixed) > 1
    moved = jax.tree.map(lambda x: 1.1 * x, STUDENT)
    values = [rollout(p, BATCH, 0)["behaviour_log_probs"] for p in (STUDENT, moved)]
    assert float(jnp.abs(values[0] - values[1]).max()) > 1e-3


def test_a_step_on_policy_is_a_step_on_that_text():
    """Within make_step, with micro-batches, weights and a fake-quantized student."""
    fake, tx = fake_quant_params(POLICY), optax.sgd(0.1)
    student = add_scales(STUDENT, POLICY)
    objective = kd_objective(make_apply(C, transform=fake), APPLY, "policy_gradient+jsd:beta=0.5")
    rollout = make_rollout(APPLY, C, prompt_length=P, how=DRAWN, stop=(), share=1, prepare=fake)
    batch = BATCH | {"weights": jnp.full((4, T), 0.25)}
    got, metrics = make_step(objective, tx, accumulate=2, rollout=rollout)(
        init_state(student, tx), TEACHER, batch
    )
    text = rollout_of()(fake_student(), BATCH, 0)
    # A row's weight passes on to what is written in it; alike everywhere, it changes no mean.
    assert float(metrics["loss"][1]) == 0.25 * float(text["loss_mask"].sum())
    want, _ = make_step(objective, tx)(init_state(student, tx), TEACHER, text)
    leaves = (jax.tree.leaves(tree) for tree in (student, got.params, want.params))
    for before, a, b in zip(*leaves, strict=True):
        if before.dtype == jnp.float32:  # sums in another order
            moved = float(jnp.abs(b - before).max())
            assert moved > 0
            np.testing.assert_allclose(a, b, atol=1e-3 * moved, rtol=1e-6)


def test_training_on_its_own_text_brings_the_student_to_the_teacher():
    """Reverse KL, measured on what the student then writes, falls."""
    student = jax.tree.map(lambda x, y: x + 0.3 * (y - x), TEACHER, STUDENT)
    objective = kd_objective(APPLY, APPLY, "reverse_kl")
    tx = adamw(3e-3, 60)
    rollout = make_rollout(APPLY, C, prompt_length=P, how=DRAWN, stop=(), share=1)
    step, state = make_step(objective, tx, rollout=rollout), init_state(student, tx)
    batch, losses = make_batch(LENGTHS * 8), []
    for _ in range(60):
        state, metrics = step(state, TEACHER, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:2])


def test_the_teachers_text_is_its_greedy_answers_batch_by_batch():
    rows = {k: np.asarray(v) for k, v in BATCH.items()}
    answers = generate(APPLY, TEACHER, C, prompts_of(BATCH), how=GREEDY, stop=[2])
    free = generate(APPLY, TEACHER, C, prompts_of(BATCH), how=GREEDY, stop=[])
    answers = [f[: len(a) + 1] for a, f in zip(answers, free, strict=True)]  # the stop token too
    done = []
    found = teacher_text(
        APPLY, TEACHER, C, rows, prompt_length=P, how=GREEDY, stop=[2], batch_size=3,
        progress=done.append,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, expected(prompts_of(BATCH), answers))
    assert done == [3, 4]
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in rows.items()}
    with pytest.raises(UserError, match="4 rows in batches of 0 given"):
        teacher_text(
            APPLY, TEACHER, C, rows, prompt_length=P, how=GREEDY, stop=[], batch_size=0
        )  # fmt: skip


def test_bad_rollouts_are_named():
    with pytest.raises(UserError, match=r"share of 1.5 on-policy steps given; accepted: 0 to 1"):
        rollout_of(share=1.5)
    with pytest.raises(UserError, match=r"prompt_length 14 for rows of 14 .* accepted: 1 to 13"):
        rollout_of(prompt_length=14)(STUDENT, BATCH, 0)
    with pytest.raises(UserError, match=r"a batch with teacher_indices given"):
        rollout_of()(STUDENT, BATCH | {"teacher_indices": BATCH["tokens"][..., None]}, 0)
    wide = {k: jnp.tile(v, (1, 10)) for k, v in BATCH.items()}
    with pytest.raises(UserError, match="100 tokens and 100 new ones exceed the model's 128"):
        rollout_of(Sampling(max_new_tokens=100), prompt_length=100)(STUDENT, wide, 0)
