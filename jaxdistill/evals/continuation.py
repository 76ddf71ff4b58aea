"""Multiple choice made of plain text: which of several passages is the one that follows?"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.evals.choices import Question

_WORD = re.compile(r"\S+\s*")


def continuation_questions(
    texts: Sequence[str],
    count: int,
    *,
    context_words: int = 32,
    choice_words: int = 12,
    choices: int = 4,
    seed: int = 0,
) -> list[Question]:
    """Make questions of text that a model was not trained on, as SWAG (arXiv 1808.05326) asks.

    A text is cut into passages of ``context_words + choice_words`` words; the end of each is the
    right choice, the ends of other passages are the wrong ones: of the same text where it has
    enough of them, so that the subject alone does not tell, else of any. No two choices of a
    question are equal. Each question's ``text`` field is the number of its text.

    Args:
        texts: any; those shorter than a passage give none.
        count: questions, drawn from all passages; fewer where there are not as many, 0 for all.
        context_words: words of a context.
        choice_words: words of a choice.
        choices: of a question.
        seed: of the draw and of the choices' order.

    Raises:
        UserError: the texts have too few passages for one question.
    """
    passages: list[tuple[int, str, str]] = []  # text, context, what follows
    for number, text in enumerate(texts):
        starts = [found.start() for found in _WORD.finditer(text)] + [len(text)]
        long = context_words + choice_words
        for first in range(0, len(starts) - long, long):
            a, b, c = (starts[first + n] for n in (0, context_words, long))
            passages.append((number, text[a:b].strip(), text[b:c].strip()))
    if len({end for *_, end in passages}) < choices:
        raise UserError(
            f"{len(passages)} passages of {context_words + choice_words} words in {len(texts)} "
            f"texts; accepted: {choices} or more; give more or longer texts, or questions"
        )
    of_text: dict[int, list[int]] = {}
    for i, (number, *_) in enumerate(passages):
        of_text.setdefault(number, []).append(i)
    random = np.random.default_rng(seed)
    drawn = random.permutation(len(passages))[: count or None]
    questions = []
    for i in sorted(drawn.tolist()):
        number, context, right = passages[i]
        near, wrong = random.permutation(of_text[number]).tolist(), []
        while len(wrong) < choices - 1:  # there are enough that differ
            other = near.pop() if near else int(random.integers(len(passages)))
            if passages[other][2] not in (right, *wrong):
                wrong.append(passages[other][2])
        label = int(random.integers(choices))
        wrong.insert(label, right)
        questions.append(
            Question(context=context, choices=tuple(wrong), label=label, fields={"text": number})
        )
    return questions
