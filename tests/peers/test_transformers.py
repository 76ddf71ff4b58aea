"""The decoder and its files against transformers, live: both directions, tiny and real models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.hf import load_hf, save_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.golden.make_golden import CONFIGS, build, logits_of, random_tokens  # noqa: E402

SEED = 1000
TEXTS = [  # 64 tokens and more, each
    "The lighthouse keeper wrote the weather into his book every evening: wind from the west, rain "
    "until noon, then a clear sky and a calm sea. He had done so for thirty-one years, and not one "
    "page was missing, although in all that time nobody had ever asked him to show the book or to "
    "explain what the small red marks in its margins meant.",
    "def mean_and_variance(values):\n    n = len(values)\n    if n == 0:\n        raise ValueError("
    "'no values were given')\n    mean = sum(values) / n\n    variance = sum((v - mean) ** 2 for v "
    "in values) / n\n    return mean, variance\n\nprint(mean_and_variance([1.0, 2.5, 4.0]))\n",
    "Question: A train leaves at 9:40 and travels 150 kilometres at 60 kilometres per hour, waits "
    "for 15 minutes, and travels another 90 kilometres at 45 kilometres per hour. When does it "
    "arrive? Answer: The first part takes two and a half hours, the wait a quarter of an hour, and "
    "the last part two hours, four hours and three quarters in all, so it arrives at 14:25.",
]


def ours(config, params, tokens) -> np.ndarray:
    """Runs our decoder and returns float32 logits."""
    apply = make_apply(config)
    run = jax.jit(lambda params, tokens: apply(params, tokens).logits())
    return np.asarray(run(params, jnp.asarray(tokens)))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Gives the largest absolute difference."""
    return float(np.abs(a - b).max())


def livelier(params):
    """Widens the kernels to 0.2 and gives random biases, for attention far from uniform."""

    def one(path, x):
        if path[-1].key == "bias":
            return 0.3 * jax.random.normal(jax.random.key(len(path)), x.shape)
        return 10 * x if path[-1].key in ("kernel", "embedding") else x

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_their_model_gives_its_logits_here(name, tmp_path):
    model, tokens = build(name, SEED), random_tokens(SEED)
    model.save_pretrained(tmp_path)
    difference = largest(ours(*load_hf(tmp_path), tokens), logits_of(model, tokens))
    print(f"{name}: transformers -> load_hf: max |difference of logits| {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("max_shard_bytes", [5e9, 40_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_our_files_give_the_same_logits_there(name, max_shard_bytes, tmp_path):
    model, tokens = build(name, SEED), random_tokens(SEED)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", config, params, max_shard_bytes=max_shard_bytes)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert back.dtype == torch.float32 and type(back) is type(model)
    assert largest(logits_of(back.eval(), tokens), logits_of(model, tokens)) == 0
    difference = largest(ours(config, params, tokens), logits_of(back, tokens))
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_tied", {"sliding_window": 5}),
        ("qwen3_head_dim", {"sliding_window": 5}),
        ("qwen3_head_dim", {"qkv_bias": True, "o_bias": True}),
        ("llama_bias", {"head_dim": 6, "rope_theta": 5e5}),
        ("mistral_window", {"sliding_window": None, "tie_embeddings": True, "head_dim": 10}),
    ],
)
def test_fresh_models_of_ours_open_there(name, changes, tmp_path):
    build(name, SEED).save_pretrained(tmp_path / "theirs")
    config = dataclasses.replace(load_hf(tmp_path / "theirs")[0], **changes)
    params = livelier(init_params(config, jax.random.key(SEED)))
    save_hf(tmp_path / "ours", config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    tokens = random_tokens(SEED)
    difference = largest(ours(config, params, tokens), logits_of(model.eval(), tokens))
    print(f"{name} {changes}: save_hf -> transformers: {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_open_there(dtype, tmp_path):
    build("llama_bias", SEED).save_pretrained(tmp_path / "theirs")
    save_hf(tmp_path / "ours", *load_hf(tmp_path / "theirs"), dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    tokens = random_tokens(SEED)
    rounded = ours(*load_hf(tmp_path / "ours"), tokens)
    assert largest(rounded, logits_of(model.float().eval(), tokens)) < 1e-4


@pytest.mark.slow
def test_smollm2_from_gguf_gives_transformers_logits(smollm2_path):
    from jaxdistill.models.hub import load_model

    here = load_model(smollm2_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    assert here.tokenizer is not None
    differences = []
    for text in TEXTS:
        tokens = np.asarray([here.tokenizer(text)["input_ids"]], np.int32)
        assert tokens.shape[1] >= 64
        differences.append(
            largest(ours(here.config, here.params, tokens), logits_of(there, tokens))
        )
    print(f"SmolLM2 GGUF: max |difference of logits| {max(differences):.1e}")
    assert max(differences) < 1e-3
