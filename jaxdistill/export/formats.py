"""What each export format can hold, told from a model's shape and policy before it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.gguf_tokenizer import ggml_pre
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.models.tokenizer import Tokenizer
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import Policy

Format = Literal["gguf", "compressed-tensors", "mlx", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
_BLOCK = 32  # weights of a GGUF block, and of MLX's smallest group


def format_problem(
    format: Format,
    config: ModelConfig,
    policy: Policy | None,
    tokenizer: Tokenizer | None = None,
    *,
    pack_head: bool = True,
) -> str | None:
    """Tell why a student cannot be exported to a format; None if it can.

    The writers refuse the same models. This needs no weights.

    Args:
        format: one of ``FORMATS``.
        config: the student's shape.
        policy: how it is quantized; None for a float student.
        tokenizer: the student's; only GGUF depends on it.
        pack_head: see ``write_compressed_tensors``.
    """
    weights = list(_quantized(config, policy))
    if format == "hf":
        return None
    if format == "compressed-tensors":
        linear = [p for p, *_ in weights if p.endswith("kernel")]
        packed = [p for p in linear if pack_head or not p.startswith("lm_head")]
        return None if packed else "no linear layer is quantized"
    if format == "mlx" and not weights:
        return "no weight is quantized"
    for path, inputs, spec in weights:
        group = spec.group_size or inputs
        if inputs % _BLOCK or group % _BLOCK:
            return (
                f"{path} has {inputs} inputs in groups of {group}, accepted: multiples of {_BLOCK}"
            )
        if format == "gguf" and not spec.symmetric:
            return f"{path} is asymmetric, accepted: symmetric weights"
    if format == "gguf" and tokenizer is not None:
        try:
            ggml_pre(tokenizer)
        except UserError as e:
            return str(e)
    return None


def check_format(
    format: Format,
    config: ModelConfig,
    policy: Policy | None,
    tokenizer: Tokenizer | None = None,
    *,
    pack_head: bool = True,
) -> None:
    """Check that a student can be exported to a format, see ``format_problem``.

    Raises:
        UserError: it cannot; the formats that can hold it are named.
    """
    problem = format_problem(format, config, policy, tokenizer, pack_head=pack_head)
    if problem is not None:
        others = [f for f in FORMATS if format_problem(f, config, policy, tokenizer) is None]
        raise UserError(
            f"--format {format} cannot hold this model: {problem}; accepted: {', '.join(others)}"
        )


def _quantized(config: ModelConfig, policy: Policy | None) -> Iterator[tuple[str, int, QuantSpec]]:
    """Yield path, inputs and spec of each weight that is quantized, layers taken together."""
    inputs = {"/".join(t.path): t.shape[-1] for t in hf_layout(config) if len(t.shape) == 2}
    for path, width in inputs.items():
        spec = None if policy is None else policy.spec(path)
        if spec is not None:
            yield path, width, spec
