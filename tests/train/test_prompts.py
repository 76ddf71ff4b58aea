"""Prompt rows: chats keep their prompt, texts get one, and rows without an answer go."""

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.encode import Example, encode_rows
from jaxdistill.train.prompts import prompt_rows
from tests import tiny


def example(tokens, targets):
    return Example(
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array([i in targets for i in range(len(tokens))], np.bool_),
    )


def test_prompts_end_at_the_first_target():
    examples = [
        example([1, 2, 3, 4, 5], {3, 4}),  # a chat: three tokens of prompt
        example([1, 2, 3, 4, 5, 6, 7], {6}),  # its prompt is too long: the last four stay
        example([1, 2, 3, 4, 5, 6, 7, 8, 9], set(range(1, 9))),  # a text, cut to the row
        example([1, 2, 3, 4], {1, 2, 3}),  # no longer than a prompt: dropped
        example([1, 2, 3], set()),  # no answer: dropped
        example([], set()),
    ]
    rows = prompt_rows(examples, seq_len=8, prompt_length=4, pad_id=99)
    np.testing.assert_array_equal(
        rows.tokens,
        [
            [1, 2, 3, 4, 5, 99, 99, 99],
            [3, 4, 5, 6, 7, 99, 99, 99],
            [1, 2, 3, 4, 5, 6, 7, 8],
        ],
    )
    targets = [{3, 4}, {4}, {4, 5, 6, 7}]
    assert [set(np.flatnonzero(row)) for row in rows.loss_mask] == targets
    np.testing.assert_array_equal(rows.segment_ids, rows.tokens != 99)
    np.testing.assert_array_equal(rows.positions[2], range(8))
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_a_chat_keeps_what_its_template_puts_before_the_answer():
    tokenizer = tiny.byte_tokenizer()
    row = {"instruction": "Say hello.", "output": "Hello!"}
    (encoded,) = encode_rows([row], tokenizer, loss_on="completion")
    rows = prompt_rows([encoded], seq_len=96, prompt_length=64)
    prompt = rows.tokens[0][: int(np.argmax(rows.loss_mask[0]))]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(rows.tokens[0][rows.loss_mask[0]]).startswith("Hello!")


def test_no_room_and_no_row_are_named():
    text = [example([1, 2, 3], {1, 2})]
    for length in (0, 8):
        with pytest.raises(UserError, match=r"prompt_length \d for rows of 8 tokens given; accep"):
            prompt_rows(text, seq_len=8, prompt_length=length)
    with pytest.raises(UserError, match="none of 1 examples has an answer beside a prompt of 3"):
        prompt_rows(text, seq_len=8, prompt_length=3)
