"""Rows as tokens and targets: texts, conversations, instructions, and every template's trap."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdistill.train.data import (
    Example,
    encode_rows,
    load_rows,
)
from tests.errors import error_of
from tests.tiny import CHATML, byte_tokenizer

# Trims, begins with BOS, has no generation prompt, and ends only the last turn.
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ '</s>' if loop.last }}"
    "{% else %}{{ raise_exception('only user and assistant,\nplease') }}{% endif %}{% endfor %}"
)
# Like Qwen3: an empty thought before the last answer; earlier thoughts are cut out of the text.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is im_end?"},
    {"role": "assistant", "content": "im_end"},
    {"role": "user", "content": "Höflich, bitte: 北京?"},
    {"role": "assistant", "content": "  Grüße aus 北京 🙂\n"},
]


def words_tokenizer():
    """Makes a tokenizer of whole words, without any special token."""
    words = "the cat sat on mat a dog [UNK]".split()
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def targets(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.loss_mask], skip_special_tokens=False)


def test_text_has_the_tokenizers_own_bos_and_one_eos():
    for bos in (False, True):
        tokenizer = byte_tokenizer(bos=bos)
        for text in ("héllo", "héllo</s>"):
            (example,) = encode_rows([{"text": text}], tokenizer)
            assert tokenizer.decode(example.tokens) == "<s>" * bos + "héllo</s>"
            assert example.tokens.dtype == np.int32
            assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    (example,) = encode_rows([{"text": "hi"}], byte_tokenizer(), add_eos=False)
    assert byte_tokenizer().decode(example.tokens) == "hi"
    (example,) = encode_rows([{"text": "hi"}], byte_tokenizer(eos=False))
    assert byte_tokenizer().decode(example.tokens) == "hi"
    (example,) = encode_rows([{"text": "the cat sat"}], words_tokenizer())
    assert example.tokens.tolist() == [0, 1, 2]


def test_a_blank_text_gives_no_tokens():
    first, second, third = encode_rows(
        [{"text": ""}, {"text": "a"}, {"text": " \n"}], byte_tokenizer(bos=True)
    )
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (0, 3, 0)


def test_more_rows_than_one_chunk_keep_their_order(capfd):
    tokenizer = byte_tokenizer()
    rows = [
        {"text": f"{i}"} if i % 3 else {"instruction": f"{i}", "output": "o"} for i in range(2500)
    ]
    examples = encode_rows(rows, tokenizer)
    for i, example in enumerate(examples):
        text = f"<|im_start|>user\n{i}<|im_end|>\n<|im_start|>assistant\no<|im_end|>\n"
        assert tokenizer.decode(example.tokens) == (f"{i}</s>" if i % 3 else text)
    assert capfd.readouterr() == ("", "")


def test_messages_through_the_chat_template():
    tokenizer = byte_tokenizer(bos=True)
    (example,) = encode_rows([{"messages": CONVERSATION}], tokenizer, template="chat")
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(example.tokens) == rendered  # no BOS: the template wrote none
    assert example.loss_mask[1:].all() and not example.loss_mask[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "im_end<|im_end|>  Grüße aus 北京 🙂\n<|im_end|>"),
        (
            THINKING,
            "im_end<|im_end|><think>\n\n</think>\n\n  Grüße aus 北京 🙂\n<|im_end|>",
        ),
        (BRACKETS, " im_end Grüße aus 北京 🙂</s>"),
        (None, "im_end</s>  Grüße aus 北京 🙂\n</s>"),
    ],
)
def test_completion_is_what_the_assistant_says_and_the_end_of_turn(template, expected):
    tokenizer = byte_tokenizer(template, bos=True)
    messages = CONVERSATION[1:] if template == BRACKETS else CONVERSATION
    (example,) = encode_rows([{"messages": messages}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == expected
    (all_of_it,) = encode_rows([{"messages": messages}], tokenizer)
    assert (all_of_it.tokens == example.tokens).all()


def test_an_answer_that_the_template_changes_ends_at_its_own_end_of_turn():
    tokenizer = byte_tokenizer(THINKING)
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (example,) = encode_rows([{"messages": messages}], tokenizer, loss_on="completion")
    expected = "two<|im_end|><think>\n\n</think>\n\nfour<|im_end|>"
    assert targets(example, tokenizer) == expected
    # The end of a later turn is not taken for its own.
    end = "{{ '<|im_end|>' if loop.last or m.role == 'user' }}"
    tokenizer = byte_tokenizer(THINKING.replace("<|im_end|>", end))
    (example,) = encode_rows([{"messages": messages}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == "two\n<think>\n\n</think>\n\nfour<|im_end|>"


def test_a_generation_prompt_that_the_rendering_does_not_repeat():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = byte_tokenizer(template)
    (example,) = encode_rows([{"messages": CONVERSATION[:3]}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == "im_end<|im_end|>"


def test_an_empty_answer_teaches_the_end_of_turn():
    tokenizer = byte_tokenizer()
    row = {"instruction": "i", "input": None, "output": ""}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == "<|im_end|>"


def test_instruction_and_input_are_joined_by_a_blank_line():
    tokenizer = byte_tokenizer()
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "not this"},
        {"instruction": "Add.", "input": "", "output": "3"},
        {"instruction": "Add.", "output": "3"},
    ]
    first, second, third = encode_rows(rows, tokenizer, template="plain")
    assert tokenizer.decode(first.tokens) == (
        "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3</s>"
    )
    assert tokenizer.decode(second.tokens) == "### Instruction:\nAdd.\n\n### Response:\n3</s>"
    assert (second.tokens == third.tokens).all()
    (bare,) = encode_rows(rows[1:2], tokenizer, template="plain", add_eos=False)
    assert tokenizer.decode(bare.tokens) == "### Instruction:\nAdd.\n\n### Response:\n3"


def test_plain_conversation():
    tokenizer = byte_tokenizer(None, bos=True)
    (example,) = encode_rows([{"messages": CONVERSATION[:4]}], tokenizer)
    assert tokenizer.decode(example.tokens) == (
        "<s>Be kind.\n\n### Instruction:\nWhat is im_end?\n\n### Response:\nim_end</s>\n\n"
        "### Instruction:\nHöflich, bitte: 北京?"
    )


def test_a_token_over_the_border_of_an_answer_is_a_target():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, ":a", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "a")]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        chat_template=(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
            "{{ 'a:' if add_generation_prompt else '</s>' }}"
        ),
    )
    row = {"instruction": "x", "output": "ab"}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    said = [tokenizer.decode([t]) for t in example.tokens[example.loss_mask]]
    assert said == [":a", "b", "</s>"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, ("row 2", "plain text", "--loss-on all")),
        ({"messages": CONVERSATION[:2]}, ("row 2", "no answer", "--loss-on all")),
        ({"context": "a"}, ("row 2", "'context'", "'conversations'")),
        ({"text": 1}, ("row 2", "int in 'text'")),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named(row, words):
    rows = [{"instruction": "i", "output": "o"}, row]
    message = error_of(encode_rows, rows, byte_tokenizer(), loss_on="completion")
    assert all(word in message for word in words)


def test_template_errors():
    rows = [{"messages": CONVERSATION}]
    assert "has no chat template" in error_of(
        encode_rows, rows, byte_tokenizer(None), template="chat"
    )
    message = error_of(encode_rows, rows, byte_tokenizer(BRACKETS))
    assert message.startswith("row 1") and "(only user and assistant, please)" in message
    strange = [{"messages": [{"role": "tool", "content": "x"}]}]
    message = error_of(encode_rows, strange, byte_tokenizer(None))
    assert message.startswith("row 1") and "'tool'" in message


def test_gsm8k(shared_data):
    rows = load_rows(str(shared_data / "instruct" / "gsm8k_train.jsonl.gz"))
    assert len(rows) == 7473
    tokenizer = byte_tokenizer()
    chosen = rows.select(range(50))
    for row, example in zip(
        chosen, encode_rows(chosen, tokenizer, loss_on="completion"), strict=True
    ):
        assert targets(example, tokenizer) == row["output"] + "<|im_end|>"


def test_several_forms_give_the_same_conversation():
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    parts = [{"type": "text", "text": "a"}]
    rows = [
        {"messages": [question, answer]},
        {"messages": [question, answer | {"content": parts}]},
        {"messages": json.dumps([question, answer])},
        {"prompt": [question], "completion": [answer]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
    ]
    tokenizer = byte_tokenizer()
    for example in encode_rows(rows, tokenizer, loss_on="completion"):
        assert targets(example, tokenizer) == "a<|im_end|>"
        assert tokenizer.decode(example.tokens) == tokenizer.apply_chat_template(
            [question, answer], tokenize=False
        )


def test_a_prompt_and_its_completion_as_texts():
    tokenizer = byte_tokenizer(bos=True)
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    assert tokenizer.decode(example.tokens) == "<s>2 + 2 = 4</s>"
    assert targets(example, tokenizer) == " 4</s>"


def test_answers_inside_of_a_prompt_are_no_targets():
    tokenizer = byte_tokenizer()
    row = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == CONVERSATION[4]["content"] + "<|im_end|>"


def test_a_message_has_a_weight_of_its_own():
    tokenizer = byte_tokenizer()
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["weight"], messages[4]["weight"] = 0, 0.5
    (example,) = encode_rows([{"messages": messages, "weight": 4}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == CONVERSATION[4]["content"] + "<|im_end|>"
    assert set(example.weights[example.loss_mask].tolist()) == {2.0}
    (example,) = encode_rows([{"messages": messages}], tokenizer)
    assert tokenizer.decode(example.tokens[example.weights == 0]) == (
        "<|im_start|>assistant\nim_end<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "assistant", "content": None}, "nothing"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "'image'"),
        ({"role": "assistant", "content": "x", "train": False}, "'train'"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "'function_call'"),
        ({"role": "assistant", "content": "x", "weight": -1}, "-1"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "reasoning"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "find"}}]},
            "find",
        ),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(message, word):
    rows = [{"messages": [{"role": "user", "content": "q"}, message]}]
    assert word in error_of(encode_rows, rows, byte_tokenizer())


def test_tools_reach_the_template_or_are_refused():
    tools = [{"type": "function", "function": {"name": "weather_now", "parameters": {}}}]
    row = {"messages": CONVERSATION, "tools": tools}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(template)
    for given in (tools, json.dumps(tools)):
        (example,) = encode_rows([row | {"tools": given}], tokenizer)
        text = tokenizer.apply_chat_template(CONVERSATION, tools=tools, tokenize=False)
        assert tokenizer.decode(example.tokens) == text
    assert "weather_now" in error_of(encode_rows, [row], byte_tokenizer())
    assert "tools" in error_of(encode_rows, [row], byte_tokenizer(None))


def test_rendered_text_gets_no_second_bos_or_eos():
    tokenizer = byte_tokenizer("<s>" + CHATML + "</s>\n", bos=True)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    first, second = encode_rows([{"messages": CONVERSATION}, {"text": text}], tokenizer)
    assert first.tokens.tolist() == second.tokens.tolist()
