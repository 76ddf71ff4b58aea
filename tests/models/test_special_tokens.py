"""The ids that end a text: the union of what every file of a model says, through every format."""

import json

import numpy as np
import pytest
from transformers import GenerationConfig

from jaxdistill.errors import UserError
from jaxdistill.export.compressed_tensors import write_compressed_tensors
from jaxdistill.export.gguf import write_gguf
from jaxdistill.export.mlx import write_mlx
from jaxdistill.models import generate
from jaxdistill.models.generate import Sampling
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import load_model
from jaxdistill.models.quantized import save_quantized
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, dequantize_params, quantize_params
from tests import tiny

END, TURN = 0, 259  # </s> and <|im_end|> of the tests' tokenizer
CONFIG = tiny.config(vocab_size=260, eos_token_id=5, bos_token_id=1, tie_embeddings=False)


@pytest.fixture
def model(tmp_path):
    """A model whose config.json, generation_config.json and tokenizer name an end each."""
    directory = tmp_path / "model"
    save_hf(directory, CONFIG, tiny.params(CONFIG), tiny.byte_tokenizer())
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, TURN]}))
    (directory / "checksums.crc32").unlink()
    return directory


def edit(path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_models_stop_ids_are_those_of_all_its_files(model):
    assert load_model(model).stop_ids == (5, TURN, END)


@pytest.mark.parametrize(
    ("generation", "eos", "stops"),
    [
        (None, "</s>", (5, END)),
        ({}, "<|im_end|>", (5, TURN)),
        ({"eos_token_id": 7}, "</s>", (5, 7, END)),
        ({"eos_token_id": [5]}, None, (5,)),
    ],
)
def test_what_a_file_does_not_say_adds_nothing(generation, eos, stops, model):
    path = model / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    edit(model / "tokenizer_config.json", eos_token=eos)
    assert load_model(model).stop_ids == stops


@pytest.mark.parametrize("eos", ["</s>", [1, "x"], 2.5, [[1]], True, -2])
def test_a_damaged_generation_config_is_one_line(eos, model):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match="generation_config.json has the eos_token_id"):
        load_model(model)


def test_generation_stops_at_the_end_that_the_generation_config_names(model):
    """The model always says <|im_end|>."""
    params = tiny.params(CONFIG)
    for name, part in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        kernel = params["layers"][name][part]["kernel"]
        params["layers"][name][part]["kernel"] = np.zeros_like(kernel)
    head = np.zeros_like(params["lm_head"]["kernel"])
    head[0, TURN] = 100
    params["lm_head"]["kernel"] = head
    params["embed_tokens"]["embedding"] = np.array(params["embed_tokens"]["embedding"])
    params["embed_tokens"]["embedding"][:, 0] = 10
    end = (model / "generation_config.json").read_text()
    save_hf(model, CONFIG, params, tiny.byte_tokenizer())
    (model / "generation_config.json").write_text(end)
    read = load_model(model)
    how = Sampling(max_new_tokens=8)
    assert generate.generate(read.apply_fn(), read.params, read.config, [[66]], how=how) == [[]]


@pytest.fixture
def student(model, tmp_path):
    """The same, quantized: its directory, and its parts."""
    read = load_model(model)
    policy = default_policy(QuantSpec(group_size=32), tied=False)
    stored = quantize_params(add_scales(read.params, policy), policy)
    save_quantized(tmp_path / "student", read.config, stored, read.tokenizer, policy)
    read = load_model(tmp_path / "student")
    assert read.stop_ids == (5, TURN, END)
    return read


@pytest.mark.parametrize("write", [write_compressed_tensors, write_mlx])
def test_exported_directories_name_all_stop_ids(write, student, tmp_path):
    write(tmp_path / "out", student.config, student.params, student.tokenizer)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())  # what mlx-lm and vLLM read
    assert raw["eos_token_id"] == [5, TURN, END]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [5, TURN, END]


def test_a_float_export_reads_back_with_all_stop_ids(student, tmp_path):
    values = dequantize_params(student.params)
    save_hf(tmp_path / "out", student.config, values, student.tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [5, TURN, END]
    assert load_model(tmp_path / "out").stop_ids == student.stop_ids


def test_a_gguf_file_names_up_to_three_stop_ids(student, tmp_path, caplog):
    write_gguf(tmp_path / "m.gguf", student.config, student.params, student.tokenizer)
    file = GGUFFile(tmp_path / "m.gguf")
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [file.value(key) for key in keys] == [END, 5, TURN]  # the tokenizer's own first
    assert set(load_model(tmp_path / "m.gguf").stop_ids) == set(student.stop_ids)
    assert not caplog.records


def test_a_stop_id_that_gguf_has_no_room_for_is_said(student, tmp_path, caplog):
    config = tiny.config(vocab_size=260, eos_token_id=(5, TURN, 7, 8), tie_embeddings=False)
    write_gguf(tmp_path / "m.gguf", config, student.params, student.tokenizer)
    assert "[7, 8] are left out" in caplog.text


def test_a_head_that_the_checkpoint_unties_stays_untied_when_quantized(model, tmp_path):
    edit(model / "config.json", tie_word_embeddings=True)  # and the weights have another head
    read = load_model(model)
    policy = default_policy(QuantSpec(group_size=32), tied=read.config.tie_embeddings)
    stored = quantize_params(add_scales(read.params, policy), policy)
    save_quantized(tmp_path / "student", read.config, stored, read.tokenizer, policy)
    again = load_model(tmp_path / "student")
    assert not again.config.tie_embeddings and "kernel_q" in again.params["lm_head"]
    write_gguf(tmp_path / "m.gguf", again.config, again.params, again.tokenizer)
    assert "output.weight" in GGUFFile(tmp_path / "m.gguf").tensors
    write_mlx(tmp_path / "mlx", again.config, again.params, again.tokenizer)
    raw = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False


def test_a_changed_generation_config_is_read_with_a_note(tmp_path, caplog):
    """Weights that changed are damage; what users adapt by hand is not."""
    save_hf(tmp_path / "m", CONFIG, tiny.params(CONFIG), tiny.byte_tokenizer())
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=[7])
    assert load_model(tmp_path / "m").stop_ids == (5, 7, END)
    assert "generation_config.json has" in caplog.text
    edit(tmp_path / "m" / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(UserError, match="config.json has"):
        load_model(tmp_path / "m")
