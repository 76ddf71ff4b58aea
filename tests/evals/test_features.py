"""Features of texts: against the model run on each text alone, whatever stands beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.features import (
    embed,
    embedding_table,
    moments,
    text_features,
    token_ids,
)
from jaxdistill.models.hub import load_model
from tests import tiny

TEXTS = ["hello", "", "a longer text, of more than sixteen bytes", "b" * 40, "hello"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_model(tmp_path_factory.mktemp("m") / "model"))


def test_a_text_has_the_mean_of_its_own_hidden_states(model):
    apply = jax.jit(model.apply_fn())
    told = []
    found = text_features(model, TEXTS, seq_len=24, batch_size=3, progress=told.append)
    assert sum(told) == 5
    last = text_features(model, TEXTS, seq_len=24, batch_size=2, pool="last")
    for i, text in enumerate(TEXTS):
        ids = model.tokenizer(text)["input_ids"][:24]
        if not ids:
            assert not found[i].any() and not last[i].any()
            continue
        row = jnp.asarray(
            [ids + [7] * (24 - len(ids))], jnp.int32
        )  # causal: what follows is unseen
        hidden = np.asarray(apply(model.params, row).hidden[0, : len(ids)])
        np.testing.assert_allclose(found[i], hidden.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(last[i], hidden[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[4])


def test_fewer_layers_and_wrong_options(model):
    """One layer is the model whose config has one layer."""
    one = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, num_layers=1),
        params={
            **model.params,
            "layers": {
                part: {
                    name: {k: v[:1] for k, v in leaf.items()}
                    if isinstance(leaf, dict)
                    else leaf[:1]
                    for name, leaf in parts.items()
                }
                for part, parts in model.params["layers"].items()
            },
        },
    )
    got = text_features(model, TEXTS[:1], seq_len=16, layers=1)
    want = text_features(one, TEXTS[:1], seq_len=16)
    np.testing.assert_array_equal(got, want)
    assert not np.allclose(got, text_features(model, TEXTS[:1], seq_len=16))
    with pytest.raises(UserError, match="accepted: 1 to 2"):
        text_features(model, TEXTS, layers=3)
    with pytest.raises(UserError, match="--seq-len 4096 given .* 128 positions"):
        text_features(model, TEXTS, seq_len=4096)
    with pytest.raises(UserError, match="pool 'first' given; accepted: mean, last"):
        text_features(model, TEXTS, pool="first")


def test_embeddings_are_rows_of_the_table(model):
    found = embed(embedding_table(model), *token_ids(model, TEXTS, 20))
    table = np.asarray(model.params["embed_tokens"]["embedding"])
    assert found.shape == (5, 20, 64)
    for row, text in zip(found, TEXTS, strict=True):
        ids = model.tokenizer(text)["input_ids"][:20]
        np.testing.assert_array_equal(row[: len(ids)], table[ids])
        assert not row[len(ids) :].any()


def test_moments_of_features_and_channels():
    rng = np.random.default_rng(0)
    train = rng.normal(3, 2, (50, 4)).astype(np.float32)
    train[:, 3] = 7  # says nothing, and must not divide by zero
    mean, deviation = moments(train)
    np.testing.assert_allclose(mean, train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(deviation[:3], train.std(0)[:3], rtol=1e-5)
    least = 0.1 * np.sqrt(np.mean(train.std(0) ** 2))
    np.testing.assert_allclose(deviation[3], least, rtol=1e-5)
    mean, deviation = moments(rng.normal(0, 1, (6, 5, 5, 3)).astype(np.float32))
    assert mean.shape == deviation.shape == (3,)
    assert moments(np.zeros((4, 2, 2), np.float32))[1].shape == ()
