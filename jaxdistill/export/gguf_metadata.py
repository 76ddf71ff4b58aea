"""The metadata of a GGUF file: the model's hyper-parameters and its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import LlamaFileType, TokenType

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.gguf_tokenizer import (
    adds_prefix_space,
    ggml_model,
    ggml_pre,
    merges_from_scores,
)
from jaxdistill.models.tokenizer import Tokenizer, merge_pairs, tokenizer_spec

_log = logging.getLogger(__name__)


def add_model(
    writer: gguf.GGUFWriter, config: ModelConfig, name: str, file_type: LlamaFileType
) -> None:
    """Add the general metadata and every hyper-parameter."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def add_about(writer: gguf.GGUFWriter, description: str | None, base_model: str | None) -> None:
    """Add what a model card would say, for a GGUF file has no README.md."""
    if description is not None:
        writer.add_description(description)
    if base_model is not None:
        organization, name = base_model.split("/", 1)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base_model}")


def add_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Add the vocabulary, one entry per embedding row, and everything that goes with it."""
    spec = tokenizer_spec(tokenizer)
    kind = ggml_model(tokenizer)
    tokens, types = _tokens(spec, kind, config.vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(ggml_pre(tokenizer))
    writer.add_token_list(tokens)
    merges = merge_pairs(spec)
    if kind == "llama":
        pieces = {t: i for i, t in enumerate(tokens) if types[i] == TokenType.NORMAL}
        scores = _scores(tokens, types, merges)
        writer.add_token_scores(scores)
        if merges_from_scores(pieces, scores) == merges:
            merges = []  # the scores say it all
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([" ".join(p.replace(" ", "Ġ") for p in pair) for pair in merges])
    extra = config.eos_token_ids if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ends = list(dict.fromkeys((*extra, *config.eos_token_ids)))
    if ends[3:]:
        _log.warning("GGUF names 3 tokens that end a text; the ids %s are left out", ends[3:])
    bos = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    named = [
        (writer.add_bos_token_id, bos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        *zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
            ends,
            strict=False,  # a model may end a text in fewer ways, and GGUF has room for three
        ),
    ]
    for add, index in named:
        if index is not None:
            add(index)
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[:1] == [bos] and plain[:1] != [bos])
    writer.add_add_eos_token(bool(ends) and ids[-1:] == ends[:1] and plain[-1:] != ends[:1])
    writer.add_add_space_prefix(adds_prefix_space(tokenizer))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        names = {name: re.sub(r"[^A-Za-z0-9]", "_", name) for name in template}
        if changed := [name for name, written in names.items() if name != written]:
            _log.warning("GGUF has letters, digits and _ in names of chat templates: %s", changed)
        if len(set(names.values())) < len(names):
            raise UserError(
                f"the names of the chat templates {sorted(names)} are not all different in GGUF, "
                "which has letters, digits and _; rename one"
            )
        template = [{"name": names[n], "template": t} for n, t in template.items()]
    if template:
        writer.add_chat_template(template)


def _tokens(spec: Mapping[str, Any], kind: str, rows: int) -> tuple[list[str], list[int]]:
    """Return a token and a type for each of the model's embedding rows."""
    by_id = {index: token for token, index in spec["model"]["vocab"].items()}
    added = {t["id"]: t for t in spec["added_tokens"]}
    by_id |= {index: t["content"] for index, t in added.items()}
    if max(by_id) >= rows:
        raise UserError(
            f"the tokenizer's ids reach {max(by_id)} but the model has {rows} embedding rows; give "
            "the tokenizer of this model"
        )
    unknown = spec["model"].get("unk_token") if kind == "llama" else None
    tokens, types = [], []
    for index in range(rows):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if token == unknown:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            special = added[index]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif kind == "llama" and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Return SentencePiece scores that rank the pieces as the merges do.

    A piece's score is minus the rank of the first merge that makes it; pieces that no merge makes
    come after all others, in order, and tokens that are not text score 0.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    last = len(ranks)
    return [
        -float(ranks.get(token, last + i)) if types[i] == TokenType.NORMAL else 0.0
        for i, token in enumerate(tokens)
    ]
