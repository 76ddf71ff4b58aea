"""Prompts of held-out rows of every form, and what models answer to them."""

import dataclasses

import pytest

from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.generate import answer
from jaxdistill.recipes.samples import prompts_of, run_samples, side_by_side
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_model(tmp_path_factory.mktemp("models") / "m", 0))


def said(model, rows, count=9):
    return [model.tokenizer.decode(ids) for ids in prompts_of(rows, model, count)]


def test_a_prompt_is_what_comes_before_the_answer(model):
    asked = {"messages": [{"role": "user", "content": "Why?"}]}
    answered = {"messages": [*asked["messages"], {"role": "assistant", "content": "So."}]}
    rows = [
        {"text": "short"},
        asked,  # has no answer
        answered,
        {"text": "x" * 200},
        {"instruction": "Say A", "output": "A"},
        {"instruction": "Say nothing", "output": ""},
        {"nothing": 1},
    ]
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    found = said(model, rows)
    assert found[:3] == [chat.format("Why?"), "x" * 48, chat.format("Say A")]
    assert said(model, rows, 1) == found[:1]
    assert said(model, rows[:2]) == said(model, []) == []


def test_answers_are_those_of_generate(model):
    text = "the quick brown fox jumps over the lazy dog and more"
    prompts = prompts_of([{"text": text * 2}, {"text": "ab " * 40}], model, 2)
    (first, second) = side_by_side({"a": model, "b": model}, prompts)
    alone = answer(model, first["prompt"], Sampling(max_new_tokens=48), raw=True)
    assert first["answers"] == {"a": alone, "b": alone}
    assert second["answers"]["a"] != alone


def test_a_model_without_room_for_an_answer_gives_none(model):
    prompts = prompts_of([{"text": "x" * 200}], model, 1)
    config = dataclasses.replace(model.config, max_position_embeddings=len(prompts[0]))
    assert side_by_side({"short": dataclasses.replace(model, config=config)}, prompts) == []


def test_of_a_run(tmp_path, model):
    made = run_samples(model.source, model, None, [{"text": "x" * 200}], 1)
    (sample,) = made
    assert list(sample["answers"]) == ["teacher", "student"]
    assert sample["answers"]["teacher"] == sample["answers"]["student"]
