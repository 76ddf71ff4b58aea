"""How fast this machine multiplies large matrices: what a step's rate is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZE = 2048


def jax(dtype: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Multiply by XLA, with float32 sums."""
    import jax as framework
    import jax.numpy as jnp

    a = framework.random.normal(framework.random.key(0), (SIZE, SIZE)).astype(dtype)
    multiply = framework.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))

    def go() -> None:
        framework.block_until_ready(multiply(a, a))

    kind = f"{len(framework.devices())} x {framework.devices()[0].device_kind}"
    return go, {"flops": 2.0 * SIZE**3, "device": kind}


def torch(dtype: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Multiply by PyTorch."""
    import torch as framework

    device = "cuda" if framework.cuda.is_available() else "cpu"
    a = framework.randn(SIZE, SIZE, device=device).to(getattr(framework, dtype))

    def go() -> None:
        a @ a
        if device == "cuda":
            framework.cuda.synchronize()

    return go, {"flops": 2.0 * SIZE**3}
