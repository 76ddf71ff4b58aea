"""Generation: greedy is the argmax of full forwards; sampling follows its distribution; stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models import generate as generation
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling, draw, generate
from jaxdistill.models.hub import load_model
from tests import tiny

C = tiny.config()
APPLY, PARAMS = make_apply(C), tiny.params(C)
FULL = jax.jit(lambda tokens: APPLY(PARAMS, tokens).logits())


def greedy_by_full_forwards(prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        row = tokens + [0] * (48 - len(tokens))  # one shape; no token sees what comes after it
        logits = FULL(jnp.asarray([row], jnp.int32))
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_equals_full_forwards_for_prompts_of_several_lengths():
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6] * 40]
    got = generate(APPLY, PARAMS, C, prompts, how=Sampling(max_new_tokens=8), stop=[])
    assert got == [greedy_by_full_forwards(p, 8) for p in prompts]


def test_stops_at_the_first_stop_token_without_it():
    prompt = [3, 1, 4, 1, 5]
    free = generate(APPLY, PARAMS, C, [prompt], how=Sampling(max_new_tokens=8), stop=[])[0]
    stop = free[3]
    want = free[: free.index(stop)]
    got = generate(APPLY, PARAMS, C, [prompt], how=Sampling(max_new_tokens=8), stop=[stop])[0]
    assert got == want


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    many = jnp.broadcast_to(logits, (20000, 4))

    def shares(**how):
        drawn, _ = draw(many, jax.random.key(0), Sampling(**how))
        return np.bincount(np.asarray(drawn), minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    half = np.sqrt([0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(shares(temperature=2.0), half / half.sum(), atol=0.015)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    nucleus = np.array([0.5, 0.25, 0.15, 0]) / 0.9
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.8), nucleus, atol=0.015)
    assert shares(temperature=0.0)[0] == 1


def test_same_seed_same_text_and_other_seed_another():
    how = Sampling(max_new_tokens=16, temperature=1.5)
    texts = [generate(APPLY, PARAMS, C, [[1, 2]], how=how, stop=[], seed=s)[0] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="an empty prompt given; give at least one token"):
        generate(APPLY, PARAMS, C, [[1], []])
    with pytest.raises(UserError) as e:
        generate(APPLY, PARAMS, C, [[1] * 120], how=Sampling(max_new_tokens=20))
    assert str(e.value) == (
        "120 prompt tokens and 20 new ones exceed the model's 128 positions; shorten one of them"
    )
    with pytest.raises(UserError, match="accepted: max_new_tokens >= 1"):
        Sampling(max_new_tokens=0)


def test_an_equal_model_is_not_compiled_again(tmp_path):
    tiny.save_model(tmp_path / "m")
    sizes = []
    for _ in range(3):
        model = load_model(tmp_path / "m")
        generate(
            model.apply_fn(), model.params, model.config, [[5, 6]], how=Sampling(max_new_tokens=4)
        )
        sizes.append(generation._sample._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]
