"""Tests the tokenizers: rebuilt from GGUF metadata, loaded from a directory, named, told apart."""

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_tokenizer import (
    adds_prefix_space,
    ggml_model,
    ggml_pre,
    tokenizer_from_gguf,
)
from jaxdistill.models.tokenizer import fingerprint, load_tokenizer
from tests.gguf_files import (
    TEMPLATE,
    TEXTS,
    byte_fields,
    byte_tokenizer,
    byte_tokens,
    piece_fields,
    write_raw,
)

# As the released tokenizer.json files of these models have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.fixture
def rebuild(tmp_path):
    """Builds the tokenizer of a GGUF file that holds the given tokenizer metadata."""

    def build(fields):
        path = write_raw(tmp_path / "t.gguf", "llama", {"context_length": 77}, {}, fields)
        return tokenizer_from_gguf(GGUFFile(path))

    return build


@pytest.mark.parametrize(
    ("pre", "name", "pre_tokenizer", "model"),
    [
        ("gpt-2", "gpt-2", None, {}),
        ("default", "gpt-2", None, {}),
        (None, "gpt-2", None, {}),
        ("smollm", "smollm", smollm(), {}),
        ("qwen2", "qwen2", split(QWEN2), {}),
        ("llama-bpe", "llama-bpe", split(LLAMA3), {"ignore_merges": True}),
        ("llama3", "llama-bpe", split(LLAMA3), {"ignore_merges": True}),
    ],
)
def test_byte_level_ids_equal_those_of_the_hf_tokenizer(rebuild, pre, name, pre_tokenizer, model):
    ours = rebuild(byte_fields(pre, add_bos_token=False))
    theirs = byte_tokenizer(pre_tokenizer, **model)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ggml_pre(ours) == ggml_pre(theirs) == name
    assert ggml_model(ours) == ggml_model(theirs) == "gpt2"
    assert fingerprint(ours) == fingerprint(theirs)
    assert not adds_prefix_space(ours)


def test_the_ways_of_cutting_text_differ_on_digits(rebuild):
    ids = {p: rebuild(byte_fields(p, add_bos_token=False))("1234") for p in ("gpt-2", "smollm")}
    assert len(ids["gpt-2"]["input_ids"]) == 1
    assert len(ids["smollm"]["input_ids"]) == 4


def test_qwen2_normalizes_to_composed_characters(rebuild):
    tokenizer = rebuild(byte_fields("qwen2"))
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]


def sentence_piece(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """Merges the best-scored neighbours until none is a piece, as SentencePiece does."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [
            (scores[tokens.index(a + b)], -i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in tokens
        ]
        if not found:
            break
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        in_bytes = [f"<0x{b:02X}>" for b in part.encode()]
        out += [part] if part in tokens else in_bytes
    return out


@pytest.mark.parametrize("text", ["the cat", "the other theater is in a tin", " a  cat. é😀 ", "x"])
def test_sentence_piece_merges_by_score_and_falls_back_to_bytes(rebuild, text):
    fields = piece_fields()
    tokenizer = rebuild(fields)
    want = sentence_piece(text, fields["tokens"], fields["scores"])
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *want]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ggml_pre(tokenizer) == "default" and ggml_model(tokenizer) == "llama"
    assert adds_prefix_space(tokenizer)


def test_sentence_piece_without_a_prefix_space(rebuild):
    tokenizer = rebuild(piece_fields(add_space_prefix=False))
    assert tokenizer.tokenize("the") == ["the"]
    assert not adds_prefix_space(tokenizer)


@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        (byte_fields("gpt-2"), [], []),
        (byte_fields("gpt-2", add_bos_token=True), [0], []),
        (byte_fields("gpt-2", add_bos_token=True, add_eos_token=True), [0], [1]),
        (byte_fields("llama-bpe"), [0], []),  # llama.cpp's default for this one
        (byte_fields("llama-bpe", add_bos_token=False, add_eos_token=True), [], [1]),
        (piece_fields(), [1], []),
        (piece_fields(add_bos_token=False), [], []),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says(rebuild, fields, before, after, tmp_path):
    tokenizer = rebuild(fields)
    plain = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer("hello")["input_ids"] == before + plain + after
    pair = tokenizer("hello", "hello")["input_ids"]
    assert pair == (before + plain + after) * 2
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again("hello")["input_ids"] == before + plain + after


def test_control_tokens_are_special_and_user_defined_ones_are_not(rebuild):
    tokenizer = rebuild(byte_fields() | {"tokenizer.chat_template": TEMPLATE})
    ids = tokenizer("<|bos|>hello<|eos|><think>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|bos|>", "hello", "<|eos|>", "<think>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == 77
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|>hello<|eos|>"


def test_several_chat_templates_keep_their_names(rebuild):
    named = {"chat_templates": ["tool"], "chat_template.tool": "B", "chat_template": "A"}
    tokenizer = rebuild(byte_fields() | {f"tokenizer.{k}": v for k, v in named.items()})
    assert tokenizer.chat_template == {"default": "A", "tool": "B"}


def test_entries_that_only_fill_the_table_are_left_out(rebuild):
    tokens, types = byte_tokens()
    size = len(tokens)
    filled = byte_fields(tokens=[*tokens, f"[PAD{size}]"], token_type=[*types, 5])
    assert len(rebuild(filled)) == size
    assert fingerprint(rebuild(filled)) == fingerprint(rebuild(byte_fields()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "holds no tokenizer"),
        (byte_fields(model="t5"), "tokenizer model 't5' is not supported; accepted: gpt2, llama"),
        (byte_fields("poro-chat"), "pre-tokenizer 'poro-chat' is not supported; accepted: gpt-2"),
        (byte_fields(bos_token_id=9999), "bos_token_id is 9999, outside"),
        (byte_fields(merges=["h zebra"]), "tokenizer is damaged"),
        (byte_fields(token_type=[1, 2]), "token_type has 2 entries"),
        (byte_fields(tokens="abc"), "tokens' is damaged"),
        (piece_fields(scores=[]), "has no scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_named_in_one_line(rebuild, fields, message):
    with pytest.raises(UserError, match=message) as e:
        rebuild(fields)
    assert "\n" not in str(e.value)


def test_the_fingerprint_sees_vocabulary_merges_and_special_tokens(rebuild):
    tokens, types = byte_tokens()
    merges = byte_fields()["merges"]
    changed = [
        byte_fields(),
        byte_fields(merges=[merges[1], merges[0], *merges[2:]]),
        byte_fields(tokens=[*tokens[:-1], "</thank>"]),
        byte_fields(token_type=[*types[:-1], 3]),
        byte_fields(tokens=[tokens[1], tokens[0], *tokens[2:]]),
    ]
    prints = [fingerprint(rebuild(fields)) for fields in changed]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint(rebuild(byte_fields()))
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    tokenizer = byte_tokenizer(smollm(), bos=True)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.chat_template == TEMPLATE
    assert [again(t)["input_ids"] for t in TEXTS] == [tokenizer(t)["input_ids"] for t in TEXTS]


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_way_of_cutting_text_that_gguf_cannot_name_is_refused():
    odd = [pre_tokenizers.Digits(individual_digits=False), split(r"\p{L}+"), None]
    for pre_tokenizer in odd[:2]:
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        both = pre_tokenizers.Sequence([pre_tokenizer, byte])
        with pytest.raises(UserError, match="has no GGUF name here; accepted: gpt-2, smollm"):
            ggml_pre(byte_tokenizer(both))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="a WordLevel tokenizer cannot be written to GGUF"):
        ggml_pre(PreTrainedTokenizerFast(tokenizer_object=words))


def test_the_real_tokenizer(smollm2_path, tmp_path):
    tokenizer = tokenizer_from_gguf(GGUFFile(smollm2_path))
    assert ggml_pre(tokenizer) == "smollm" and len(tokenizer) == 49152
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert text == f"{start}system\nS{end}{start}user\nU{end}{start}assistant\n"
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 3
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
