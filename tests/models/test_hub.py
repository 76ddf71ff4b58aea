"""load_model on every kind of source, and vocabularies compared."""

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models import hub
from jaxdistill.models.hf import load_hf, save_hf
from jaxdistill.models.hub import ACCEPTED, Model, check_same_vocabulary, load_config, load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def tokenizer(words: int = 96, first: str = "a") -> PreTrainedTokenizerFast:
    """Builds a tokenizer with this many words."""
    vocab = {first: 0} | {f"w{i}": i for i in range(1, words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, first)))


def refused(call, *parts: str) -> None:
    """Asserts that a call raises a one-line UserError holding every part."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model directory with a tokenizer."""
    save_hf(tmp_path / "model", *load_hf(GOLDEN / "qwen3_head_dim"), tokenizer())
    return tmp_path / "model"


def test_a_directory_gives_model_and_tokenizer(directory):
    model = load_model(directory)
    assert model.source == str(directory)
    assert model.tokenizer is not None and len(model.tokenizer) == 96
    assert model.config.model_type == "qwen3"
    assert load_model(str(directory)).config == model.config


def test_a_directory_without_tokenizer_gives_none():
    assert load_model(GOLDEN / "qwen2_tied").tokenizer is None


def test_the_home_directory_may_be_abbreviated(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory.parent))
    assert load_model("~/model").source == "~/model"


def test_a_gguf_file_goes_to_its_reader(tmp_path, monkeypatch):
    config, params = load_hf(GOLDEN / "qwen2_tied")
    seen = []
    monkeypatch.setattr(hub, "read_gguf", lambda p: seen.append(p) or (config, params, tokenizer()))
    (tmp_path / "m.GGUF").touch()
    model = load_model(tmp_path / "m.GGUF")
    assert seen == [tmp_path / "m.GGUF"] and model.config is config


def test_a_hub_name_is_fetched(directory, monkeypatch):
    calls = []

    def fetch(name, **kwargs):
        calls.append((name, kwargs))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = load_model("org/some-Model_1.5B")
    assert model.source == "org/some-Model_1.5B" and model.tokenizer is not None
    assert {name for name, _ in calls} == {"org/some-Model_1.5B"}
    kwargs, templates = (options for _, options in calls)
    assert templates == {"allow_patterns": ["additional_chat_templates/*.jinja"]}
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "merges.txt",
                "chat_template.jinja",
                "pytorch_model.bin",
                "README.md",
                "original/params.json",
                "onnx/model.safetensors",
            ],
            **kwargs,
        )
    )
    assert kept == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    ]


def test_of_a_hub_name_whose_shape_is_asked_the_config_alone_is_fetched(directory, monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kwargs: calls.append((name, kwargs["allow_patterns"])) or str(directory),
    )
    assert load_config("org/name") == load_model(directory).config
    assert calls == [("org/name", ["config.json"])]


def test_a_hub_name_that_cannot_be_fetched_is_refused():
    refused(
        lambda: load_model("org/name"),
        "org/name is no path here and could not be fetched from the Hugging Face Hub (",
        f"; accepted: {ACCEPTED}; check the name and the network, or give a directory",
    )


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "GatedRepoError"])
def test_missing_and_gated_models_are_told_apart(error, monkeypatch):
    kind = getattr(huggingface_hub.errors, error)

    def fetch(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    expected = {
        "RepositoryNotFoundError": "org/name is neither a path here nor a model on the Hugging Fac",
        "GatedRepoError": "org/name is a gated model on the Hugging Face Hub; accept its terms",
    }
    refused(lambda: load_model("org/name"), expected[error], "hf auth login")


@pytest.mark.parametrize(
    "source",
    ["", "name", "a/b/c", "/gone", "./runs/x", "../x", "org/model.gguf", "org/na me", Path("a/b")],
)
def test_what_does_not_exist_and_is_no_hub_name_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_model(source), f"accepted: {ACCEPTED}")


def test_a_path_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(lambda: load_model(tmp_path / "notes.txt"), "notes.txt is a file, but not a .gguf file")
    refused(
        lambda: load_model(tmp_path), f"{tmp_path} is a directory without config.json; accepted"
    )


def test_a_tokenizer_beyond_the_vocabulary_is_refused(directory):
    shutil.rmtree(directory)
    save_hf(directory, *load_hf(GOLDEN / "qwen3_head_dim"), tokenizer(words=97))
    refused(
        lambda: load_model(directory), " has 97 ids and the model a vocabulary of 96; accepted:"
    )


def a_model(source: str, vocab_size: int = 96, tok: PreTrainedTokenizerFast | None = None) -> Model:
    """Gives a model without weights."""
    config, _ = load_hf(GOLDEN / "qwen2_tied")
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return Model(config=config, params={"x": np.ones(1)}, tokenizer=tok, source=source)


def test_equal_vocabularies_pass():
    same = check_same_vocabulary(a_model("t", tok=tokenizer()), a_model("s", tok=tokenizer()))
    assert same == check_same_vocabulary(a_model("t"), a_model("s")) == 96


def test_tables_padded_to_different_sizes_share_the_smaller():
    """As Qwen2.5's, of one tokenizer: 151,936 rows in the small models, 152,064 in the large."""
    small, large = a_model("s", 96, tokenizer()), a_model("t", 128, tokenizer())
    assert check_same_vocabulary(large, small) == check_same_vocabulary(small, large) == 96


def test_unequal_vocabularies_are_refused_naming_both():
    refused(
        lambda: check_same_vocabulary(a_model("big"), a_model("small", 64)),
        "the teacher big has a vocabulary of 96 and the student small one of 64; accepted: equal",
    )
    refused(
        lambda: check_same_vocabulary(
            a_model("big", tok=tokenizer()), a_model("small", tok=tokenizer(first="b"))
        ),
        "the teacher big has tokenizer ",
        "and the student small has tokenizer ",
        "accepted: the same tokenizer in both",
    )
    refused(
        lambda: check_same_vocabulary(a_model("big", tok=tokenizer()), a_model("small")),
        "and the student small has no tokenizer;",
    )


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./a/b", "a--b/c", "a/b..c", "a/b.git", "-a/b", "ä/b", "x" * 300]
)
def test_what_is_neither_here_nor_a_hub_name_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    for load in (load_model, load_config):
        with pytest.raises(UserError, match="does not exist|is no path and no hub name"):
            load(name)
