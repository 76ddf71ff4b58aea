"""Tests the MLX directory: read as MLX documents it, it gives the stored lattice's values."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill.errors import UserError
from jaxdistill.export.mlx import write_mlx
from tests import stored, tiny


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization"]


def entry_of(config, module):
    return config.get(module, {k: config[k] for k in ("group_size", "bits")})


def dequantized(tensors, config, module):
    """`scales * u + biases`, u from the low bits of each word upward, in float64."""
    entry = entry_of(config, module)
    bits, group = entry["bits"], entry["group_size"]
    words, scales, biases = (tensors[f"{module}.{k}"] for k in ("weight", "scales", "biases"))
    assert words.dtype == np.uint32
    parts = [(words >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in range(32 // bits)]
    u = np.stack(parts, -1).reshape(len(words), -1).astype(np.float64)
    assert scales.shape == biases.shape == (len(u), u.shape[1] // group)
    return u * np.repeat(scales.astype(np.float64), group, 1) + np.repeat(
        biases.astype(np.float64), group, 1
    )


@pytest.mark.parametrize("spec", stored.SPECS)
@pytest.mark.parametrize("name", ["tied", "wide heads"])
def test_values_are_the_stored_lattices(name, spec, tmp_path):
    config, params = stored.model(name, spec)
    write_mlx(tmp_path / "out", config, params)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    entries, values = quantization(tmp_path / "out"), stored.values(params)
    left = set(tensors)
    for path, module in stored.PROJECTIONS.items():
        want = stored.node_of(values["layers"], path)["kernel"]
        for i in range(config.num_layers):
            at = f"model.layers.{i}.{module}"
            assert np.array_equal(dequantized(tensors, entries, at), want[i].T)
            left -= {f"{at}.{k}" for k in ("weight", "scales", "biases")}
    if name == "tied":
        table, want = "model.embed_tokens", values["embed_tokens"]["embedding"]
    else:
        table, want = "lm_head", values["lm_head"]["kernel"].T
    assert entry_of(entries, table) == {"group_size": 32, "bits": 8}
    assert np.array_equal(dequantized(tensors, entries, table), want)
    left -= {f"{table}.{k}" for k in ("weight", "scales", "biases")}
    assert all("norm" in n or (n == "model.embed_tokens.weight" and name != "tied") for n in left)
    assert {tensors[n].dtype.name for n in left} == {"float32"}


def test_the_largest_group_that_divides_is_used_and_named(tmp_path):
    config, params = stored.model("tied", "channel")  # 64 wide, 96 inside: 64 and 32
    write_mlx(tmp_path / "out", config, params)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization"] == raw["quantization_config"]
    assert quantization(tmp_path / "out") == {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 4},
        "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4},
    }


def test_float16_holds_a_symmetric_lattice_too(tmp_path):
    config, params = stored.model("tied", "channel")
    write_mlx(tmp_path / "out", config, params, dtype="float16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"uint32", "float16"}
    got = dequantized(tensors, quantization(tmp_path / "out"), "model.layers.1.mlp.up_proj")
    assert np.array_equal(got, stored.values(params)["layers"]["mlp"]["up_proj"]["kernel"][1].T)


UP = "layers/mlp/up_proj"


def test_float16_refuses_offsets_that_it_would_round(tmp_path):
    config, params = stored.model("tied", "asymmetric group 32")
    with pytest.raises(UserError, match="zero points times its scales are not float16 values"):
        write_mlx(tmp_path / "out", config, params, dtype="float16")
    config, params = stored.model("tied", "group 32")
    huge = stored.changed(params, f"{UP}/kernel_scale", np.full((2, 2, 96), 6e4, np.float16))
    with pytest.raises(UserError, match="zero points times its scales are not float16 values"):
        write_mlx(tmp_path / "out", config, huge, dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("groups", [4, 8])
def test_groups_that_mlx_lacks_are_named(groups, tmp_path):
    config, params = stored.model("tied", "group 32")
    params = stored.changed(params, f"{UP}/kernel_scale", np.ones((2, groups, 96), np.float16))
    with pytest.raises(UserError, match=f"up_proj/kernel': groups of {64 // groups} inputs") as e:
        write_mlx(tmp_path / "out", config, params)
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_a_float_model_is_sent_to_the_float_format(tmp_path):
    config, params = stored.model("tied", "channel")
    with pytest.raises(UserError, match="no weight is quantized; export to the format hf instead"):
        write_mlx(tmp_path / "out", config, stored.values(params))
    assert list(tmp_path.iterdir()) == []


def test_the_directory_carries_tokenizer_template_and_card(tmp_path):
    config, params = stored.model("untied", "channel")
    write_mlx(tmp_path / "out", config, params, tiny.byte_tokenizer(), card="a card")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tiny.CHATML
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
