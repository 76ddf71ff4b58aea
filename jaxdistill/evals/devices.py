"""Accelerators by name, from a data file that users can add to."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json

_FORM = (
    '{"NAME": {"name": text, "tflops": number, "gib": number, "gb_per_s": number, "link_gb_per_s": '
    'number or null, "watts": number or null, "price": number or null}}'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Describe one accelerator.

    Attributes:
        name: in words.
        peak_flops: dense bfloat16 peak, FLOP/s.
        memory: in bytes.
        bandwidth: of its memory, bytes/s.
        link: bandwidth to other devices, bytes/s one way; None where nobody gave it.
        watts: greatest power; None where its maker says none.
        price: of an hour, in any currency; None where nobody gave it.
    """

    name: str
    peak_flops: float
    memory: int
    bandwidth: float
    link: float | None = None
    watts: float | None = None
    price: float | None = None


def devices(file: Path | None = None) -> dict[str, Device]:
    """Return the known accelerators by their short names; ``devices.json`` names the sources.

    Args:
        file: more of them, or others in their place, of the same form.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    own = importlib.resources.files("jaxdistill.evals") / "devices.json"
    found = {k: _device(v) for k, v in json.loads(own.read_text()).items() if k != "_"}
    if file is None:
        return found
    try:
        given: Any = parse_json(file.read_bytes())
        return found | {k: _device(v) for k, v in given.items() if k != "_"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(
            f"devices {file} cannot be read ({type(e).__name__}: {e}); accepted: {_FORM}"
        ) from None


def _device(d: dict[str, Any]) -> Device:
    made = Device(
        name=str(d["name"]),
        peak_flops=float(d["tflops"]) * 1e12,
        memory=int(d["gib"] * 2**30),
        bandwidth=float(d["gb_per_s"]) * 1e9,
        link=None if d.get("link_gb_per_s") is None else float(d["link_gb_per_s"]) * 1e9,
        watts=None if d.get("watts") is None else float(d["watts"]),
        price=None if d.get("price") is None else float(d["price"]),
    )
    if not min(made.peak_flops, made.memory, made.bandwidth, made.link or 1.0) > 0:
        raise ValueError(f"{made.name} has a peak, memory, bandwidth or link that is not above 0")
    if not all(x is None or 0 <= x < math.inf for x in (made.watts, made.price)):
        raise ValueError(f"{made.name} has a power or price below 0")
    return made


def device(name: str, file: Path | None = None) -> Device:
    """Return an accelerator; raise ``UserError`` where it is not known."""
    known = devices(file)
    if name not in known:
        raise UserError(f"device {name!r} given; accepted: {', '.join(known)}")
    return known[name]
