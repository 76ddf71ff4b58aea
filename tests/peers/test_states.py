"""What states_tap sees against transformers' hidden states and attention maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.states import attention, states_tap
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hf import load_hf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.golden.make_golden import build, random_tokens  # noqa: E402


@pytest.fixture(scope="module", params=["llama_bias", "qwen3_head_dim"])
def seen(request, tmp_path_factory):
    """A model's (Output, states) here, its outputs there, and its config."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokens = build(request.param, 7), random_tokens(7)
    model.save_pretrained(folder)
    config, params = load_hf(folder)
    apply = make_apply(config, tap=states_tap("hidden", "queries", "keys"))
    ours = jax.jit(apply)(params, jnp.asarray(tokens))
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(tokens.astype(np.int64)),
            output_hidden_states=True,
            output_attentions=True,
        )
    return ours, theirs, config


def test_hidden_states(seen):
    (output, states), theirs, config = seen
    # theirs: the embeddings, each layer's output, and the last layer's after the final norm
    assert len(theirs.hidden_states) == config.num_layers + 1
    for layer in range(config.num_layers - 1):
        want = theirs.hidden_states[layer + 1].reshape(-1, config.hidden_size).numpy()
        np.testing.assert_allclose(states["hidden"][layer], want, rtol=1e-4, atol=1e-4)
    want = theirs.hidden_states[-1].numpy()
    np.testing.assert_allclose(output.hidden, want, rtol=1e-4, atol=1e-4)
    last = np.asarray(states["hidden"][-1], float).reshape(want.shape)
    size = np.sqrt((last**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    ratio = want / (last / size)  # the norm's weight: the same for every token
    np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, (0, 1)), ratio.shape), 2e-3)


def test_attention_maps(seen):
    """The maps of our queries and keys, and our divergence of two layers' maps, from theirs."""
    (_, states), theirs, config = seen
    maps = np.stack([a.double().numpy() for a in theirs.attentions])  # [L, B, heads, T, T]
    q, k = (np.asarray(states[name], float) for name in ("queries", "keys"))
    k = np.repeat(k, config.num_heads // config.num_kv_heads, axis=3)
    scores = np.einsum("lbtnh,lbsnh->lbnts", q, k) / np.sqrt(config.head_dim)
    T = scores.shape[-1]
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(e / e.sum(-1, keepdims=True), maps, atol=1e-5)

    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (q.shape[1], T, T))
    first, second = ({n: x[i : i + 1] for n, x in states.items()} for i in (0, 1))
    got = attention(first, second, {}, mask)
    p, q = maps[1], maps[0]
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0)
    want = terms.sum(-1).mean(1).reshape(-1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
