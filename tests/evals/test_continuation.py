"""Questions made of text: the right choice follows its context, the wrong ones do not."""

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.continuation import continuation_questions


def words(start: int, count: int, sep: str = " ") -> str:
    return sep.join(f"w{i}" for i in range(start, start + count))


def test_the_right_choice_is_what_follows():
    text = words(0, 100, sep="\n")
    questions = continuation_questions([text], 9, context_words=6, choice_words=4)
    assert len(questions) == 9 and len({q.context for q in questions}) == 9
    for q in questions:
        assert len(q.context.split()) == 6
        assert f"{q.context}\n{q.choices[q.label]}" in text  # as it stands there, breaks and all
        assert len(set(q.choices)) == 4
        wrong = [c for i, c in enumerate(q.choices) if i != q.label]
        assert all(c in text and f"{q.context}\n{c}" not in text for c in wrong)
    assert len({q.label for q in questions}) > 1


def test_wrong_choices_come_from_the_same_text_where_it_has_enough():
    own, other = words(0, 50), words(1000, 50)
    questions = continuation_questions([own, other], 100, context_words=6, choice_words=4)
    assert len(questions) == 10
    assert questions == continuation_questions([own, other], 0, context_words=6, choice_words=4)
    for q in questions:
        numbers = [int(word[1:]) for choice in q.choices for word in choice.split()]
        assert all((n >= 1000) == (q.fields["text"] == 1) for n in numbers)
    short = continuation_questions([words(0, 10), other], 100, context_words=6, choice_words=4)
    alone = next(q for q in short if q.fields["text"] == 0)
    assert sum("w1" in c and len(c.split()[0]) == 5 for c in alone.choices) == 3  # w10xx: the other


def test_a_seed_is_one_draw():
    text = [words(0, 400)]
    first, again, other = (continuation_questions(text, 5, seed=s) for s in (0, 0, 1))
    assert first == again and first != other


def test_equal_passages_are_no_choices():
    with pytest.raises(UserError, match="10 passages of 10 words in 1 texts; accepted: 4 or more"):
        continuation_questions(["a b c d e f g h i j " * 10], 5, context_words=6, choice_words=4)
