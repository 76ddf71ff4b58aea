"""Sets of text for classification: learned embeddings in words, and texts that a model wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.dd.stored_set import load_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.models.hub import load_model
from jaxdistill.recipes import condense_words
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_data import read_real
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.train.labelled import load_labelled
from tests.recipes.test_condense import lines_of, save_small_model, save_texts
from tests.recipes.test_evaluate_set import FAST

PROMPT = "a {label} film:"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return save_texts(folder / "train.jsonl"), save_small_model(folder / "model")


def job(texts, out, **changes):
    data, model = texts
    given = {"per_class": 2, "seq_len": 16, "checkpoint_every": -1} | changes
    return Condense(data=data, model=model, out=out, **given)


def judged(run, data, network, capsys):
    """The names and means of what evaluate-set shows of a run."""
    capsys.readouterr()
    arguments = ["--set", str(run), "--test", data, *FAST, "--baselines", "none"]
    main(["evaluate-set", *arguments, "--architectures", network, "--json"])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    return {row["name"]: row["mean"] for row in rows}


def test_learned_embeddings_are_stored_in_words(texts, tmp_path, capsys):
    some = {"level": "embeddings", "method": "distribution-matching", "width": 8, "steps": 2}
    result = condense(job(texts, tmp_path / "r", as_text="nearest", soft_labels=False, **some))
    assert result["level"] == "text"
    stored = load_set(tmp_path / "r" / "set")
    # Two small updates do not leave the nearest token.
    real = [json.loads(line)["text"][:16] for line in lines_of(texts[0])]
    assert stored.texts == tuple(real[i] for i in stored.settings["rows"])
    rows = [json.loads(line) for line in lines_of(tmp_path / "r" / "set" / "train.jsonl")]
    assert [row["label_name"] for row in rows] == ["neg", "neg", "pos", "pos"]
    assert stored.texts[0] in (tmp_path / "r" / "README.md").read_text()
    assert list(judged(tmp_path / "r", texts[0], "transformer", capsys)) == ["set"]


def test_likely_texts_are_near_the_embeddings(texts, tmp_path):
    data, model = load_labelled(texts[0]), load_model(texts[1]).floats()
    real = read_real(data, level="embeddings", model=model, seq_len=16)
    o = job(
        texts,
        tmp_path,
        level="embeddings",
        as_text="perplexity",
        prompt=PROMPT,
        method="distribution-matching",
    )
    rows = np.array([0, 1, 4, 7])
    synthetic = Synthetic(
        learned={"inputs": jnp.asarray(real.inputs(rows))},
        fixed={"labels": jnp.asarray(data.labels[rows])},
    )
    # On the tokens themselves likelihood, at its small weight, moves nothing; padding is cut off.
    assert condense_words.likely_texts(o, real, synthetic) == tuple(data.texts[i] for i in rows)
    alone = condense_words.words_alone(synthetic)
    assert alone.learned == {} and set(alone.fixed) == {"labels"} and alone.size == 4


def test_written_texts_are_confirmed_by_a_classifier(texts, tmp_path, monkeypatch, capsys):
    """The tiny model writes no words: another writer stands in, who is wrong half of the time."""
    asked = []

    def write(model, prompts, how, **_):
        asked.extend(prompts)
        words = {"pos": ("good", "fine", "lovely"), "neg": ("bad", "poor", "awful")}
        other = {"pos": "neg", "neg": "pos"}
        made = []
        for i, prompt in enumerate(prompts):
            label = prompt.split()[1]
            made.append(f"{words[label if i % 2 else other[label]][i % 3]} film {90 + i}")
        assert how.max_new_tokens == 16
        return made

    monkeypatch.setattr(condense_words, "generate_texts", write)
    options = {"method": "generated", "prompt": PROMPT, "written": 12, "architecture": "linear"}
    options |= {"batch_size": 24, "expert_steps": 400}
    result = condense(job(texts, tmp_path / "r", **options))
    assert result["level"] == "text" and result["examples"] == 4 and "last_loss" not in result
    assert asked == ["a neg film:"] * 12 + ["a pos film:"] * 12
    stored = load_set(tmp_path / "r" / "set")
    assert np.asarray(stored.synthetic.fixed["labels"]).tolist() == [0, 0, 1, 1]
    assert all(text.split()[0] in ("bad", "poor", "awful") for text in stored.texts[:2])
    assert all(text.split()[0] in ("good", "fine", "lovely") for text in stored.texts[2:])
    assert judged(tmp_path / "r", texts[0], "mlp", capsys)["set"] > 0.7
    with pytest.raises(UserError, match="generate more"):
        condense(job(texts, tmp_path / "few", **options | {"per_class": 8}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"as_text": "nearest"}, "accepted with --level embeddings and --per-class"),
        ({"method": "generated"}, "give --prompt"),
        ({"method": "generated", "prompt": "a text"}, "accepted: a text with {label} in it"),
        ({"method": "generated", "prompt": PROMPT, "level": "embeddings"}, "leave out --level"),
        ({"method": "generated", "prompt": PROMPT, "steps": 3}, "--steps given with --method"),
        ({"prompt": PROMPT}, "accepted with --method generated and --as-text perplexity"),
        ({"method": "random", "as_text": "nearest"}, "accepted with --level embeddings"),
        ({"written": 3}, "--written given with --method meta-gradient"),
    ],
)
def test_bad_options_are_one_line(changes, message, texts, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        condense(job(texts, tmp_path / "r", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()
