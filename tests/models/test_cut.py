"""Cuts: nothing lost is the identity, lost zeros change nothing, and what is kept is the best."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.cut import cut_layers, cut_width
from jaxdistill.models.decoder import make_apply, places_of, run_layer
from jaxdistill.models.hf import load_hf
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy
from tests import tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("llama_bias", "qwen2_tied", "qwen3_head_dim", "mistral_window")
each_family = pytest.mark.parametrize("name", NAMES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 12)), jnp.int32)


@functools.cache
def family(name: str):
    """Reads a tiny model of one family: biases, norms of heads, tied and untied heads."""
    config, params = load_hf(GOLDEN / name)
    return config, jax.tree.map(jnp.asarray, params)


def logits(config, params):
    return np.asarray(jax.jit(make_apply(config))(params, TOKENS).logits())


def changed(params, edit):
    """Returns params with leaves edited by path, layers' axes first."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: edit("/".join(str(k.key) for k in keys), x), params
    )


@each_family
def test_a_cut_of_nothing_is_the_identity(name):
    config, params = family(name)
    whole = {
        "intermediate": config.intermediate_size,
        "heads": config.num_heads,
        "hidden": config.hidden_size,
    }
    for got in (
        cut_layers(config, params, config.num_layers),
        cut_width(config, params),
        cut_width(config, params, **whole),
    ):
        assert got[0] == config
        jax.tree.map(np.testing.assert_array_equal, got[1], params)


@each_family
def test_kept_layers_are_run_one_after_the_other(name):
    config, params = family(name)
    kept = [config.num_layers - 1, 0] if name == "llama_bias" else [config.num_layers - 1]
    rows = params["embed_tokens"]["embedding"][TOKENS.reshape(-1)]
    places = places_of(config, TOKENS, None, None)
    for index in kept:
        layer = jax.tree.map(lambda x, i=index: x[i], params["layers"])
        rows = run_layer(config, layer, rows, places)[0]
    table = params["embed_tokens"]["embedding"]
    head = table.T if config.tie_embeddings else params["lm_head"]["kernel"]
    want = rows * jax.lax.rsqrt(jnp.mean(rows**2, -1, keepdims=True) + config.rms_norm_eps)
    want = (want * params["norm"]["weight"][None]) @ head
    small, cut = cut_layers(config, params, kept)
    assert small.num_layers == len(kept)
    np.testing.assert_allclose(
        logits(small, cut), want.reshape(*TOKENS.shape, -1), atol=2e-5, rtol=0
    )


def test_a_number_of_layers_is_spread_evenly_with_both_ends():
    c = tiny.config(num_layers=7, hidden_size=16, intermediate_size=16)
    params = tiny.params(c)
    origin = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"])

    def kept(n):
        cut = cut_layers(c, params, n)[1]["layers"]["mlp"]["down_proj"]["kernel"]
        return [int(np.flatnonzero((x == origin).all((1, 2)))[0]) for x in np.asarray(cut)]

    assert [kept(n) for n in (1, 2, 3, 4, 5)] == [
        [0], [0, 6], [0, 3, 6], [0, 2, 4, 6], [0, 2, 3, 5, 6],
    ]  # fmt: skip


@each_family
def test_lost_channels_and_heads_that_are_zero_change_nothing(name):
    config, params = family(name)
    F, group = config.intermediate_size, config.num_heads // config.num_kv_heads
    H, K = config.head_dim, config.num_kv_heads
    lost = np.arange(1, F, 3)  # of each layer, one of gate, up and down is zero there
    which = {"gate_proj": lost[::3], "up_proj": lost[1::3], "down_proj": lost[2::3]}

    def plant(path, x):
        for leaf, at in which.items():
            if f"mlp/{leaf}" in path:
                x = x.at[:, at].set(0) if leaf == "down_proj" and "kernel" in path else x
                x = x.at[..., at].set(0) if leaf != "down_proj" else x
        # The first group writes nothing: values of nothing in layer 0, nothing out of them in 1.
        if "v_proj" in path:
            x = x.at[0, ..., :H].set(0)
        return x.at[1:, : group * H].set(0) if path.endswith("o_proj/kernel") else x

    planted = changed(params, plant)
    assert config.num_layers >= 2 and K >= 2
    small, cut = cut_width(
        config, planted, intermediate=F - len(lost), heads=config.num_heads - group
    )
    assert (small.num_heads, small.num_kv_heads) == (config.num_heads - group, K - 1)
    want = logits(config, planted)
    np.testing.assert_allclose(logits(small, cut), want, atol=2e-5, rtol=0)
    # The test would notice: the unplanted model is changed by the like cut.
    plain = cut_width(config, params, intermediate=F - len(lost), heads=config.num_heads - group)
    assert np.abs(logits(*plain) - logits(config, params)).max() > 1e-2


def test_heads_that_do_not_fill_groups_leave_every_key_head():
    c = tiny.config(num_heads=6, num_kv_heads=2, head_dim=16)
    params = tiny.params(c)
    out = params["layers"]["self_attn"]["o_proj"]["kernel"].reshape(2, 6, 16, 64)
    lost = jnp.asarray([[1, 3], [0, 5]])  # one of each group of three
    out = jax.vmap(lambda x, at: x.at[at].set(0))(out, lost).reshape(2, 96, 64)
    params["layers"]["self_attn"]["o_proj"]["kernel"] = out
    small, cut = cut_width(c, params, heads=4)
    assert (small.num_heads, small.num_kv_heads) == (4, 2)
    np.testing.assert_allclose(logits(small, cut), logits(c, params), atol=2e-5, rtol=0)
    with pytest.raises(UserError, match=r"6 query heads to heads=5 .* multiple of 3, .* of 2,"):
        cut_width(c, params, heads=5)


@each_family
def test_lost_residual_channels_that_are_zero_change_nothing(name):
    """Norms divide by the mean over fewer channels; the scaled weights and epsilon undo it."""
    config, params = family(name)
    config = dataclasses.replace(config, rms_norm_eps=1e-7 if config.qk_norm else 1e-2)
    lost = np.arange(2, config.hidden_size, 4)

    def plant(path, x):
        writes = "embed_tokens" in path or "o_proj" in path or "down_proj" in path
        return x.at[..., lost].set(0) if writes else x

    planted = changed(params, plant)
    small, cut = cut_width(config, planted, hidden=config.hidden_size - len(lost))
    assert small.hidden_size == config.hidden_size - len(lost)
    np.testing.assert_allclose(logits(small, cut), logits(config, planted), atol=3e-5, rtol=0)
    # Unscaled norms would be wrong.
    weak = {**cut, "norm": {"weight": cut["norm"]["weight"] * 0.75**0.5}}
    assert np.abs(logits(small, weak) - logits(config, planted)).max() > 1e-2


def test_the_loudest_channels_are_kept():
    """The kept MLP channels are the loudest, counted with the weight of the norm before them."""
    c = tiny.config(num_layers=1)
    params = tiny.params(c)
    mlp = params["layers"]["mlp"]
    loud = np.sort(np.random.default_rng(1).permutation(96)[:40])
    for leaf in ("gate_proj", "up_proj"):
        mlp[leaf]["kernel"] = mlp[leaf]["kernel"].at[:, 0].set(0).at[:, 0, :].add(0.1)
        mlp[leaf]["kernel"] = mlp[leaf]["kernel"].at[:, 0, loud].add(0.5)
    params["layers"]["post_attention_layernorm"]["weight"] = jnp.ones((1, 64)).at[0, 0].set(50.0)
    _, cut = cut_width(c, params, intermediate=40)
    np.testing.assert_array_equal(
        cut["layers"]["mlp"]["down_proj"]["kernel"][0], mlp["down_proj"]["kernel"][0][loud]
    )


def test_bad_cuts_are_named():
    c = tiny.config()
    params = tiny.params(c)
    for wanted in (0, 3, [], [0, 2], [1, 1]):
        with pytest.raises(UserError, match=r"^a cut to .* given; accepted: .*"):
            cut_layers(c, params, wanted)
    for wanted in ({"heads": 5}, {"intermediate": 0}, {"hidden": 65}):
        with pytest.raises(UserError, match=r"^a cut to \w+=\d+ given; accepted: 1 to \d+"):
            cut_width(c, params, **wanted)
    grid = add_scales(params, default_policy(QuantSpec(ranges="absmax"), tied=True))
    with pytest.raises(UserError, match="embedding_scale given; accepted: float weights alone"):
        cut_width(c, grid, hidden=32)


def test_a_cut_is_a_model_of_its_own_config():
    c: ModelConfig = tiny.config(tie_embeddings=False)
    small, cut = cut_width(c, tiny.params(c), intermediate=48, heads=2, hidden=32)
    small, cut = cut_layers(small, cut, 1)
    fresh = dict(walk(tiny.params(small)))
    assert {path: x.shape for path, x in walk(cut)} == {path: x.shape for path, x in fresh.items()}
