"""Tokenizers of HF directories, and what a tokenizer is made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.gguf_layout import one_line
from jaxdistill.models.json_text import read_object

Tokenizer = PreTrainedTokenizerFast

_MAX_ID = 2**24
_ELSEWHERE = (
    "fast_tokenizer_files",
    "from_slow",
    "gguf_file",
    "init_inputs",
    "merges",
    "tokenizer_object",
    "vocab",
)
_CLASS = re.compile(r"\w*(Tokenizer|TokenizerFast|TokenizersBackend)", re.ASCII)
_TEMPLATE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # it becomes the name of a file
_MOST_TEMPLATES, _LONGEST_TEMPLATE = 100, 2**20  # characters; the longest published have 20,000


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer of an HF directory (``tokenizer.json`` and its side files).

    It is what ``AutoTokenizer`` loads: the class that ``tokenizer_config.json`` or ``config.json``
    names may cut text in another way than ``tokenizer.json`` does.

    Raises:
        UserError: if the directory or its ``tokenizer.json`` is missing or cannot be read, a side
            file names other files to read, or the class is not in transformers or is a slow one.
    """
    root = Path(directory)
    if not (root / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer.json in {str(root)!r}; give an HF model directory, or write the file "
            "with the tokenizer's save_pretrained"
        )
    _check_files(root)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(root), local_files_only=True, trust_remote_code=False
        )
    except BaseException as e:  # tokenizers raises bare Exception, and panics are none even
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"cannot read the tokenizer in {str(root)!r}: {one_line(e)}") from e
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(
            f"the tokenizer in {str(root)!r} is a {type(tokenizer).__name__}, which transformers "
            "runs in Python; accepted: a fast tokenizer"
        )
    check_templates(tokenizer, str(root))
    return tokenizer


def check_templates(tokenizer: Tokenizer, source: str) -> None:
    """Raise ``UserError`` unless each chat template is a text that can be saved under its name."""
    given: Any = tokenizer.chat_template
    templates = given if isinstance(given, dict) else {"default": given} if given else {}
    for name, template in list(templates.items())[: _MOST_TEMPLATES + 1]:
        if not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
            raise UserError(
                f"{source} has a chat template named {str(name)[:100]!r}; accepted: letters, "
                "digits, _, - and . in a name"
            )
        if not isinstance(template, str) or len(template) > _LONGEST_TEMPLATE:
            what = f"{len(template)} characters" if isinstance(template, str) else "no text"
            raise UserError(
                f"the chat template {name!r} of {source} is {what}; accepted: up to "
                f"{_LONGEST_TEMPLATE} characters"
            )
    if len(templates) > _MOST_TEMPLATES:
        raise UserError(
            f"{source} has {len(templates)} chat templates; accepted: up to {_MOST_TEMPLATES}"
        )


def _check_files(root: Path) -> None:
    """Raise ``UserError`` where a file is no JSON object, has wild ids, or names files elsewhere.

    ``tokenizers`` makes a table as long as the largest id, and ends the process where it cannot.
    ``transformers`` hands what stands in the side files to the tokenizer as arguments, which may be
    the paths of files to open.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
    for path in (root / name for name in names):
        if not path.is_file():
            continue
        try:
            said = read_object(path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"cannot read the tokenizer in {str(root)!r}: {path.name} is no JSON object ({e}); "
                "fetch it again"
            ) from None
        if path.name == "tokenizer.json":
            if not all(type(i) is int and 0 <= i < _MAX_ID for i in _ids(said)):
                raise UserError(
                    f"{path} has an id that is no whole number from 0 to {_MAX_ID}; fetch it again"
                )
            continue
        name = said.get("tokenizer_class")
        if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
            raise UserError(
                f"{path} has the tokenizer_class {name!r}; accepted: a tokenizer of transformers"
            )
        if path.name == "config.json":
            continue
        if path.name == "tokenizer_config.json":
            strange = [key for key in _ELSEWHERE if said.get(key)]
        else:
            strange = [key for key in said if not key.endswith(("_token", "_tokens"))]
        if strange:
            raise UserError(
                f"{path} has {strange[0]!r}, which makes other files be read; accepted: the "
                "tokenizer of that directory; remove the key"
            )


def _ids(node: Any, key: str = "") -> Iterator[Any]:
    """Yield every id in a ``tokenizer.json``; what has another form is left to its reader."""
    if key in ("vocab", "ids", "id") and not isinstance(node, str | list | dict):
        yield node
    elif isinstance(node, dict):
        for name, child in node.items():
            if key == "vocab" or name not in ("merges", "normalizer", "pre_tokenizer", "decoder"):
                yield from _ids(child, key if key == "vocab" else name)
    elif isinstance(node, list) and (key == "ids" or any(isinstance(n, dict) for n in node)):
        for child in node:
            yield from _ids(child, key if key == "ids" else "")


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer as the parsed contents of its ``tokenizer.json``."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def merge_pairs(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a parsed ``tokenizer.json``, first applied first, in either spelling."""
    return pairs_of(spec["model"].get("merges") or [])


def pairs_of(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Return merges as pairs, whether they are spelt ``"a b"`` or ``["a", "b"]``."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
    return [(left, right) for left, right in pairs]


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a short hash that is equal for tokenizers whose ids mean the same text.

    Sha256 of the vocabulary, the merges in order, and which tokens are special; 16 hex digits.
    """
    spec = tokenizer_spec(tokenizer)
    special = sorted(t["id"] for t in spec["added_tokens"] if t["special"])
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps([vocab, merge_pairs(spec), special], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
