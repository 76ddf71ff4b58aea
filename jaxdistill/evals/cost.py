"""What training and answering cost: operations, bytes, device time, energy and price."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxdistill.errors import UserError
from jaxdistill.evals.devices import Device
from jaxdistill.models.attention import QUERIES
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Remat
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.quant.lattice import QuantSpec


class Use(NamedTuple):
    """Hold what something takes of a device.

    Attributes:
        flops: operations.
        bytes: read from the device's memory; 0 where operations alone were counted.
        seconds: of one device.
        joules: at its greatest power, None where that is not known.
        price: None where an hour's price is not known.
    """

    flops: float
    bytes: float
    seconds: float
    joules: float | None
    price: float | None

    def times(self, n: float) -> Use:
        """Return n of it."""
        return Use(*(None if x is None else n * x for x in self))  # pyright: ignore


def used(flops: float, read: float, target: Device, *, mfu: float, mbu: float) -> Use:
    """Return what so many operations and bytes take: the time of the slower of the two.

    ``seconds = max(flops / (peak * mfu), bytes / (bandwidth * mbu))``, the roofline (Williams et
    al. 2009) lowered to what is reached of it; ``joules = seconds * watts``; ``price = seconds *
    price an hour / 3600``.

    Args:
        flops: operations.
        read: bytes.
        target: the device.
        mfu: share of the peak that is reached (PaLM, arXiv 2204.02311, reports 0.46 in training).
        mbu: share of the memory's bandwidth that is reached.

    Raises:
        UserError: a share is not above 0 and at most 1.
    """
    if not (0 < mfu <= 1 and 0 < mbu <= 1):
        raise UserError(f"mfu {mfu} and mbu {mbu} given; accepted: above 0, at most 1")
    seconds = max(flops / (target.peak_flops * mfu), read / (target.bandwidth * mbu))
    joules = None if target.watts is None else seconds * target.watts
    price = None if target.price is None else seconds * target.price / 3600
    return Use(flops, read, seconds, joules, price)


def total(parts: Sequence[Use]) -> Use:
    """Return the sum of several uses."""
    columns = zip(*parts, strict=True)
    return Use(*(None if None in c else sum(c) for c in columns))  # pyright: ignore


def serving(
    config: ModelConfig,
    target: Device,
    *,
    weights: float,
    prompt: int,
    new: int,
    batch: int = 1,
    mfu: float = 0.4,
    mbu: float = 0.6,
) -> Use:
    """Return what one request takes of a device that answers ``batch`` of them at once.

    The prompt is read in one pass, ``prompt * forward_flops`` and the weights' bytes, which gives
    the first new token; each one after it reads the weights and the request's own keys and values
    again. Requests that are answered together share the reading of weights (Pope et al., arXiv
    2211.05102).

    Args:
        config: the model's shape.
        target: the device.
        weights: bytes, see ``stored_bytes``.
        prompt: tokens of the prompt.
        new: tokens of the answer.
        batch: requests at once.
        mfu: see ``used``.
        mbu: see ``used``.

    Raises:
        UserError: a number is impossible.
    """
    if prompt < 1 or new < 0 or batch < 1:
        raise UserError(
            f"prompt of {prompt}, answer of {new} tokens, {batch} at once given; accepted: at "
            "least 1, 0 and 1"
        )
    shared, reached = weights / batch, {"mfu": mfu, "mbu": mbu}
    first = used(prompt * forward_flops(config, prompt), shared, target, **reached)
    seen = prompt + new / 2  # tokens that a new one attends to, on average
    width = config.num_heads * config.head_dim
    attended = min(seen, config.sliding_window or seen)
    one = 2.0 * matrix_params(config) + 4.0 * config.num_layers * width * attended
    read = shared + attended * cache_bytes(config)
    later = max(0, new - 1)
    return total([first, used(later * one, later * read, target, **reached)])


def training(
    student: ModelConfig,
    target: Device,
    *,
    tokens: float,
    seq_len: int,
    teacher: ModelConfig | None = None,
    frozen: str | None = None,
    mfu: float = 0.4,
) -> Use:
    """Return what distilling a student on so many tokens takes, by ``training_flops``."""
    flops = tokens * training_flops(student, seq_len, teacher=teacher, frozen=frozen)["model"]
    return used(flops, 0.0, target, mfu=mfu, mbu=1.0)


def cascade_use(tiers: Sequence[Use], shares: Sequence[float]) -> Use:
    """Return what a request takes on average of a cascade.

    Args:
        tiers: what a request takes of each tier, cheapest first.
        shares: of the requests that each tier answers; a request takes of every tier up to the one
            that answers it.

    Raises:
        UserError: the shares are not one a tier, or do not add up to 1.
    """
    if len(shares) != len(tiers) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise UserError(f"shares {tuple(shares)} given for {len(tiers)} tiers; accepted: 1 in all")
    reached = [sum(shares[i:]) for i in range(len(tiers))]
    return total([use.times(n) for use, n in zip(tiers, reached, strict=True)])


def matrix_params(config: ModelConfig, pattern: str = "") -> int:
    """Count the weights of the linear layers whose path a regex is found in; by default of all.

    The vocabulary head counts, tied or not; the table that is looked up in does not.
    """
    head = config.vocab_size * config.hidden_size
    total = head if re.search(pattern, "lm_head/kernel") else 0
    for t in hf_layout(config):
        path = "/".join(t.path)
        if t.layer is not None and t.path[-1] == "kernel" and re.search(pattern, path):
            total += t.shape[0] * t.shape[1]
    return total


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Return the forward pass's FLOPs a token: ``2 N + 4 L T H / 2``.

    N are the weights of the linear layers, H the width of all query heads; a token attends to half
    of its T on average (PaLM, arXiv 2204.02311, appendix B, there without the half).
    """
    window = min(seq_len, config.sliding_window or seq_len)
    attended = window if window < seq_len else seq_len / 2
    width = config.num_heads * config.head_dim
    return 2.0 * matrix_params(config) + 4.0 * config.num_layers * width * attended


def training_flops(
    student: ModelConfig,
    seq_len: int,
    *,
    teacher: ModelConfig | None = None,
    frozen: str | None = None,
    remat: Remat = "none",
) -> dict[str, float]:
    """Return FLOPs a token of a distillation step.

    Args:
        student: its shape.
        seq_len: T.
        teacher: a live teacher's shape, which runs forward alone.
        frozen: regex over paths whose weight gradients are not computed (ov-freeze); an empty one
            is found in all, None in none.
        remat: of the student, see ``make_apply``.

    Returns:
        ``model``: student forward and backward (twice the forward, less what is frozen) and teacher
        forward, what a model FLOPs utilisation counts; ``hardware``: and what remat adds.
    """
    own = forward_flops(student, seq_len)
    saved = 0.0 if frozen is None else 2.0 * matrix_params(student, frozen)
    model = 3 * own - saved + (forward_flops(teacher, seq_len) if teacher else 0.0)
    linear = 2.0 * matrix_params(student)
    head = 2.0 * student.vocab_size * student.hidden_size
    scores = (own - linear) / 2  # half of attention's products; in blocks they are made again
    in_blocks = scores if seq_len > QUERIES else 0.0
    last = 2.0 * student.num_layers * student.intermediate_size * student.hidden_size
    # Of a layer made again from its input the last product is not needed.
    again = {"none": in_blocks, "minimal": scores, "full": own - head - last + in_blocks}[remat]
    return {"model": model, "hardware": model + again}


def stored_bytes(config: ModelConfig, bits: int, group_size: int | None = None) -> float:
    """Return the bytes of a model's weights as they are read while it answers.

    Kernels have so many bits and, below 16, a 16-bit scale a group of inputs (or a channel); the
    vocabulary head has 8 bits then, else as many. Norms are left out.
    """
    head = config.vocab_size * config.hidden_size
    kernels = matrix_params(config) - head
    if bits >= 16:
        return (kernels + head) * bits / 8
    scale = 16 / (group_size or config.hidden_size)
    return kernels * (bits + scale) / 8 + head


def stored_bytes_by(config: ModelConfig, specs: Mapping[str, QuantSpec]) -> float:
    """Return the same for weights whose widths are known by path, as those of a run.

    What has no spec counts 16 bits; zero points count as integers.
    """
    total = 0.0
    for t in hf_layout(config):
        head = t.path[0] == "lm_head" or (config.tie_embeddings and t.path[0] == "embed_tokens")
        if not head and t.path[-1] != "kernel":
            continue
        size, spec = t.shape[0] * t.shape[1], specs.get("/".join(t.path))
        if spec is None:
            total += 2.0 * size
            continue
        grids = size / (spec.group_size or t.shape[1])
        total += (size * spec.bits + grids * (16 + (0 if spec.symmetric else spec.bits))) / 8
    return total


def table_bytes(config: ModelConfig, bits: int = 16) -> float:
    """Return the bytes of the table that tokens are looked up in, where it is not the head's.

    It is held in memory, and hardly read.
    """
    return 0.0 if config.tie_embeddings else config.vocab_size * config.hidden_size * bits / 8


def count_params(config: ModelConfig) -> int:
    """Count all parameters: linear layers, tables, norms and biases."""
    return sum(math.prod(t.shape) for t in hf_layout(config))


def cache_bytes(config: ModelConfig, bits: int = 16) -> float:
    """Return the bytes of one token's keys and values in all layers."""
    return 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * bits / 8
