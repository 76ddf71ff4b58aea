"""Tokenizers of GGUF files, rebuilt from the metadata without torch, and their names there.

A GGUF file holds no ``tokenizer.json``. It names the kind of vocabulary (``tokenizer.ggml.model``),
how text is cut before the merges (``tokenizer.ggml.pre``), and lists tokens, their types, and
merges or scores; the tokenizer is rebuilt from these (the GGUF specification, ggml/docs/gguf.md,
and the pre-tokenizers of llama.cpp's ``llama-vocab.cpp``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from gguf import Keys, TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxdistill.errors import UserError
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_layout import gguf_field, one_line
from jaxdistill.models.tokenizer import (
    Tokenizer,
    check_templates,
    pairs_of,
    tokenizer_spec,
)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPLITS = {  # how each pre-tokenizer cuts text, where that is one regular expression
    "llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_LETTERS}|\p{{N}}|{_REST}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+"
    rf"[{_LOWER}]*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_LONGEST, _MOST = 1024, 2**23  # characters of a token, of all: every cut of each is looked up
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is taken whole; BOS by default
_ALIASES = {
    "default": "gpt-2",
    "phi-2": "gpt-2",
    "gpt2": "gpt-2",
    "starcoder": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
_PRE = ("gpt-2", "smollm", *_SPLITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """What a GGUF file says of its tokens; ``types`` are ``gguf.TokenType`` numbers."""

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UserError(
                "the GGUF file holds no tokenizer; give a file with tokenizer.ggml.tokens"
            )
        for name, given in (("token_type", self.types), ("scores", self.scores)):
            if given and len(given) != len(self.tokens):
                raise UserError(
                    f"GGUF tokenizer.ggml.{name} has {len(given)} entries for {len(self.tokens)} "
                    "tokens; download or write the file again"
                )
        for name, given, kind in (
            ("tokens", self.tokens, str),
            ("token_type", self.types, int),
            ("scores", self.scores, float),
            ("merges", self.merges, str),
        ):
            if not all(isinstance(value, kind) for value in given):
                raise UserError(
                    f"GGUF tokenizer.ggml.{name} is no list of {kind.__name__}; download or write "
                    "the file again"
                )
        if max(map(len, self.tokens)) > _LONGEST or sum(map(len, self.tokens)) > _MOST:
            raise UserError(
                f"GGUF tokenizer.ggml.tokens has {sum(map(len, self.tokens))} characters, "
                f"{max(map(len, self.tokens))} in one token; accepted: {_MOST}, and {_LONGEST} in "
                "one; download or write the file again"
            )

    def type_of(self, index: int) -> int:
        return self.types[index] if self.types else TokenType.NORMAL

    def ids(self) -> dict[str, int]:
        """Return token -> id, without the unused entries that only fill the table."""
        return {
            token: i
            for i, token in enumerate(self.tokens)
            if not (self.type_of(i) == TokenType.UNUSED and token == f"[PAD{i}]")
        }


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes.

    Byte-level BPE (``tokenizer.ggml.model`` ``gpt2``) and SentencePiece BPE with byte fallback
    (``llama``). Control tokens become special tokens, user-defined ones plain added tokens; BOS and
    EOS are added where the file, or llama.cpp's default for that vocabulary, says so.

    Raises:
        UserError: if the file holds no tokenizer, or one of another kind.
    """
    try:
        return _from_gguf(file)
    except UserError:
        raise
    except BaseException as e:  # tokenizers raises bare Exception, and panics are none even
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(
            f"the GGUF file's tokenizer is damaged ({one_line(e)}); download or write it again"
        ) from e


def _from_gguf(file: GGUFFile) -> Tokenizer:
    kind = gguf_field(file, Keys.Tokenizer.MODEL, str)
    vocab = _Vocabulary(
        tokens=gguf_field(file, Keys.Tokenizer.LIST, list, []),
        types=gguf_field(file, Keys.Tokenizer.TOKEN_TYPE, list, []),
        scores=gguf_field(file, Keys.Tokenizer.SCORES, list, []),
        merges=gguf_field(file, Keys.Tokenizer.MERGES, list, []),
    )
    named = _named_tokens(file, vocab)
    pre = gguf_field(file, Keys.Tokenizer.PRE, str, "default")
    space = gguf_field(file, Keys.Tokenizer.ADD_PREFIX, bool, kind == "llama")
    if kind == "gpt2":
        backend = _byte_level(vocab, pre, space)
    elif kind == "llama":
        backend = _sentence_piece(vocab, named.get("unk_token"), space)
    else:
        raise UserError(
            f"GGUF tokenizer model {kind!r} is not supported; accepted: gpt2, llama; give an "
            "HF directory instead"
        )
    _mark_added(backend, vocab)
    bos_default = kind == "llama" or _ALIASES.get(pre, pre) in _WHOLE_WORDS
    add_bos = "bos_token" in named and gguf_field(file, Keys.Tokenizer.ADD_BOS, bool, bos_default)
    add_eos = "eos_token" in named and gguf_field(file, Keys.Tokenizer.ADD_EOS, bool, False)
    backend.post_processor = _template(
        (named["bos_token"], vocab.ids()[named["bos_token"]]) if add_bos else None,
        (named["eos_token"], vocab.ids()[named["eos_token"]]) if add_eos else None,
    )
    arch = gguf_field(file, Keys.General.ARCHITECTURE, str, "")
    context = gguf_field(file, f"{arch}.context_length", int)
    tokenizer = Tokenizer(
        tokenizer_object=backend,
        add_bos_token=bool(add_bos),
        add_eos_token=bool(add_eos),
        clean_up_tokenization_spaces=False,
        **named,
        **({"model_max_length": context} if context else {}),
    )
    tokenizer.chat_template = _chat_template(file)
    check_templates(tokenizer, str(file.path))
    return tokenizer


def _named_tokens(file: GGUFFile, vocab: _Vocabulary) -> dict[str, str]:
    """Return the tokens that have a role, such as ``bos_token``, by the names of transformers."""
    keys = {
        "bos_token": Keys.Tokenizer.BOS_ID,
        "eos_token": Keys.Tokenizer.EOS_ID,
        "unk_token": Keys.Tokenizer.UNK_ID,
        "pad_token": Keys.Tokenizer.PAD_ID,
    }
    named = {}
    for role, key in keys.items():
        index = gguf_field(file, key, int)
        if index is None:
            continue
        if not 0 <= index < len(vocab.tokens):
            raise UserError(
                f"GGUF {key} is {index}, outside the {len(vocab.tokens)} tokens of the file; write "
                "the file again"
            )
        named[role] = vocab.tokens[index]
    return {role: token for role, token in named.items() if token in vocab.ids()}


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """Return the chat template, or a dict of them when the file names several."""
    default = gguf_field(file, Keys.Tokenizer.CHAT_TEMPLATE, str)
    names = gguf_field(file, Keys.Tokenizer.CHAT_TEMPLATES, list, [])
    key = Keys.Tokenizer.CHAT_TEMPLATE_N
    named = {n: t for n in names if (t := gguf_field(file, key.format(name=n), str))}
    return (named | ({"default": default} if default else {})) if named else default


def _byte_level(vocab: _Vocabulary, pre: str, space: bool) -> tokenizers.Tokenizer:
    """Build byte-level BPE from tokens and merges, cutting text as ``pre`` names it."""
    name = _ALIASES.get(pre, pre)
    if name not in _PRE:
        raise UserError(
            f"GGUF pre-tokenizer {pre!r} is not supported; accepted: "
            f"{', '.join((*_PRE, *_ALIASES))}; give an HF directory instead"
        )
    merges = pairs_of(vocab.merges)
    bpe = models.BPE(vocab=vocab.ids(), merges=merges, ignore_merges=name in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(bpe)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(space), use_regex=name not in _SPLITS)
    if name in _SPLITS:
        cut = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[name]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])
    elif name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    else:
        backend.pre_tokenizer = bytes_
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(vocab: _Vocabulary, unk: str | None, space: bool) -> tokenizers.Tokenizer:
    """Build SentencePiece BPE with byte fallback; the scores order the merges."""
    pieces = {t: i for t, i in vocab.ids().items() if vocab.type_of(i) == TokenType.NORMAL}
    if vocab.merges:
        merges = pairs_of(vocab.merges)
    elif vocab.scores:
        merges = merges_from_scores(pieces, vocab.scores)
    else:
        raise UserError("the GGUF file's tokenizer has no scores; give an HF directory instead")
    if unk is None:
        unk = next(
            (t for t, i in vocab.ids().items() if vocab.type_of(i) == TokenType.UNKNOWN), None
        )
    bpe = models.BPE(
        vocab=vocab.ids(), merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(bpe)
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    back: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space:
        marks.insert(0, normalizers.Prepend("▁"))
        back.append(decoders.Strip(content=" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence(marks)
    backend.decoder = decoders.Sequence(back)
    return backend


def merges_from_scores(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores imply, first applied first.

    ``pieces`` maps each ordinary piece to its id, an index of ``scores``. Every split of a piece
    into two other pieces is a merge; the piece's score ranks it, then the longer left part, then
    the longer right part, then the ids of the parts (as in the conversion of SentencePiece models
    in ``transformers``).
    """
    ranked = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                key = (-scores[index], -cut, cut - len(piece), index, left, right)
                ranked.append((key, piece[:cut], piece[cut:]))
    return [(left, right) for _, left, right in sorted(ranked)]


def _mark_added(backend: tokenizers.Tokenizer, vocab: _Vocabulary) -> None:
    """Match control and user-defined tokens whole, and mark the first kind special."""
    special, plain = [], []
    for token, index in vocab.ids().items():
        kind = vocab.type_of(index)
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(tokenizers.AddedToken(token, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED:
            plain.append(tokenizers.AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _template(
    bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> processors.TemplateProcessing:
    """Return the post-processor that puts BOS before, and EOS after, each text."""

    def around(name: str, kind: int) -> str:
        parts = [bos and f"{bos[0]}:{kind}", f"${name}:{kind}", eos and f"{eos[0]}:{kind}"]
        return " ".join(p for p in parts if p)

    special = [t for t in (bos, eos) if t]
    single, pair = around("A", 0), f"{around('A', 0)} {around('B', 1)}"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def ggml_model(tokenizer: Tokenizer) -> str:
    """Return a tokenizer's GGUF kind: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).

    Raises:
        UserError: if it is neither.
    """
    spec = tokenizer_spec(tokenizer)
    kind = spec["model"].get("type")
    if kind == "BPE" and any(s["type"] == "ByteLevel" for s in _steps(spec, "pre_tokenizer")):
        return "gpt2"
    if kind == "BPE" and spec["model"].get("byte_fallback"):
        return "llama"
    raise UserError(
        f"a {kind} tokenizer cannot be written to GGUF; accepted: byte-level BPE, and "
        "SentencePiece BPE with byte fallback; export to another format instead"
    )


def ggml_pre(tokenizer: Tokenizer) -> str:
    """Return the GGUF name of the way a tokenizer cuts text before merging.

    The inverse of what ``tokenizer_from_gguf`` builds from ``tokenizer.ggml.pre``: ``gpt-2``,
    ``smollm``, ``llama-bpe``, ``qwen2`` or ``tekken`` by the structure of the pre-tokenizer;
    ``default`` for SentencePiece.

    Raises:
        UserError: if no GGUF pre-tokenizer that this library knows cuts text that way.
    """
    if ggml_model(tokenizer) == "llama":
        return "default"
    *cuts, last = _steps(tokenizer_spec(tokenizer), "pre_tokenizer")
    if last["type"] == "ByteLevel" and last.get("use_regex", True):
        if not cuts:
            return "gpt-2"
        if len(cuts) == 1 and cuts[0]["type"] == "Digits" and cuts[0].get("individual_digits"):
            return "smollm"
    elif last["type"] == "ByteLevel" and len(cuts) == 1 and cuts[0]["type"] == "Split":
        whole = cuts[0].get("behavior") == "Isolated" and not cuts[0].get("invert")
        regex = cuts[0]["pattern"].get("Regex")
        for name, split in _SPLITS.items():
            if whole and regex == split:
                return name
    shape = " + ".join(step["type"] for step in (*cuts, last))
    raise UserError(
        f"the tokenizer's pre-tokenizer ({shape}) has no GGUF name here; accepted: "
        f"{', '.join(_PRE)}; export to another format instead"
    )


def adds_prefix_space(tokenizer: Tokenizer) -> bool:
    """Tell whether the tokenizer puts a space before a text (GGUF ``add_space_prefix``)."""
    spec = tokenizer_spec(tokenizer)
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space", False))
        for step in (*_steps(spec, "normalizer"), *_steps(spec, "pre_tokenizer"))
    )


def _steps(spec: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """Return the normalizers or pre-tokenizers of a ``tokenizer.json`` as a flat list."""
    step = spec.get(part)
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return inner if step["type"] == "Sequence" and inner else [step]
