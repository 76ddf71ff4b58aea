"""Compares the GGUF reader, writer and tokenizer with transformers' own GGUF loader."""

import warnings

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxdistill.export.gguf import write_gguf  # noqa: E402
from jaxdistill.models.config import config_from_hf  # noqa: E402
from jaxdistill.models.gguf_file import GGUFFile  # noqa: E402
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf  # noqa: E402
from tests.gguf_files import (  # noqa: E402
    TEXTS,
    byte_tokenizer,
    dequantized,
    quantized_params,
    tiny_config,
)

MORE_TEXTS = [
    *TEXTS,
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14159 o'clock on 2024-02-29.",
    'for (int i = 0; i < 100; ++i) {\n\tprintf("%d\\n", i);\n}\n\n// 日本語のコメント',
    "Ünïcödé: Привет, мир! שלום العالم हिन्दी ไทย 한국어 🇩🇪👩‍👩‍👧",
    "   leading, trailing   \n\n\n \t\r\n ",
    "<|im_start|>user\nWhat is 12 * 34?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(autouse=True)
def only_our_own_warnings():
    """The peers' own deprecations are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# transformers knows no pre-tokenizer "smollm" and cuts text as GPT-2 does. The two differ only on
# numbers that are not decimal digits, after a space: "½" is then not split from it.
UNLIKE_GPT2 = TEXTS[3]


@pytest.mark.parametrize("as_released", [False, True])
def test_the_real_tokenizer_gives_the_same_ids(as_released, smollm2_path):
    ours = tokenizer_from_gguf(GGUFFile(smollm2_path))
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    if as_released:  # the pre-tokenizer of SmolLM2's tokenizer.json
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    assert (ours(UNLIKE_GPT2)["input_ids"] == theirs(UNLIKE_GPT2)["input_ids"]) == as_released
    for text in MORE_TEXTS if as_released else set(MORE_TEXTS) - {UNLIKE_GPT2}:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    assert ours.get_vocab() == theirs.get_vocab()
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    messages = [{"role": r, "content": c} for r, c in (("user", "Hi, 1234"), ("assistant", "ok"))]
    for last in (True, False):
        kwargs = {"tokenize": False, "add_generation_prompt": last}
        text = ours.apply_chat_template(messages, **kwargs)
        assert text == theirs.apply_chat_template(messages, **kwargs)
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def hf_names(params, config):
    """Our parameters under the names, and in the layout, of an HF state dict."""
    out = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["weight"],
    }
    head = params.get("lm_head", {}).get("kernel")
    out["lm_head.weight"] = out["model.embed_tokens.weight"] if head is None else head.T
    for path, leaf in jax.tree.leaves_with_path(params["layers"]):
        *modules, name = (key.key for key in path)
        for i in range(config.num_layers):
            hf = f"model.layers.{i}.{'.'.join(modules)}.{'weight' if name == 'kernel' else name}"
            out[hf] = leaf[i].T if name == "kernel" else leaf[i]
    return out


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_embeddings=True, head_dim=32),
        tiny_config("qwen2", tie_embeddings=True, rms_norm_eps=1e-6),
        tiny_config("qwen3", head_dim=128, rms_norm_eps=1e-6),  # the loader assumes 128
    ],
    ids=["llama", "tied", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("group", [32, None])
def test_the_written_file_opens_in_transformers(config, group, tmp_path):
    params, tokenizer = quantized_params(config, group), byte_tokenizer(bos=True)
    write_gguf(tmp_path / "m.gguf", config, params, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    theirs = {name: x.numpy() for name, x in model.state_dict().items()}
    ours = hf_names(dequantized(params), config)
    assert theirs.keys() == ours.keys()
    for name, x in ours.items():
        assert np.array_equal(theirs[name], x), name

    read = config_from_hf(model.config.to_dict())
    for field in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "tie_embeddings"):
        assert getattr(read, field) == getattr(config, field), field
    assert read.rms_norm_eps == pytest.approx(config.rms_norm_eps)

    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[0, 5, 9]])).logits).all()
