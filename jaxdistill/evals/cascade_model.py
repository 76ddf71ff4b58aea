"""A cascade that serves: each question goes to the first model that is sure enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.evals.cascade import NEVER, SIGNALS, choice_confidence
from jaxdistill.evals.choices import Question, score_choices
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.json_text import read_object

SETTINGS = "cascade.json"


class Answer(NamedTuple):
    """Hold an answer.

    Attributes:
        choice: the number of the choice; None where a person shall answer.
        tier: who answered: the model's name, or ``person``.
        confidence: of the model that answered; of the last one asked where a person shall.
    """

    choice: int | None
    tier: str
    confidence: float


def choose(
    questions: Sequence[Question], log_likelihoods: Sequence[np.ndarray], *, normalized: bool
) -> list[np.ndarray]:
    """Return the scores that choices are compared by: log-likelihoods, or those a byte.

    Those a byte are multiplied by the question's mean bytes, so that they differ as much as
    log-likelihoods do and tell how sure the model is.
    """
    if not normalized:
        return [np.asarray(scores) for scores in log_likelihoods]
    sizes = [np.array([len(c.encode()) for c in q.choices], float) for q in questions]
    return [s / n * n.mean() for s, n in zip(log_likelihoods, sizes, strict=True)]


class CascadeModel:
    """Answer multiple-choice questions by models in order of cost.

    Example::

        serve = CascadeModel.load("runs/cascade")
        serve("The capital of France is", ["Rome", "Paris"])  # Answer(choice=1, tier="student", ..)

    Args:
        models: by tier, cheapest first.
        thresholds: of every tier but the last: its answer counts where it is at least as sure.
            With as many thresholds as models the last tier is a person.
        signal: how confidence is measured, see ``evals.cascade.choice_confidence``.
        normalized: compare choices by log-likelihood a byte.

    Raises:
        UserError: numbers do not fit, or the signal is not known.
    """

    def __init__(
        self,
        models: dict[str, Model],
        thresholds: Sequence[float],
        *,
        signal: str = "max_probability",
        normalized: bool = False,
    ) -> None:
        if len(models) - len(thresholds) not in (0, 1) or signal not in SIGNALS:
            raise UserError(
                f"{len(models)} models, {len(thresholds)} thresholds and signal {signal!r} given; "
                "accepted: a threshold for each model but the last, or for each where a person is "
                f"behind them, and {', '.join(SIGNALS)}"
            )
        self._thresholds, self._signal, self._normalized = tuple(thresholds), signal, normalized
        # One function a model, so that it is compiled once.
        self._models = {name: (model, model.apply_fn()) for name, model in models.items()}

    @classmethod
    def load(cls, directory: str | Path) -> CascadeModel:
        """Return what ``jaxdistill cascade --out`` wrote, its models loaded from where they were.

        Raises:
            UserError: there is none, it found no thresholds, or a model cannot be read.
        """
        path = Path(directory) / SETTINGS
        try:
            found = read_object(path)
            named = {"student": found["student"], "teacher": found["teacher"]}
            signal, normalized = str(found["signal"]), bool(found["normalized"])
            target, sure = found["target_accuracy"], found["confidence"]
            drop = found.get("max_drop")
            known = found["thresholds"]
            if known is not None:
                known = [NEVER if t is None else float(t) for t in known]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} is no cascade ({type(e).__name__}: {e}); make one by `jaxdistill cascade "
                "--out`"
            ) from None
        if known is None:
            raise UserError(
                f"{path} holds no thresholds, for none kept "
                + (f"{target}" if drop is None else f"a drop of at most {drop}")
                + f" with confidence {sure}; make one for less, or of more questions"
            )
        models = {name: load_model(source) for name, source in named.items()}
        return cls(models, known, signal=signal, normalized=normalized)

    def __call__(self, context: str, choices: Sequence[str]) -> Answer:
        """Answer one question."""
        return self.answer([(context, choices)])[0]

    def answer(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[Answer]:
        """Answer (context, choices) pairs; each model sees those that came to it, together.

        Raises:
            UserError: a question has fewer than two choices, or an empty one.
        """
        if bad := [q for q in questions if len(q[1]) < 2 or not all(q[1])]:
            raise UserError(
                f"the choices {list(bad[0][1])} given; accepted: two texts or more, none empty"
            )
        asked = [Question(context=c, choices=tuple(given), label=0) for c, given in questions]
        answers: list[Answer | None] = [None] * len(asked)
        waiting = np.arange(len(asked))
        sure = np.zeros(len(asked))
        for tier, (name, (model, apply)) in enumerate(self._models.items()):
            if not waiting.size:
                break
            some = [asked[i] for i in waiting]
            found = score_choices(
                apply,
                model.params,
                model.text_tokenizer(),
                some,
                max_length=model.config.max_position_embeddings,
            )
            scores = choose(some, found.log_likelihoods, normalized=self._normalized)
            sure[waiting] = choice_confidence(scores)[self._signal]
            last = tier == len(self._thresholds)
            passed = sure[waiting] >= (0.0 if last else self._thresholds[tier])
            for place, i in enumerate(waiting):
                if passed[place]:
                    answers[i] = Answer(int(np.argmax(scores[place])), name, float(sure[i]))
            waiting = waiting[~passed]
        return [a or Answer(None, "person", float(c)) for a, c in zip(answers, sure, strict=True)]
