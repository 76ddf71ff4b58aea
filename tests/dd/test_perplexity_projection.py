"""Readable projections against exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.dd.perplexity_projection import perplexity_projected
from jaxdistill.errors import UserError
from jaxdistill.models.decoder import Output, init_params, make_apply
from tests import tiny

V, T, D = 5, 4, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bigram_lm(log_table, tokens):
    """An ``ApplyFn`` of the table; 3 is added to all logits, which changes nothing."""
    hidden = jax.nn.one_hot(tokens, log_table.shape[0])
    return Output(hidden=hidden, head=log_table.T + 3.0)


def log_table(seed=7):
    logits = 2 * normal(V, V, seed=seed).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def score(x, table, logs, ids, weight, rho, before):
    """Sum of what the projection says that it makes largest, written out."""
    total, last = 0.0, before
    for t, token in enumerate(ids):
        total -= rho / 2 * ((x[t] - table[token]) ** 2).sum()
        total += weight * logs[last, token] if last is not None else 0.0
        last = token
    return total


def nearest(x, table, k):
    return ((x[:, None] - table[None]) ** 2).sum(-1).argsort(1)[:, :k]


def exhaustive(x, table, logs, k, **how):
    every = itertools.product(*nearest(x, table, k))
    return max(every, key=lambda ids: score(x, table, logs, ids, **how))


def project(x, table, logs, **how):
    as_arrays = (jnp.asarray(x), jnp.asarray(table), bigram_lm, jnp.asarray(logs, jnp.float32))
    return np.asarray(perplexity_projected(*as_arrays, **how))


# Wide enough for every prefix of 3 candidates a place. One set of shapes, so that all of these
# tests share one compiled search.
WIDE = {"candidates": 3, "beam": 3 ** (T - 1), "batch_size": 3}
BEFORE = (4, 0, 1, 2, 3, 0)
PREFIX = jnp.asarray([[2, b] for b in BEFORE], jnp.int32)


@pytest.mark.parametrize(("weight", "rho"), [(0.0, 1.0), (1.5, 2.5), (1.0, 0.0)])
def test_a_wide_beam_finds_the_best_of_all_sequences(weight, rho):
    x, table, logs = normal(6, T, D), normal(V, D, seed=1), log_table()
    how = {"weight": weight, "rho": rho}
    got = project(x, table, logs, prefix=PREFIX, **WIDE, **how)
    expected = [exhaustive(x[i], table, logs, 3, before=BEFORE[i], **how) for i in range(6)]
    np.testing.assert_array_equal(got, expected)
    if weight == 0:
        np.testing.assert_array_equal(got, [nearest(row, table, 1)[:, 0] for row in x])
    elif rho:
        assert (got != [nearest(row, table, 1)[:, 0] for row in x]).any()


def test_without_a_prefix_distance_alone_judges_the_first_token():
    x, table, logs = normal(6, T, D), normal(V, D, seed=1), log_table()
    got = project(x, table, logs, weight=2.0, candidates=V, beam=V ** (T - 1))
    expected = [exhaustive(r, table, logs, V, weight=2.0, rho=1.0, before=None) for r in x]
    np.testing.assert_array_equal(got, expected)


def test_a_beam_of_one_is_greedy_and_a_wider_one_scores_no_lower():
    x, table, logs = normal(6, T, D, seed=2), normal(V, D, seed=1), log_table()
    how = {"weight": 3.0, "rho": 1.0}

    def greedy(row, last):
        ids = []
        for t, choices in enumerate(nearest(row, table, 3)):
            each = [score(row[t:][:1], table, logs, [v], before=last, **how) for v in choices]
            last = int(choices[np.argmax(each)])
            ids.append(last)
        return ids

    narrow, wide = (
        project(x, table, logs, prefix=PREFIX, **(WIDE | {"beam": b}), **how)
        for b in (1, WIDE["beam"])
    )
    np.testing.assert_array_equal(narrow, [greedy(x[i], BEFORE[i]) for i in range(6)])
    scores = [
        [score(x[i], table, logs, ids[i], before=BEFORE[i], **how) for i in range(6)]
        for ids in (narrow, wide)
    ]
    assert (np.array(scores[1]) >= scores[0]).all() and np.mean(scores[1]) > np.mean(scores[0])


def test_forbidden_tokens_are_never_written_even_where_candidates_run_out():
    x, table, logs = normal(6, T, D), normal(V, D, seed=1), log_table()
    allowed = jnp.asarray([True, False, False, True, False])
    for rho in (0.0, 1.0):
        got = project(x, table, logs, weight=1.0, rho=rho, prefix=PREFIX, allowed=allowed, **WIDE)
        assert set(got.reshape(-1)) <= {0, 3}


def test_a_decoder_judges_and_is_not_shown_what_follows():
    c = tiny.config(vocab_size=24, num_layers=1)
    shapes = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes
    )
    apply, table = make_apply(c), params["embed_tokens"]["embedding"]
    x = table[jnp.array([[3, 9, 20], [7, 1, 2]])] + 0.5 * jnp.asarray(normal(2, 3, 64))
    prefix = jnp.ones((2, 1), jnp.int32)
    got = perplexity_projected(
        x, table, apply, params, weight=3.0, candidates=3, beam=9, prefix=prefix
    )
    choices = [nearest(np.asarray(row), np.asarray(table), 3) for row in x]
    every = np.array([list(itertools.product(*ids)) for ids in choices], np.int32)  # [2, 27, 3]
    tokens = np.pad(every.reshape(54, 3), ((0, 0), (1, 0)), constant_values=1)
    logits = np.asarray(jax.jit(lambda p, t: apply(p, t).logits())(params, tokens), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    likely = np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1).sum((1, 2)).reshape(2, 27)
    away = ((np.asarray(table)[every] - np.asarray(x)[:, None]) ** 2).sum((2, 3))
    best = (3.0 * likely - 0.5 * away).argmax(1)
    np.testing.assert_array_equal(got, every[[0, 1], best])


def test_what_cannot_be_searched_is_refused():
    x, table, logs = normal(1, T, D), normal(V + 1, D), log_table()
    with pytest.raises(
        UserError, match="embeddings of 6 tokens given beside a language model of 5"
    ):
        project(x, table, logs, weight=1.0)
    with pytest.raises(UserError, match="beam=0"):
        project(x, table, logs, weight=1.0, beam=0)
