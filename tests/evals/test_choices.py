"""Multiple choice against whole logits in plain numpy, one unpadded text at a time."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.choices import (
    Question,
    choice_metrics,
    choices_name,
    load_choices,
    score_choices,
)
from jaxdistill.evals.likelihood import Pair, encode_pair, log_likelihoods, prefix_token
from jaxdistill.models.decoder import Output, make_apply
from tests import tiny

CONFIG = tiny.config(vocab_size=260)
APPLY, PARAMS = make_apply(CONFIG), tiny.params(CONFIG)
LOGITS = jax.jit(lambda tokens: APPLY(PARAMS, tokens[None]).logits()[0])
BOS, EOS = 1, 0


def ids(text):
    """The byte-level tokenizer by hand: the letters of its alphabet in order, after two others."""
    alphabet = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    mapped = tiny.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(letter) + 2 for piece, _ in mapped for letter in piece]


def by_hand(context, continuation):
    """Log-likelihood and greediness from float64 log-softmax over the whole logits of one text."""
    tokens = [*context, *continuation]
    z = np.asarray(LOGITS(jnp.asarray(tokens)), np.float64)
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    places = np.arange(len(context), len(tokens)) - 1
    greedy = (log_p[places].argmax(-1) == continuation).all()
    return log_p[places, continuation].sum(), greedy


def random_pairs(rng):
    """Texts of many lengths; some share their context, some begin another, some are greedy."""
    pairs = []
    for number in (1, 20, 20, 28):
        context, continuation = (rng.integers(0, 260, n).tolist() for n in (number, 4))
        pairs += [Pair(context, continuation), Pair(context, [7]), Pair(context, [7, 8, 9, 10])]
        best = int(LOGITS(jnp.asarray(context))[-1].argmax())
        pairs.append(Pair(context, [best]))
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("batch_tokens", [70, 1000])
def test_log_likelihoods_are_those_of_each_text_alone(batch_tokens):
    pairs = random_pairs(np.random.default_rng(0))
    done = []
    got = log_likelihoods(
        APPLY,
        PARAMS,
        pairs,
        max_length=128,
        batch_tokens=batch_tokens,
        chunk=16,
        progress=done.append,
    )
    want = [by_hand(*pair) for pair in pairs]
    np.testing.assert_allclose(got.log_likelihood, [w for w, _ in want], rtol=1e-5, atol=1e-4)
    assert got.greedy.tolist() == [g for _, g in want] and 0 < got.greedy.sum() < len(pairs)
    assert sum(done) == len(pairs)


def test_each_distinct_input_is_read_once():
    read = []

    def apply(params, tokens):
        read.append(tokens.shape)
        return APPLY(params, tokens)

    context = list(range(10, 30))
    pairs = [Pair(context, [choice]) for choice in range(40)] + [Pair(context, [7, 8, 9])]
    got = log_likelihoods(apply, PARAMS, pairs, max_length=128, batch_tokens=1024, chunk=16)
    assert read == [(6, 24)]  # one row, an eighth of the 42 that fit
    want = [by_hand(*pair)[0] for pair in pairs]
    np.testing.assert_allclose(got.log_likelihood, want, rtol=1e-5, atol=1e-4)


def test_few_shapes_are_compiled():
    read = set()

    def apply(table, tokens):
        read.add(tokens.shape)
        return Output(table[tokens], table)

    rng = np.random.default_rng(1)
    pairs = [Pair(rng.integers(0, 260, n).tolist(), [5]) for n in range(1, 128) for _ in range(3)]
    log_likelihoods(apply, jnp.ones((260, 4)), pairs, max_length=128, batch_tokens=512)
    assert len(read) <= 9 and max(rows * width for rows, width in read) <= 512


def test_what_is_too_long_loses_its_beginning():
    rng = np.random.default_rng(2)
    context, continuation = (rng.integers(0, 260, n).tolist() for n in (50, 6))
    got = log_likelihoods(APPLY, PARAMS, [Pair(context, continuation)], max_length=20)
    want, _ = by_hand(context[-15:], continuation)  # 20 tokens are read: 15 and 5
    assert got.log_likelihood[0] == pytest.approx(want, rel=1e-5)
    for bad in (Pair(context, []), Pair(context, [5] * 21), Pair([], [5])):
        with pytest.raises(UserError, match="text 0 has .* accepted: a context, and 1 to 20"):
            log_likelihoods(APPLY, PARAMS, [bad], max_length=20)


def test_numbers_that_are_not_finite_are_an_error():
    broken = PARAMS | {"norm": {"weight": PARAMS["norm"]["weight"] * np.float32("nan")}}
    with pytest.raises(UserError, match="log-likelihoods that are not finite"):
        log_likelihoods(APPLY, broken, [Pair([3], [4])], max_length=20)


def test_context_and_continuation_are_parted_as_the_harness_does():
    plain, with_bos = tiny.byte_tokenizer(), tiny.byte_tokenizer(bos=True)
    assert encode_pair(plain, "ab", " cd") == Pair(ids("ab"), ids(" cd"))
    assert encode_pair(with_bos, "ab", " cd") == Pair([BOS, *ids("ab")], ids(" cd"))
    # White space at the end of the context is scored with the continuation.
    assert encode_pair(plain, "ab \n", "cd") == Pair(ids("ab"), ids(" \ncd"))
    # Without a context BOS stands for it, once, and EOS where there is no BOS.
    for tokenizer in (plain, with_bos):
        assert encode_pair(tokenizer, "", "cd") == Pair([BOS], ids("cd"))
        assert encode_pair(tokenizer, " ", "cd") == Pair([BOS], ids(" cd"))
        assert encode_pair(tokenizer, "", "<s>cd") == Pair([BOS], ids("cd"))
        assert encode_pair(tokenizer, "<s>ab", "cd") == Pair([BOS, *ids("ab")], ids("cd"))
    plain.bos_token = None
    assert encode_pair(plain, "", "cd") == Pair([EOS], ids("cd"))
    plain.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        prefix_token(plain)


QUESTIONS = [
    Question(context="the sky is", choices=("blue", "green as grass", "é"), label=0),
    Question(context="", choices=("one whole sentence.", "another."), label=1),
    Question(context="Q: 1 + 1?\nA:", choices=("2", "3", "4", "5"), label=2),
]


def test_questions_are_scored_whole():
    got = score_choices(APPLY, PARAMS, tiny.byte_tokenizer(), QUESTIONS, max_length=128)
    right, right_norm, bits, length = [], [], 0.0, 0
    for question, scores in zip(QUESTIONS, got.log_likelihoods, strict=True):
        context = ids(question.context) or [BOS]
        space = " " if question.context else ""
        want = np.array([by_hand(context, ids(space + c))[0] for c in question.choices])
        np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-4)
        sizes = [len(c.encode()) for c in question.choices]
        right.append(want.argmax() == question.label)
        right_norm.append((want / sizes).argmax() == question.label)
        bits -= want[question.label] / math.log(2)
        length += sizes[question.label]
    assert got.metrics["acc"] == pytest.approx(np.mean(right))
    assert got.metrics["acc_norm"] == pytest.approx(np.mean(right_norm))
    assert got.metrics["bits_per_byte"] == pytest.approx(bits / length, rel=1e-5)
    assert got.metrics["items"] == 3


def test_metrics_by_hand():
    scores = [np.array([-2.0, -3.0, -1.0]), np.array([-9.0, -8.0]), np.array([-4.0, -3, -2, -1])]
    got = choice_metrics(QUESTIONS, scores)
    # Argmax 2, 1, 3: one right. A byte: (-.5, -.21, -.5), (-.47, -1), (-4, ...): 1, 0, 3, none.
    assert got == {
        "acc": pytest.approx(1 / 3),
        "acc_stderr": pytest.approx(math.sqrt(2 / 27)),
        "acc_norm": 0.0,
        "acc_norm_stderr": 0.0,
        "bits_per_byte": pytest.approx((2 + 8 + 2) / math.log(2) / (4 + 8 + 1)),
        "items": 3,
    }
    # "é" has two bytes: by characters -1.9 would lose against -1.0 / 1, by bytes it wins.
    pair = [Question(context="a", choices=("é", "b"), label=0)]
    assert choice_metrics(pair, [np.array([-1.9, -1.0])])["acc_norm"] == 1.0


def test_a_choice_without_room_is_named():
    long = [Question(context="a", choices=("b", "c" * 40), label=0, where="set.jsonl:7")]
    with pytest.raises(
        UserError, match="^set.jsonl:7 has a choice of 41 tokens; accepted: 1 to 40"
    ):
        score_choices(APPLY, PARAMS, tiny.byte_tokenizer(), long, max_length=40)


GOOD = {"context": "a", "choices": ["b", "c"], "label": 1, "id": 3}


def test_files_are_read_in_order_up_to_the_limit(tmp_path):
    rows = [GOOD | {"context": f"number {i}"} for i in range(5)]
    text = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        got = load_choices(tmp_path / name)
        assert [q.context for q in got] == [row["context"] for row in rows]
        assert got[4].choices == ("b", "c") and got[4].label == 1
        assert got[4].where == f"{tmp_path / name}:9"
        assert load_choices(str(tmp_path / name), limit=2) == got[:2]
    assert choices_name(tmp_path / "packed.jsonl.gz") == "packed"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "is not JSON"),
        ([1], "is list, no object"),
        ({"context": "a"}, "lacks choices and label"),
        (GOOD | {"context": 3}, "has the context 3, no text"),
        (GOOD | {"choices": []}, "has 0 choices"),
        (GOOD | {"choices": ["b"]}, "has 1 choices"),
        (GOOD | {"choices": ["b", ""]}, "has the choices"),
        (GOOD | {"choices": "bc"}, "has the choices"),
        (GOOD | {"choices": ["b", "\ud800"]}, "is not JSON (it holds half a character)"),
        (GOOD | {"label": 2}, "has the label 2 for 2 choices"),
        (GOOD | {"label": -1}, "has the label -1 for 2 choices"),
        (GOOD | {"label": "1"}, "has the label '1' for 2 choices"),
        (GOOD | {"label": True}, "has the label True for 2 choices"),
    ],
)
def test_bad_rows_are_named(row, problem, tmp_path):
    path = tmp_path / "set.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError) as e:
        load_choices(path)
    said = str(e.value)
    assert said.startswith(f"{path}:2 {problem}") and "accepted: one object a line" in said
    assert "\n" not in said
    assert len(load_choices(path, limit=1)) == 1


def test_bad_files_are_named(tmp_path):
    def said(path):
        with pytest.raises(UserError) as e:
            load_choices(path)
        return str(e.value)

    assert f"{str(tmp_path / 'none.jsonl')!r} does not exist" in said(tmp_path / "none.jsonl")
    assert "is no file; accepted: a file ending in .jsonl or .jsonl.gz" in said(tmp_path)
    (tmp_path / "set.csv").write_text("a,b")
    assert "has the ending '.csv'" in said(tmp_path / "set.csv")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no question" in said(tmp_path / "empty.jsonl")
    (tmp_path / "set.jsonl.gz").write_text("not gzip")
    assert "cannot be read" in said(tmp_path / "set.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe9"}')
    assert "cannot be read" in said(tmp_path / "latin.jsonl")
