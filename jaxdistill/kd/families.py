"""All objectives there are: the registry, once every module that may enter one was imported."""

from __future__ import annotations

import importlib
import pkgutil

import jaxdistill.kd
import jaxdistill.losses
from jaxdistill.losses.registry import REGISTRY, Entry


def registered() -> dict[str, Entry]:
    """Return every registered objective by name, in the registry's order."""
    for package in (jaxdistill.losses, jaxdistill.kd):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return dict(REGISTRY)
