"""Answer a prompt."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax

from jaxdistill.models import generate as decoding
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hub import Model, load_model
from jaxdistill.quant.policy import dequantize_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer a prompt with a model."""

    model: str
    """Model: a run directory, an HF directory, a .gguf file, or a hub name."""
    prompt: str
    """What the user says; put through the chat template, where the tokenizer has one."""
    raw: bool = False
    """Continue the prompt as it is, without the chat template."""
    max_new_tokens: int = 128
    """Tokens generated at most."""
    temperature: float = 0.0
    """0 is greedy; else logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int = 0
    """Of the sampling."""


# One function for models of one shape: generation is then compiled once for all of them.
_apply_of = functools.lru_cache(maxsize=8)(make_apply)


def answer(
    model: Model, prompt: str, how: decoding.Sampling, *, raw: bool = False, seed: int = 0
) -> str:
    """Return the model's answer to one prompt."""
    tokenizer = model.text_tokenizer()
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    params = jax.jit(dequantize_params)(model.params)
    stop = model.config.eos_token_ids or (
        () if tokenizer.eos_token_id is None else (cast(int, tokenizer.eos_token_id),)
    )
    new = decoding.generate(
        _apply_of(model.config), params, model.config, [ids], how=how, stop=stop, seed=seed
    )
    return str(tokenizer.decode(new[0], skip_special_tokens=True))


def generate(o: Generate) -> str:
    """Return the answer to the options' prompt."""
    how = decoding.Sampling(
        max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p
    )
    return answer(load_model(o.model), o.prompt, how, raw=o.raw, seed=o.seed)
