"""A model directory as a whole: what may lie in it, and how a new one takes its place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill._checksums import MANIFEST, seal
from jaxdistill.errors import UserError
from jaxdistill.models.safetensors import write_safetensors
from jaxdistill.models.tokenizer import Tokenizer

WEIGHTS, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
GENERATION = "generation_config.json"
# What users adapt by hand: a change is noted, and no damage.
EDITABLE = (GENERATION, "tokenizer_config.json", "chat_template.jinja", CARD)
# A README.md with this line is a model card of ours, and is replaced with its directory.
CARD_MARK = "<!-- Written by jaxdistill; the next export to this directory replaces it. -->"
# What a model directory may hold beside config.json; anything else is a user's own file.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    GENERATION,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    MANIFEST,
)
_TEMPLATES = "additional_chat_templates"  # transformers' folder for all but the default one
Tensor = tuple[str, np.dtype, tuple[int, ...]]


def is_model_directory(path: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds an HF model and nothing else."""
    return (Path(path) / "config.json").is_file() and not _foreign(Path(path))


def write_model_directory(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    write_weights: Callable[[Path], None],
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
) -> None:
    """Write config.json, weights, tokenizer files, model card and checksums; all or nothing.

    Everything goes to a temporary sibling, which then takes the directory's name.

    Args:
        directory: where to write; absent, empty, or a former model directory, which is replaced.
        config: what config.json holds.
        write_weights: called with the temporary directory.
        tokenizer: its files, chat template included, are written beside the weights.
        card: the text of README.md.

    Raises:
        UserError: ``directory`` holds something else, or cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    check_target(target)
    generation = {
        "_from_model_config": True,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".jaxdistill.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        write_weights(temporary)
        _write_json(temporary / "config.json", config)
        _write_json(
            temporary / GENERATION,
            {k: v for k, v in generation.items() if v is not None},
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")
        seal(temporary)
        replace_directory(target, temporary)
    except OSError as e:
        raise UserError(
            f"cannot write {target}: {e.strerror or e}; give a directory that can be written"
        ) from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_weights(
    directory: Path,
    tensors: Sequence[Tensor],
    get: Callable[[str], np.ndarray],
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Write tensors to one safetensors file, or to shards and their index.

    Args:
        directory: where to write.
        tensors: name, type and shape of every tensor, in file order.
        get: called once with each name; returns the array, which is cast to the named type.
        max_shard_bytes: start another file beyond this many bytes.

    Raises:
        UserError: a value does not fit the float16 that is asked for.
    """
    types = {name: dtype for name, dtype, _ in tensors}

    def checked(name: str) -> np.ndarray:
        array = get(name)
        narrowed = types[name] == np.float16 and array.dtype != np.float16
        if narrowed and (peak := float(np.abs(array).max(initial=0))) > 65504:
            raise UserError(
                f"{name} reaches {peak:.4g}, beyond float16's 65504; save as bfloat16 or float32"
            )
        return array

    shards = list(_shards(tensors, max_shard_bytes))
    total, weight_map = 0, {}
    for i, run in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        total += write_safetensors(directory / file, run, checked)
        weight_map |= {name: file for name, _, _ in run}
    if len(shards) > 1:
        _write_json(
            directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _shards(tensors: Sequence[Tensor], limit: int | float) -> Iterator[list[Tensor]]:
    """Cut the tensors, in order, into runs of at most ``limit`` bytes (or of one tensor)."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        n = math.prod(tensor[2]) * tensor[1].itemsize
        if run and size + n > limit:
            yield run
            run, size = [], 0
        run.append(tensor)
        size += n
    yield run


def check_target(target: Path) -> None:
    """Raise ``UserError`` unless the target is absent, an empty directory or a model directory."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a directory to write the model to")
    if target.is_dir() and any(target.iterdir()) and not is_model_directory(target):
        foreign = _foreign(target)
        what = f"holds {some(foreign)}" if foreign else "has no config.json"
        raise UserError(
            f"{target} is not empty and not a model directory (it {what}); give a new directory, "
            "or remove it first"
        )


def replace_directory(target: Path, temporary: Path) -> None:
    """Give a finished directory its name, putting back the old one should that fail."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=".jaxdistill.old.", dir=target.parent))
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def some(names: Sequence[str]) -> str:
    """Name up to three of many."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _foreign(path: Path) -> list[str]:
    """List what a directory holds beyond a model's own files."""
    return sorted(p.name for p in path.iterdir() if not _is_own(p))


def _is_own(path: Path) -> bool:
    if path.name == CARD and path.is_file():
        return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    if path.name == _TEMPLATES and path.is_dir():
        return all(p.suffix == ".jinja" and not p.is_dir() for p in path.iterdir())
    return not path.is_dir() and any(map(path.match, _MODEL_FILES))


def _write_json(path: Path, d: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(d, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
