"""Answer a prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxdistill.models import generate as decoding
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params, make_apply, unstack
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.token_ids import prompt_ids
from jaxdistill.quant.policy import (
    ActivationRules,
    dequantize_params,
    fake_quant_activations,
    hold_params,
)
from jaxdistill.recipes.parallel import Parallel, parallel

Weights = Literal["packed", "int8", "bfloat16", "float"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Parallel):
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
    weights: Weights = "packed"
    """How the weights are held: those of a quantized model packed (half a byte each, unpacked as
    they are read) or int8; any model's as float, or as bfloat16, which rounds them."""


def _apply_of(
    config: ModelConfig, activations: ActivationRules, weights: Weights
) -> Callable[..., Any]:
    return make_apply(
        config, activation=fake_quant_activations(activations), dtype=_computed(weights)
    )


def _computed(weights: Weights) -> Any:
    return jnp.bfloat16 if weights == "bfloat16" else jnp.float32


@functools.partial(jax.jit, static_argnums=1)
def held(params: Params, weights: Weights) -> Params:
    """Return the params in the form that they are held in while text is generated."""
    match weights:
        case "packed" | "int8":
            params = hold_params(params, packed=weights == "packed")
        case "float":
            params = dequantize_params(params)
        case "bfloat16":
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dequantize_params(params))
    return unstack(params)


def answer(
    model: Model,
    prompt: str,
    how: decoding.Sampling,
    *,
    raw: bool = False,
    seed: int = 0,
    weights: Weights = "packed",
) -> str:
    """Return the model's answer to one prompt."""
    ids = prompt_ids(model.text_tokenizer(), prompt, chat=not raw)
    (text,) = continuations(model, [ids], how, seed=seed, weights=weights)
    return text


def continuations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    how: decoding.Sampling,
    *,
    seed: int = 0,
    weights: Weights = "packed",
) -> list[str]:
    """Return what the model goes on with after each of several prompts of tokens."""
    new = decoding.generate(
        _apply_of(model.config, model.activations, weights),
        held(model.params, weights),
        model.config,
        prompts,
        how=how,
        stop=model.stop_ids,
        seed=seed,
        dtype=_computed(weights),
    )
    decode = model.text_tokenizer().decode
    return [str(decode(ids, skip_special_tokens=True)) for ids in new]


@parallel
def generate(o: Generate, console: Console | None = None) -> str:
    """Return the answer to the options' prompt."""
    how = decoding.Sampling(
        max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p
    )
    return answer(load_model(o.model), o.prompt, how, raw=o.raw, seed=o.seed, weights=o.weights)
