"""A model for the lm-evaluation-harness: its tasks, this library's log-likelihoods.

    import lm_eval
    from jaxdistill.evals.lm_eval import harness_model

    lm = harness_model(load_model("runs/demo"))
    lm_eval.simple_evaluate(lm, tasks=["arc_easy", "hellaswag"])

The harness is the extra ``jaxdistill[lm-eval]``; nothing of it is imported before
``harness_model`` is called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax

from jaxdistill.errors import UserError
from jaxdistill.evals.likelihood import (
    Pair,
    encode_pair,
    log_likelihoods,
    prefix_token,
)
from jaxdistill.models.generate import Sampling, generate
from jaxdistill.models.hub import Model
from jaxdistill.models.template_limits import checked_length, template_limits
from jaxdistill.models.token_ids import encode_text
from jaxdistill.models.tokenizer import fingerprint
from jaxdistill.quant.policy import dequantize_params

_NEW_TOKENS = 256  # where a task does not say how many, as in the harness's own models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(
    model: Model, *, batch_tokens: int | None = None, batch_size: int = 16, seed: int = 0
) -> Any:
    """Return an ``lm_eval.api.model.LM`` for ``lm_eval.simple_evaluate(model=...)``.

    Args:
        model: what ``load_model`` returns; it needs a tokenizer.
        batch_tokens: places of a batch that is scored, see ``log_likelihoods``.
        batch_size: rows of a batch that is generated.
        seed: of sampled generation.

    Raises:
        UserError: the harness is not installed, or the model has no tokenizer.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise UserError(
            f"the lm-evaluation-harness cannot be imported ({error}); install it with "
            "pip install 'jaxdistill[lm-eval]'"
        ) from error
    return type("JaxDistillLM", (_Requests, base), {})(model, batch_tokens, batch_size, seed)


class _Requests:
    """Answer the harness's requests; mixed with its ``LM``, which is known only at run time."""

    cache_hook: Any

    def __init__(self, model: Model, batch_tokens: int | None, batch_size: int, seed: int) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.text_tokenizer()
        self.max_length = model.config.max_position_embeddings
        self.batch_size, self._batch_tokens, self._seed = batch_size, batch_tokens, seed
        self._apply = model.apply_fn()

    @functools.cached_property
    def _float_params(self) -> Any:
        """Return the params dequantized once: each generated token reads all of them."""
        return jax.jit(dequantize_params)(self.model.params)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and if greedy gives it."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        found = self._score(pairs, "log-likelihoods", disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, every token predicted once.

        A text longer than the model is cut into windows; the last is filled up with context.
        """
        first = prefix_token(self.tokenizer)
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = encode_text(self.tokenizer, request.args[0])
            for pair in rolling_windows(tokens, first, self.max_length):
                pairs.append(pair)
                owners.append(number)
        sums = [0.0] * len(requests)
        found = self._score(pairs, "rolling log-likelihoods", disable_tqdm)
        for owner, (score, _) in zip(owners, found, strict=True):
            sums[owner] += score
        for request, score in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its stop strings, or its number of tokens."""
        answers = [""] * len(requests)
        groups: dict[Sampling, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            how = _sampling(options)
            room = self.max_length - how.max_new_tokens
            if room < 1:
                raise UserError(
                    f"{how.max_new_tokens} new tokens asked for; accepted: fewer than the "
                    f"{self.max_length} positions of {self.model.source}; lower max_gen_toks"
                )
            tokens = encode_text(self.tokenizer, context) or [prefix_token(self.tokenizer)]
            groups.setdefault(how, []).append((number, tokens[-room:]))
        with _bar(len(requests), "generation", disable_tqdm) as bar:
            for how, group in groups.items():
                group.sort(key=lambda item: -len(item[1]))
                for start in range(0, len(group), self.batch_size):
                    part = group[start : start + self.batch_size]
                    texts = self._generate([tokens for _, tokens in part], how, start)
                    for (number, _), text in zip(part, texts, strict=True):
                        until = requests[number].args[1].get("until") or []
                        answers[number] = _cut(text, [until] if isinstance(until, str) else until)
                    bar.update(len(part))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer, for the harness's caches of requests."""
        return f"jaxdistill-{fingerprint(self.tokenizer)}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template, or the one of that name."""
        if not chat_template:
            return None
        name = None if chat_template is True else str(chat_template)
        return cast(str, self.tokenizer.get_chat_template(name))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the model was taught to read it."""
        with template_limits():
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        return checked_length(str(text))

    def _score(
        self, pairs: Sequence[Pair], name: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        with _bar(len(pairs), name, disable_tqdm) as bar:
            found = log_likelihoods(
                self._apply,
                self.model.params,
                pairs,
                max_length=self.max_length,
                batch_tokens=self._batch_tokens,
                progress=bar.update,
            )
        return list(zip(found.log_likelihood.tolist(), found.greedy.tolist(), strict=True))

    def _generate(self, prompts: list[list[int]], how: Sampling, number: int) -> list[str]:
        made = generate(
            self._apply,
            self._float_params,
            self.model.config,
            prompts,
            how=how,
            stop=self.model.stop_ids,
            seed=self._seed + number,
        )
        return [str(self.tokenizer.decode(new, skip_special_tokens=True)) for new in made]


def rolling_windows(tokens: Sequence[int], first: int, max_length: int) -> Iterator[Pair]:
    """Cut a text into windows that predict each token once, ``first`` standing before the text.

    Every window but the first has at least one token of context; the last reaches back as far as
    the model can read.
    """
    whole = [first, *tokens]
    for done in range(0, len(tokens), max_length):
        end = min(done + max_length, len(tokens))
        start = max(0, end - max_length)  # in ``whole``; the window reads whole[start:end]
        yield Pair(whole[start : done + 1], whole[done + 1 : end + 1])


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Read a task's generation options; without ``do_sample`` the temperature decides."""
    lengths = (options[name] for name in _LENGTHS if options.get(name) is not None)
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    return Sampling(
        max_new_tokens=int(next(lengths, _NEW_TOKENS)),
        temperature=temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
    )


def _cut(text: str, until: Iterable[str]) -> str:
    """Return what stands before the first of the stop strings."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def _bar(total: int, name: str, disabled: bool) -> Any:
    """Return the kind of progress bar that the harness shows, on stderr."""
    return importlib.import_module("tqdm").tqdm(total=total, desc=name, disable=disabled)
