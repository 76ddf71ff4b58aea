"""The command line that gives a job its options: what a run's page says of how to do it again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command_of(kind: type, options: Mapping[str, Any]) -> list[str]:
    """Return the words of the command; options that have their default are left out.

    Args:
        kind: the job's dataclass of options, ``Quantize``; its name is the verb.
        options: by field, as the dataclass or its JSON holds them; some may be missing.
    """
    words = ["jaxdistill", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()]
    for field in dataclasses.fields(kind):
        value = _plain(options.get(field.name, field.default))
        default = field.default
        if value == _plain(default) or (value == [] and default is dataclasses.MISSING):
            continue
        flag = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is False:
            words.append("--no-" + flag[2:])
        else:
            words += [flag, *(map(str, value) if isinstance(value, list) else (str(value),))]
    return words


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return list(value)
    return str(value) if isinstance(value, Path) else value
