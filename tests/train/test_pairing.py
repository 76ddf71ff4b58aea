"""Two tokenizers on one text: where they meet, by hand and by what the tokens spell."""

import functools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import batches, eval_batches, fingerprint, pack
from jaxdistill.train.pairing import pair_rows
from tests import tiny

TEXTS = [
    "the cat sat on the mat.",
    "naïve café — 10 €, 日本語 and 😀😀 the end",
    "  two  spaces\nthe\tthe \n",
    "x",
    "the the the",
]


def merged_tokenizer(trim: bool = False, bos: bool = True):
    """Byte-level BPE with merges: words of several letters, and a piece across two characters."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def letters(text):
        return byte.pre_tokenize_str(text)[0][0]

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), (".", "Ġ"), ("Ġ", "Ġ")]
    euro, smile = letters("€"), letters("😀")
    merges += [(euro[0], euro[1])]  # two of three bytes
    merges += [(smile[2], smile[3]), (smile[2:], smile[0])]  # an end and the next one's beginning
    tokens = ["<pad>", "<bos>", "<end>", *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = byte, decoders.ByteLevel()
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        steps.append(
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        )
    if steps:
        backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", pad_token="<pad>"
    )


def sentence_piece():
    """SentencePiece-like: a space before the text, bytes for what has no piece."""
    pieces = ["▁", "t", "h", "e", "c", "a", "s", "▁t", "▁th", "▁the", "th", "at"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t")]
    bpe = models.BPE(
        vocab={n: i for i, n in enumerate(names)}, merges=merges, unk_token="<unk>",
        fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@functools.cache
def byte_of_letter():
    """Return the byte that each letter of the byte-level alphabet stands for."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    code = {}
    for text in (*map(chr, range(0x800)), *TEXTS):
        letters = byte.pre_tokenize_str(text)[0][0]
        code |= dict(zip(letters, text.encode(), strict=True))
    return code


def spelled(tokenizer, ids):
    """Return the bytes of byte-level ids, by nothing but the alphabet; special ones are nothing."""
    special = {"<pad>", "<bos>", "<end>", "<s>", "</s>"}
    tokens = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    return bytes(byte_of_letter()[letter] for t in tokens if t not in special for letter in t)


def complete(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_pairs_are_all_the_places_that_have_read_the_same_text(trim, bos):
    """Against every pair of prefixes, spelt out byte by byte."""
    student, teacher = tiny.byte_tokenizer(bos=True), merged_tokenizer(trim, bos)
    paired = pair_rows([{"text": t} for t in TEXTS], student, teacher, 96)
    assert len(paired) == len(TEXTS)
    for n, text in enumerate(TEXTS):
        row = paired[n]
        own = row["tokens"][row["segment_ids"] > 0]
        other = row["teacher_tokens"][row["teacher_segment_ids"] > 0]
        assert spelled(student, own) == spelled(teacher, other) == text.encode()
        read = [spelled(student, own[: i + 1]) for i in range(len(own))]
        also = [spelled(teacher, other[: j + 1]) for j in range(len(other))]
        want = {}
        for i, a in enumerate(read):
            for j, b in enumerate(also):
                ended = (i == len(own) - 1) + (j == len(other) - 1)
                if a == b and complete(a) and ended in (0, 2):
                    want[len(a) + (ended == 2)] = (i, j)
        mask = row["pair_mask"]
        got = list(zip(row["pair_student"][mask], row["pair_teacher"][mask], strict=True))
        assert got == [want[key] for key in sorted(want)], text
        assert not mask[mask.sum() :].any()


def test_a_split_character_counts_when_it_is_whole():
    """By hand: the euro's third byte ends it for both; two smiles overlap in one piece."""
    student, teacher = tiny.byte_tokenizer(), merged_tokenizer(bos=False)
    paired = pair_rows([{"text": "a€b"}, {"text": "😀😀."}], student, teacher, 16, add_eos=False)
    first, second = paired[0], paired[1]
    # a | € = 3 bytes, of which the teacher's first piece has two | b
    assert first["pair_student"][first["pair_mask"]].tolist() == [0, 3, 4]
    assert first["pair_teacher"][first["pair_mask"]].tolist() == [0, 2, 3]
    # The teacher's piece of the first smile's end and the second's beginning ends no character.
    meet = second["pair_student"][second["pair_mask"]].tolist()
    assert meet[-1] == 8 and 3 not in meet


def test_sentence_piece_meets_byte_level():
    student, teacher = tiny.byte_tokenizer(), sentence_piece()
    paired = pair_rows([{"text": "the cat: é"}], student, teacher, 32, add_eos=False)
    row = paired[0]
    tokens = teacher.convert_ids_to_tokens(row["teacher_tokens"][row["teacher_segment_ids"] > 0])
    own = row["pair_student"][row["pair_mask"]]
    other = row["pair_teacher"][row["pair_mask"]]
    assert [tokens[j] for j in other][-1] == "<0xA9>" and own[-1] == len("the cat: é".encode()) - 1
    ends = {"the": 2, "the cat": 6, "the cat:": 7}
    assert set(ends.values()) <= set(own.tolist())


def test_the_students_rows_are_those_it_is_trained_on_alone():
    """Tokens, targets and chat answers as encode_rows has them; the teacher's targets match."""
    student, teacher = tiny.byte_tokenizer(), merged_tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "at é"}]}
    ]
    paired = pair_rows(rows, student, teacher, 128, loss_on="completion")
    want = pack(encode_rows(rows, student, loss_on="completion"), 128, packing="none")
    for name, array in want[:].items():
        np.testing.assert_array_equal(paired[:][name], array)
    row = paired[0]
    answer = spelled(teacher, row["teacher_tokens"][row["teacher_loss_mask"]]).decode()
    assert answer == "at é<|im_end|>"
    assert student.decode(row["tokens"][row["loss_mask"]]) == answer


def test_texts_are_cut_and_served_like_packed_rows():
    student, teacher = tiny.byte_tokenizer(), merged_tokenizer()
    rows = [{"text": t} for t in TEXTS]
    paired = pair_rows(rows, student, teacher, 12, teacher_seq_len=8)
    assert paired.student.tokens.shape[1] == 12 and paired.teacher.tokens.shape[1] == 8
    assert paired.pair_student.max() < 12 and paired.pair_teacher.max() < 8
    batch = batches(paired, batch_size=3, seed=0)[0]
    assert batch["pair_mask"].shape == (3, paired.pair_mask.shape[1])
    assert eval_batches(paired, 4)[-1]["teacher_tokens"].shape == (4, 8)
    again = pair_rows(rows, student, teacher, 12, teacher_seq_len=8)
    other = pair_rows(rows, student, merged_tokenizer(bos=False), 12, teacher_seq_len=8)
    assert fingerprint(paired) == fingerprint(again) != fingerprint(other)


def test_tokenizers_that_never_meet_are_refused():
    lone = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=lone, unk_token="<unk>")
    with pytest.raises(UserError, match="at no common place in any of 2 texts"):
        pair_rows([{"text": "bb"}, {"text": "cc"}], tiny.byte_tokenizer(), whole, 16, add_eos=False)
