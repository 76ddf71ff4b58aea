"""config.json, read in old and new spelling, written, and refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig, RopeScaling, config_from_hf, config_to_hf

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def hf(model_type: str = "llama", **changes) -> dict:
    """Gives the smallest config.json of a model type, as a dict."""
    return {"model_type": model_type} | SHAPE | changes


def llama(**changes) -> ModelConfig:
    """Gives a config of our own."""
    values = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize(
    "config",
    [
        llama(),
        llama(tie_embeddings=True, rope_scaling=LLAMA3, rope_theta=5e5, eos_token_id=(7, 9)),
        llama(rope_scaling=RopeScaling(rope_type="linear", factor=2.0), bos_token_id=1),
        llama(qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=8),
        llama(model_type="mistral", sliding_window=16, eos_token_id=2),
        llama(model_type="mistral"),
        llama(model_type="qwen2", qkv_bias=True),
        llama(model_type="qwen2", qkv_bias=True, sliding_window=16),
        llama(model_type="qwen3", qk_norm=True, head_dim=6, rms_norm_eps=1e-6),
        llama(model_type="qwen3", qk_norm=True, qkv_bias=True, o_bias=True, sliding_window=5),
    ],
    ids=lambda c: c.model_type,
)
def test_what_is_written_is_what_is_read(config):
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config


@pytest.mark.parametrize("name", sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))
def test_transformers_own_files_round_trip(name):
    config = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert config_from_hf(config_to_hf(config)) == config


def test_old_and_new_rope_spelling_agree():
    fields = {k: v for k, v in dataclasses.asdict(LLAMA3).items() if k != "rope_type"}
    fields |= {"factor": 32, "low_freq_factor": 1, "high_freq_factor": 4}  # JSON may say 1 for 1.0
    spellings = [
        hf(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | fields),
        hf(rope_theta=5e5, rope_scaling={"type": "llama3"} | fields),
        hf(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | fields),
        hf(rope_theta=5e5, rope_scaling=None, rope_parameters={"rope_type": "llama3"} | fields),
    ]
    configs = [config_from_hf(d) for d in spellings]
    assert {(c.rope_theta, c.rope_scaling) for c in configs} == {(5e5, LLAMA3)}


def test_an_absent_or_default_rope_is_plain():
    for d in (hf(), hf(rope_scaling=None), hf(rope_parameters={"rope_type": "default"})):
        config = config_from_hf(d)
        assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_absent_keys_take_the_values_that_transformers_gives_them():
    config = config_from_hf(hf())
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 4, 1e-6)
    assert not config.tie_embeddings
    assert config_from_hf(hf("mistral")).sliding_window == 4096
    assert config_from_hf(hf("qwen3")).head_dim == 128
    assert config_from_hf(hf(head_dim=None)).head_dim == 4


def test_each_family_has_its_own_biases():
    on = {"attention_bias": True, "mlp_bias": True}
    biases = {
        kind: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm)
        for kind in ("llama", "mistral", "qwen2", "qwen3")
        for c in [config_from_hf(hf(kind, **on))]
    }
    assert biases == {
        "llama": (True, True, True, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (True, True, False, True),
    }


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 8}, None),
        ({"sliding_window": 8, "use_sliding_window": True}, None),  # from layer 28 on: never
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, None),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 3,
            },
            8,
        ),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
    ],
)
def test_a_qwen_slides_on_all_layers_or_none(changes, window):
    assert config_from_hf(hf("qwen2", **changes)).sliding_window == window


def test_a_llama_never_slides():
    assert config_from_hf(hf(sliding_window=8)).sliding_window is None


def test_every_end_token_is_listed():
    assert config_from_hf(hf()).eos_token_ids == ()
    assert config_from_hf(hf(eos_token_id=5)).eos_token_ids == (5,)
    assert config_from_hf(hf(eos_token_id=[5, 6])).eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({}, "model type '' is not supported; accepted: llama, mistral, qwen2, qwen3; give a"),
        (hf("gpt2"), "model type 'gpt2' is not supported; accepted: llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama", "vocab_size": 8}, "config.json lacks 'hidden_size'; give the"),
        (hf(hidden_act="gelu"), "activation 'gelu' is not supported; accepted: silu"),
        (hf(rope_scaling={"type": "yarn"}), "rope scaling 'yarn' is not supported; accepted: def"),
        (hf(rope_scaling={"type": "llama3"}), "rope scaling 'llama3' needs low_freq_factor, high_"),
        (hf(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported; accepted: 1"),
        (hf(num_key_value_heads=3), "4 attention heads do not divide into 3 key/value heads; fix"),
        (
            hf("qwen2", use_sliding_window=True, max_window_layers=1),
            "a sliding window on 2 of 3 layers is not supported; accepted: on all or none; set",
        ),
    ],
)
def test_what_is_not_supported_is_refused(d, message):
    with pytest.raises(UserError) as error:
        config_from_hf(d)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        llama(qkv_bias=True),
        llama(sliding_window=4),
        llama(model_type="mistral", mlp_bias=True),
        llama(model_type="qwen2"),
        llama(model_type="qwen3"),
    ],
)
def test_what_no_config_json_can_say_is_refused(config):
    with pytest.raises(UserError, match=f"no {config.model_type} config.json has qkv_bias="):
        config_to_hf(config)
