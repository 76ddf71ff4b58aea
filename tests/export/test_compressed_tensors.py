"""Tests the compressed-tensors directory: what is packed, unpacked by hand, is what was stored."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill.errors import UserError
from jaxdistill.export.compressed_tensors import write_compressed_tensors
from jaxdistill.export.leaves import pack_words
from jaxdistill.models.hf_directory import CARD_MARK
from tests import stored, tiny


def unpacked(words, bits, count):
    """Reads `count` unsigned integers a row from int32 words, one at a time."""
    rows = []
    for row in words:
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) & (2**bits - 1) for i in range(count)])
    return np.array(rows)


def check_layer(tensors, module, node, bits, layer):
    """One packed linear layer holds the integers, scales and zero points of `node`."""

    def rows(name):
        leaf = np.asarray(node[name])
        return (leaf if layer is None else leaf[layer]).T

    q, scale = rows("kernel_q").astype(np.int16), rows("kernel_scale")
    asymmetric = "kernel_zero" in node
    out, wide = q.shape
    assert tensors[f"{module}.weight_shape"].tolist() == [out, wide]
    packed = tensors[f"{module}.weight_packed"]
    assert packed.dtype == np.int32 and packed.shape == (out, -(-wide * bits // 32))
    middle = 0 if asymmetric else 2 ** (bits - 1)
    assert np.array_equal(unpacked(packed, bits, wide) - middle, q)
    got = tensors[f"{module}.weight_scale"]
    assert got.dtype == np.float16 and np.array_equal(got, scale)
    assert (f"{module}.weight_zero_point" in tensors) == asymmetric
    if asymmetric:
        zero = tensors[f"{module}.weight_zero_point"]
        assert zero.dtype == np.int32 and zero.shape == (-(-out * bits // 32), scale.shape[1])
        assert np.array_equal(unpacked(zero.T, bits, out).T, rows("kernel_zero"))
    assert f"{module}.weight" not in tensors


@pytest.mark.parametrize("spec", stored.SPECS)
@pytest.mark.parametrize("name", ["tied", "wide heads"])
def test_integers_scales_and_zero_points_are_the_stored_ones(name, spec, tmp_path):
    config, params = stored.model(name, spec)
    write_compressed_tensors(tmp_path / "out", config, params)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    bits = max(4, stored.SPECS[spec].get("bits", 4))
    for path, module in stored.PROJECTIONS.items():
        for i in range(config.num_layers):
            node = stored.node_of(params["layers"], path)
            check_layer(tensors, f"model.layers.{i}.{module}", node, bits, i)
    values = stored.values(params)
    assert tensors["model.embed_tokens.weight"].dtype == np.float32
    assert np.array_equal(tensors["model.embed_tokens.weight"], values["embed_tokens"]["embedding"])
    assert np.array_equal(tensors["model.norm.weight"], values["norm"]["weight"])
    if name == "tied":
        assert not [n for n in tensors if n.startswith("lm_head")]
    else:
        check_layer(tensors, "lm_head", params["lm_head"], 8, None)


def test_a_row_that_does_not_fill_its_last_word_is_padded():
    u = np.arange(22, dtype=np.uint8).reshape(2, 11) % 16
    assert pack_words(u, 4).shape == (2, 2) and pack_words(u, 8).shape == (2, 3)
    for bits in (4, 8):
        assert np.array_equal(unpacked(pack_words(u, bits), bits, 11), u)
    assert pack_words(np.uint8([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321]]


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_one_kind_of_layer_makes_one_group(tmp_path):
    config, params = stored.model("tied", "group 32")
    write_compressed_tensors(tmp_path / "out", config, params)
    d = quantization(tmp_path / "out")
    assert (d["quant_method"], d["format"]) == ("compressed-tensors", "pack-quantized")
    assert d["quantization_status"] == "compressed" and d["ignore"] == ["lm_head"]
    (group,) = d["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }


def test_several_kinds_are_told_apart_by_name(tmp_path):
    config, params = stored.model("untied", "channel")
    _, other = stored.model("untied", "asymmetric group 32")
    params["layers"]["mlp"]["up_proj"] = other["layers"]["mlp"]["up_proj"]
    kernel = stored.values(params)["layers"]["mlp"]["down_proj"]["kernel"]
    params["layers"]["mlp"]["down_proj"] = {"kernel": kernel}  # left in float
    write_compressed_tensors(tmp_path / "out", config, params)
    d = quantization(tmp_path / "out")

    def matched(module):
        """Kinds whose targets match a module's name, as (bits, group size, symmetric)."""
        found = [
            (g["weights"]["num_bits"], g["weights"]["group_size"], g["weights"]["symmetric"])
            for g in d["config_groups"].values()
            if any(matches(target, module) for target in g["targets"])
        ]
        return found if not any(matches(target, module) for target in d["ignore"]) else []

    def matches(target, module):
        return re.match(target[3:], module) if target.startswith("re:") else target == module

    for layer in (0, 1, 17):
        at = f"model.layers.{layer}"
        assert matched(f"{at}.mlp.up_proj") == [(4, 32, False)]
        assert matched(f"{at}.mlp.gate_proj") == [(4, None, True)]
        assert matched(f"{at}.self_attn.o_proj") == [(4, None, True)]
        assert matched(f"{at}.mlp.down_proj") == []
    assert matched("lm_head") == [(8, 32, True)]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(tensors["model.layers.1.mlp.down_proj.weight"], kernel[1].T)


def test_a_head_may_be_left_in_float(tmp_path):
    config, params = stored.model("untied", "channel")
    write_compressed_tensors(tmp_path / "out", config, params, pack_head=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(tensors["lm_head.weight"], stored.values(params)["lm_head"]["kernel"].T)
    d = quantization(tmp_path / "out")
    assert d["ignore"] == ["lm_head"] and len(d["config_groups"]) == 1


def test_float16_halves_the_float_tensors_alone(tmp_path):
    config, params = stored.model("tied", "channel")
    write_compressed_tensors(tmp_path / "a", config, params)
    write_compressed_tensors(tmp_path / "b", config, params, dtype="float16")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float16"
    for name in a:
        if a[name].dtype == np.float32:
            assert b[name].dtype == np.float16
            np.testing.assert_array_equal(b[name], a[name].astype(np.float16))
        else:
            assert a[name].tobytes() == b[name].tobytes()


def test_the_directory_carries_tokenizer_template_and_card(tmp_path):
    config, params = stored.model("tied", "channel")
    card = f"{CARD_MARK}\nfirst"
    write_compressed_tensors(tmp_path / "out", config, params, tiny.byte_tokenizer(), card=card)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tiny.CHATML
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text() == card
    write_compressed_tensors(tmp_path / "out", config, params, max_shard_bytes=9_000)
    assert not (tmp_path / "out" / "README.md").exists()  # replaced whole, our own card too
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {n for s in shards for n in load_file(s)} == set(index["weight_map"])


UP = "layers/mlp/up_proj"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{UP}/kernel_q", np.zeros((2, 64, 96), np.int16), "up_proj/kernel_q' has type int16"),
        (f"{UP}/kernel_q", np.zeros((2, 96, 64), np.int8), r"accepted: \(2, 64, 96\)"),
        (f"{UP}/kernel_scale", np.ones((2, 3, 96), np.float16), "3 scales do not divide 64 inputs"),
        (f"{UP}/kernel_scale", np.full((2, 2, 96), 0.1, np.float32), "are not float16 values"),
        (f"{UP}/kernel_scale", None, "kernel_scale' is missing beside its integers"),
        (f"{UP}/kernel_zero", None, "kernel_zero' is missing"),
        (f"{UP}/kernel_zero", np.full((2, 2, 96), 16, np.float16), r"not integers in \[0, 15\]"),
        (f"{UP}/kernel_zero", np.full((2, 2, 96), 0.5, np.float16), r"not integers in \[0, 15\]"),
        (f"{UP}/kernel_q", None, "up_proj/kernel' is in its training form"),
        (f"{UP}/lora_a", np.zeros(3), "up_proj/lora_a' has no place in a compressed-tensors"),
        ("norm/weight", None, "parameter 'norm/weight' is missing"),
    ],
)
def test_parameters_that_do_not_fit_are_named(path, value, message, tmp_path):
    config, params = stored.model("tied", "asymmetric group 32")
    with pytest.raises(UserError, match=message) as e:
        write_compressed_tensors(tmp_path / "out", config, stored.changed(params, path, value))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_sent_to_the_float_format(tmp_path):
    config, params = stored.model("tied", "channel")
    with pytest.raises(UserError, match="no linear layer is quantized; export to the format hf"):
        write_compressed_tensors(tmp_path / "out", config, stored.values(params))
    assert list(tmp_path.iterdir()) == []


def test_a_readme_of_the_users_own_is_not_touched(tmp_path):
    config, params = stored.model("tied", "channel")
    write_compressed_tensors(tmp_path / "out", config, params)
    (tmp_path / "out" / "README.md").write_text("my notes")
    with pytest.raises(UserError, match=r"holds README\.md"):
        write_compressed_tensors(tmp_path / "out", config, params, card=CARD_MARK)
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"
