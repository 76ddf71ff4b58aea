"""Model directories: written and read back, in every float type, and every way they can be bad."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.hf import load_hf, read_hf_config, save_hf
from jaxdistill.models.hf_directory import is_model_directory
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.models.safetensors import SafetensorsFile, write_safetensors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def assert_same(a, b):
    """Asserts that two params trees have the same structure and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(call, *parts: str) -> str:
    """Asserts that a call raises a one-line UserError holding every part."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of a tiny Qwen2 directory, to be damaged."""
    shutil.copytree(GOLDEN / "qwen2_tied", tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, change) -> None:
    """Applies ``change`` to the dict of tensors of model.safetensors."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    specs = [(name, a.dtype, a.shape) for name, a in tensors.items()]
    write_safetensors(directory / "new", specs, tensors.__getitem__)
    (directory / "new").rename(directory / "model.safetensors")


def edit_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tiny_tokenizer(words: int = 5) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with this many words."""
    vocab = {f"w{i}": i for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w1")


# ---------------------------------------------------------------------------- reading


def test_kernels_are_in_by_out_and_stacked():
    _, params = load_hf(GOLDEN / "llama_bias")
    raw = safetensors.numpy.load_file(GOLDEN / "llama_bias" / "model.safetensors")
    up = params["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(up["kernel"][1], raw["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(up["bias"][1], raw["model.layers.1.mlp.up_proj.bias"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], raw["lm_head.weight"].T)
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], raw["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_names_every_tensor_of_transformers(name):
    config, params = load_hf(GOLDEN / name)
    raw = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
    assert {t.name: t.shape for t in hf_layout(config)} == {n: a.shape for n, a in raw.items()}
    leaves = jax.tree.leaves(params)
    assert sum(a.size for a in leaves) == sum(a.size for a in raw.values())
    assert {(a.dtype, a.flags.c_contiguous, a.flags.writeable) for a in leaves} == {
        (np.dtype(np.float32), True, True)
    }


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_any_float_type_is_read_as_float32(dtype, model):
    def cast(tensors):
        tensors |= {name: a.astype(dtype) for name, a in tensors.items()}

    _, before = load_hf(model)
    rewrite(model, cast)
    _, after = load_hf(model)
    assert_same(after, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), before))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copy_of_the_tied_table_and_rotary_buffers_are_ignored(dtype, model, caplog):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(dtype)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    _, before = load_hf(model)
    rewrite(model, add)
    config, after = load_hf(model)
    assert config.tie_embeddings and read_hf_config(model) == config
    assert_same(after, before)
    assert not caplog.records


@pytest.mark.parametrize("row", [0, 95])
def test_a_head_that_differs_in_one_weight_is_no_tied_head(row, model, tmp_path, caplog):
    def add(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[row, 31] += 1e-3
        tensors["lm_head.weight"] = head

    rewrite(model, add)
    config, params = load_hf(model)
    assert not config.tie_embeddings and read_hf_config(model) == config
    raw = safetensors.numpy.load_file(model / "model.safetensors")
    np.testing.assert_array_equal(params["lm_head"]["kernel"], raw["lm_head.weight"].T)
    (line,) = {record.getMessage() for record in caplog.records}
    assert str(model) in line and "untied" in line
    save_hf(tmp_path / "out", config, params)  # said of the file, and no longer of what is written
    assert read_hf_config(tmp_path / "out") == config
    assert_same(load_hf(tmp_path / "out")[1], params)


def test_a_head_of_another_size_than_the_tied_table_is_refused(model):
    rewrite(model, lambda t: t.update({"lm_head.weight": np.ones((95, 32), np.float32)}))
    refused(lambda: load_hf(model), "lm_head.weight", "[95, 32]", "[96, 32]")


def test_missing_tensors_are_named(model):
    rewrite(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(
        lambda: load_hf(model),
        f"{model} lacks model.layers.1.mlp.up_proj.weight, which its config.json asks for; give",
    )
    edit_json(model / "config.json", num_hidden_layers=3)
    refused(lambda: load_hf(model), "lacks model.layers.1.mlp.up_proj.weight, model.layers.2.self_")
    refused(lambda: load_hf(model), " and 10 more, which its config.json asks for")


def test_unexpected_tensors_are_named_up_to_three(model):
    def add(tensors):
        tensors |= {f"model.extra.{i}": np.ones(1, np.float32) for i in range(5)}

    rewrite(model, add)
    refused(
        lambda: load_hf(model),
        "has model.extra.0, model.extra.1, model.extra.2 and 2 more, which a qwen2 model",
    )


def test_an_untied_model_must_have_a_head(model):
    edit_json(model / "config.json", tie_word_embeddings=False)
    refused(lambda: load_hf(model), "lacks lm_head.weight, which its config.json asks for")


def test_a_misshapen_tensor_is_named_with_both_shapes(model):
    edit_json(model / "config.json", intermediate_size=40)
    refused(
        lambda: load_hf(model),
        "model.layers.0.mlp.gate_proj.weight in ",
        "has shape [56, 32] where config.json asks for [40, 32]; give the config.json that",
    )


def test_integer_weights_are_refused(model):
    def quantize(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    rewrite(model, quantize)
    refused(
        lambda: load_hf(model), "model.norm.weight in ", "is stored as I8; accepted: F64, F32, F16"
    )


def test_a_quantized_checkpoint_is_refused_by_its_method(model):
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(lambda: load_hf(model), "holds weights quantized with 'gptq'; accepted: float weights")


def test_a_cut_off_file_is_refused(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(lambda: load_hf(model), f"{file} is cut off: its tensors need ", "fetch it again")


def test_missing_files_are_named(model, tmp_path):
    (model / "model.safetensors").unlink()
    refused(
        lambda: load_hf(model), "has neither model.safetensors nor model.safetensors.index.json"
    )
    (model / "config.json").unlink()
    refused(lambda: load_hf(model), f"{model} has no config.json; accepted: a model directory")
    refused(lambda: load_hf(tmp_path / "gone"), "gone has no config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "as JSON"), ("[]", "holds no JSON object")])
def test_a_bad_config_json_is_refused(text, message, model):
    (model / "config.json").write_text(text)
    refused(lambda: load_hf(model), message, "config.json", "fetch it again")


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_is_read(name, tmp_path):
    config, params = load_hf(GOLDEN / name)
    save_hf(tmp_path / "deep" / "out", config, jax.tree.map(jnp.asarray, params))
    config2, params2 = load_hf(tmp_path / "deep" / "out")
    assert config2 == config
    assert_same(params2, params)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == [
        "checksums.crc32",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_are_rounded_once(dtype, tmp_path):
    config, params = load_hf(GOLDEN / "llama_bias")
    save_hf(tmp_path / "out", config, params, dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert {e.tag for e in file.entries.values()} == {"F16" if dtype == "float16" else "BF16"}
    _, back = load_hf(tmp_path / "out")
    rounded = jnp.dtype(dtype)
    assert_same(back, jax.tree.map(lambda a: a.astype(rounded).astype(np.float32), params))


def test_bfloat16_params_can_be_written(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    save_hf(tmp_path / "out", config, params)
    _, back = load_hf(tmp_path / "out")
    assert_same(back, jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32)), params))


def test_large_models_are_sharded_with_an_index(tmp_path):
    config, params = load_hf(GOLDEN / "llama_bias")
    save_hf(tmp_path / "out", config, params, max_shard_bytes=30_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count >= 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert all((tmp_path / "out" / f).stat().st_size < 34_000 for f in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * a.size for a in jax.tree.leaves(params))
    assert set(index["weight_map"]) == {t.name for t in hf_layout(config)}
    _, back = load_hf(tmp_path / "out")
    assert_same(back, params)

    (tmp_path / "out" / files[1]).unlink()
    refused(lambda: load_hf(tmp_path / "out"), f"out is damaged ({files[1]} is missing)")
    (tmp_path / "out" / "checksums.crc32").unlink()
    refused(lambda: load_hf(tmp_path / "out"), f"lacks the shard {files[1]} that model.safetensors")
    shutil.copy(tmp_path / "out" / files[0], tmp_path / "out" / files[1])
    refused(
        lambda: load_hf(tmp_path / "out"), f"{files[1]} lacks model.", "index.json places there"
    )
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    refused(lambda: load_hf(tmp_path / "out"), "index.json has no weight_map; fetch it again")


def test_a_shard_holds_one_tensor_at_least(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    save_hf(tmp_path / "out", config, params, max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(hf_layout(config))
    assert_same(load_hf(tmp_path / "out")[1], params)


def test_the_tokenizer_and_the_special_ids_are_written(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    save_hf(tmp_path / "out", config, params, tiny_tokenizer())
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert back.get_vocab() == tiny_tokenizer().get_vocab()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation["pad_token_id"] == 1
    assert is_model_directory(tmp_path / "out")


def test_a_former_model_directory_is_replaced_whole(tmp_path):
    config, params = load_hf(GOLDEN / "llama_bias")
    save_hf(tmp_path / "out", config, params, tiny_tokenizer(), max_shard_bytes=30_000)
    config, params = load_hf(GOLDEN / "qwen2_tied")
    save_hf(tmp_path / "out", config, params)
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert_same(load_hf(tmp_path / "out")[1], params)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    (tmp_path / "out").mkdir()
    save_hf(tmp_path / "out", config, params)
    assert_same(load_hf(tmp_path / "out")[1], params)


@pytest.mark.parametrize("with_config", [False, True])
def test_a_directory_with_other_files_is_left_alone(with_config, tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    if with_config:
        (tmp_path / "out" / "config.json").write_text("{}")
    refused(
        lambda: save_hf(tmp_path / "out", config, params),
        "out is not empty and not a model directory (it holds thesis.tex); give a new directory",
    )
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    refused(lambda: save_hf(tmp_path / "file", config, params), "file is a file; give a directory")
    refused(lambda: save_hf(tmp_path / "file" / "x", config, params), "cannot write", "file/x: ")


def test_a_failure_leaves_the_former_model_and_no_litter(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    save_hf(tmp_path / "out", config, params)
    huge = jax.tree.map(lambda a: a, params)
    huge["norm"] = {"weight": huge["norm"]["weight"] * 1e6}
    message = "model.norm.weight reaches 1"
    refused(
        lambda: save_hf(tmp_path / "out", config, huge, dtype="float16"),
        message,
        "beyond float16's 65504; save as bfloat16 or float32",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same(load_hf(tmp_path / "out")[1], params)


def test_params_that_are_not_the_configs_are_refused(tmp_path):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    out = tmp_path / "out"
    refused(
        lambda: save_hf(out, config, params, dtype="int8"), "dtype 'int8' is not supported; acc"
    )

    tree = jax.tree.map(lambda a: a, params)
    up = tree["layers"]["mlp"]["up_proj"]
    up["kernel_scale"] = np.ones((2, 1, 56), np.float16)
    refused(
        lambda: save_hf(out, config, tree),
        "the params have layers/mlp/up_proj/kernel_scale, against their config; accepted: the",
    )
    up["kernel_q"] = up.pop("kernel")
    refused(
        lambda: save_hf(out, config, tree),
        "lack layers/mlp/up_proj/kernel and have layers/mlp/up_proj/kernel_",
    )
    tree = jax.tree.map(lambda a: a, params)
    tree["norm"] = {"weight": np.ones(31, np.float32)}
    refused(
        lambda: save_hf(out, config, tree),
        "the param norm/weight has shape [31] where the config asks for [32]; give the config",
    )
    assert not out.exists()


def test_messages_name_the_directory_as_given(tmp_path):
    message = refused(lambda: load_hf(tmp_path / "x"))
    assert re.match(re.escape(str(tmp_path / "x")), message)
