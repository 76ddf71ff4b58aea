"""Tests the model card: what it says of a run, and that every exported directory carries it."""

import json
from pathlib import Path

import gguf
import pytest
import yaml
from huggingface_hub import constants

from jaxdistill.errors import UserError
from jaxdistill.export.model_card import description, model_card, read_run
from jaxdistill.models.hf_directory import CARD_MARK
from jaxdistill.models.quantized import load_quantized, save_quantized
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import Policy, default_policy
from jaxdistill.recipes.export import Export, export
from tests import stored, tiny

RESULTS = {
    "teacher": {"nll": 2.0, "perplexity": 7.389, "kl": 0.0, "agreement": 1.0, "tokens": 4064},
    "ptq": {"nll": 2.9, "perplexity": 18.174, "kl": 0.91, "agreement": 0.61, "tokens": 4064},
    "student": {"nll": 2.2, "perplexity": 9.025, "kl": 0.125, "agreement": 0.8432, "tokens": 4064},
}
OPTIONS = {
    "model": "/home/someone/models/tiny-llama",
    "data": "/home/someone/text.jsonl.gz",
    "bits": 3,
    "steps": 200,
    "lr": 1e-4,
    "freeze": "ov",
    "eval_data": None,
}


def make_run(folder: Path, activations=(), spec="3 bits", **options) -> Path:
    """A finished run's directory around a tiny model: 3-bit layers, an 8-bit head."""
    config, params = stored.model("bytes", spec)
    specs = default_policy(QuantSpec(bits=3, group_size=32), tied=config.tie_embeddings)
    policy = Policy(rules=specs.rules, activations=activations)
    run = folder / "a run"
    run.mkdir()
    save_quantized(run / "student", config, params, tiny.byte_tokenizer(), policy)
    said = {"options": OPTIONS | options, "environment": {"packages": {"jax": "0.10.2"}}}
    (run / "config.json").write_text(json.dumps(said))
    (run / "results.json").write_text(json.dumps(RESULTS))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


def card_of(run, format="hf", **options):
    config, params, _ = load_quantized(run / "student")
    return model_card(read_run(run), config, params, format, **options)


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize(
    ("format", "library", "tag", "loads"),
    [
        ("hf", "transformers", "jaxdistill", "AutoModelForCausalLM.from_pretrained"),
        ("compressed-tensors", "transformers", "compressed-tensors", "vllm serve ./it"),
        ("mlx", "mlx", "mlx", "mlx_lm.generate --model ./it"),
    ],
)
def test_the_front_matter_and_the_loading_are_the_formats(run, format, library, tag, loads):
    front, body = front_matter(card_of(run, format, at="./it"))
    assert front["library_name"] == library and front["pipeline_tag"] == "text-generation"
    assert {tag, "3-bit", "8-bit", "knowledge-distillation"} <= set(front["tags"])
    assert "base_model" not in front
    assert body.lstrip().startswith("# a run\n") and CARD_MARK in body
    assert loads in body


def test_the_card_says_what_was_made_and_measured(run):
    card = card_of(run)
    assert "| lm_head | 8-bit symmetric, one scale per 32 weights |" in card
    row = next(line for line in card.splitlines() if "3-bit symmetric" in line)
    assert {"q_proj", "o_proj", "down_proj"} <= set(row.strip("| ").split(" |")[0].split(", "))
    assert "200 steps of distillation" in card
    assert "| student | 2.2000 | 9.025 | 0.1250 | 84.32% |" in card
    assert "| ptq | 2.9000 | 18.174 | 0.9100 | 61.00% |" in card
    assert "4,064 held-out tokens" in card
    assert "| freeze | ov |" in card and "| lr | 0.0001 |" in card and "eval_data" not in card
    assert "jax 0.10.2" in card


def test_paths_of_whoever_made_it_are_not_published(run):
    config, params, _ = load_quantized(run / "student")
    for text in (card_of(run), description(read_run(run), config, params)):
        assert "someone" not in text
    assert "| data | text.jsonl.gz |" in card_of(run) and "| model | tiny-llama |" in card_of(run)


def test_a_distilled_student_names_its_teachers_without_their_paths(tmp_path):
    run = make_run(
        tmp_path,
        model=None,
        teacher="/home/someone/big,/home/someone/other",
        student="/home/someone/small",
        student_init=["cut:layers=1"],
    )
    card = card_of(run)
    assert "million parameters: small, made smaller by cut:layers=1, quantized" in card
    assert "200 steps of distillation from big, other (KD-QAT)" in card
    assert "| teacher | big,other |" in card and "someone" not in card


def test_what_a_format_does_to_the_values_is_said(run):
    assert "values are held exactly" in card_of(run)
    assert "float16, which rounds" in card_of(run, dtype="float16")
    packed = card_of(run, "compressed-tensors")
    assert "`lm_head`) is packed" in packed
    assert "`lm_head`) is packed" not in card_of(run, "compressed-tensors", float_head=True)


def test_post_training_quantization_and_activations_are_said(tmp_path):
    rules = ((r"^layers/", ActivationSpec(bits=8)),)
    run = make_run(tmp_path, activations=rules, steps=0)
    front, body = front_matter(card_of(run, "mlx"))
    assert "knowledge-distillation" not in front["tags"] and "without distillation" in body
    assert "trained and measured with quantized activations" in body


def test_asymmetric_layers_are_said_and_who_cannot_load_them(tmp_path):
    run = make_run(tmp_path, spec="asymmetric group 32")
    assert "-bit asymmetric, one scale per 32 weights |" in card_of(run)
    assert "cannot load asymmetric layers" in card_of(run, "compressed-tensors")
    assert "cannot load asymmetric layers" not in card_of(run, "mlx")
    with pytest.raises(UserError, match="uint4; accepted in GGUF: int4.*cannot hold z"):
        export(Export(run=run, format="gguf", out=tmp_path / "m.gguf"))
    assert not (tmp_path / "m.gguf").exists()


def test_a_base_model_is_named_only_if_it_came_from_the_hub(run, tmp_path, monkeypatch):
    named = make_run(tmp_path, model="org/tiny-llama")
    assert "base_model" not in front_matter(card_of(named))[0]  # as likely a relative path
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--org--tiny-llama" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--org--tiny-llama" / "refs").mkdir()
    (cache / "models--org--tiny-llama" / "refs" / "main").write_text("c0ffee")
    front, body = front_matter(card_of(named))
    assert front["base_model"] == "org/tiny-llama" and front["base_model_relation"] == "quantized"
    assert "| model | org/tiny-llama |" in body
    out = export(Export(run=named, format="gguf", out=tmp_path / "m.gguf"))
    fields = {k: f.contents() for k, f in gguf.GGUFReader(out).fields.items()}
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/tiny-llama"
    assert fields["general.base_model.0.name"] == "tiny-llama"


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "mlx"])
def test_every_exported_directory_carries_its_card(run, format, tmp_path):
    out = tmp_path / "out"
    assert export(Export(run=run, format=format, out=out)) == out
    text = (out / "README.md").read_text()
    assert CARD_MARK in text and 'from_pretrained("./out"' in text or "--model ./out" in text
    assert (out / "chat_template.jinja").read_text() == tiny.CHATML
    export(Export(run=run, format=format, out=out, dtype="float16"))  # replaces its own card
    assert "in float16" in (out / "README.md").read_text()
    (out / "README.md").write_text("notes of the user's own")
    with pytest.raises(UserError, match=r"it holds README\.md"):
        export(Export(run=run, format=format, out=out))
    assert (out / "README.md").read_text() == "notes of the user's own"


def test_a_gguf_file_says_it_in_its_metadata(run, tmp_path):
    out = export(Export(run=run, format="gguf", out=tmp_path / "m.gguf"))
    fields = {k: f.contents() for k, f in gguf.GGUFReader(out).fields.items()}
    assert fields["general.name"] == "a run"
    said = fields["general.description"]
    assert "\n" not in said and "3-bit symmetric" in said and "perplexity 9.025" in said
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_options_that_do_not_fit_the_format_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="--dtype float16 given; accepted with --format gguf"):
        export(Export(run=run, format="gguf", out=tmp_path / "m.gguf", dtype="float16"))
    with pytest.raises(UserError, match="--float-head given with --format mlx"):
        export(Export(run=run, format="mlx", out=tmp_path / "m", float_head=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize("text", [None, "{cut", "[1]"])
def test_a_run_that_cannot_be_read_is_named(name, text, tmp_path):
    run = make_run(tmp_path)
    (run / name).unlink() if text is None else (run / name).write_text(text)
    with pytest.raises(UserError, match=f"cannot read .*{name}") as e:
        export(Export(run=run, format="mlx", out=tmp_path / "m"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "m").exists()
