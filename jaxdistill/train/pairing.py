"""Texts read by two tokenizers, and the places at which both have read the same characters.

A pair ``(i, j)`` says that the student's tokens up to and including ``i`` and the teacher's up to
and including ``j`` spell the same text, so that the predictions made there are of the same future,
and that what stands between two pairs is one piece of text for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.token_ids import encode
from jaxdistill.train.encode import Example, Rendered, encode_rows, example_of, render_row
from jaxdistill.train.packing import Batch, Packed, pack, recount
from jaxdistill.train.pieces import crop, target_mask

_CHUNK = 1024  # texts that a tokenizer sees at once, over its own threads
_FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Paired:
    """Hold N texts as rows of T student's and U teacher's tokens, one text a row.

    Attributes:
        student: the student's rows, see ``Packed``.
        teacher: the teacher's rows of the same texts.
        pair_student: places in the student's row, rising; 0 where ``pair_mask`` is False.
        pair_teacher: places in the teacher's row that have read as much.
        pair_mask: which pairs are there.
    """

    student: Packed
    teacher: Packed
    pair_student: Int32[np.ndarray, "N P"]
    pair_teacher: Int32[np.ndarray, "N P"]
    pair_mask: Bool[np.ndarray, "N P"]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.student)

    def __getitem__(self, index: int | slice) -> Batch:
        """Give one row, or a slice of rows; the teacher's fields are named ``teacher_...``."""
        teacher = self.teacher[index]
        return (
            self.student[index]
            | {f"teacher_{name}": teacher[name] for name in _FIELDS}
            | {
                name: getattr(self, name)[index]
                for name in ("pair_student", "pair_teacher", "pair_mask")
            }
        )


class _Read(NamedTuple):
    """Hold a text as one tokenizer reads it, and how much of it each token ends at.

    Attributes:
        example: tokens and targets.
        ends: the characters that have been read whole after each token; -1 inside a character.
    """

    example: Example
    ends: np.ndarray


def pair_rows(
    rows: Iterable[Mapping[str, Any]],
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    seq_len: int,
    *,
    teacher_seq_len: int | None = None,
    loss_on: Literal["all", "completion"] = "all",
    template: Literal["auto", "chat", "plain"] = "auto",
    add_eos: bool = True,
) -> Paired:
    """Encode each row with both tokenizers and find where they meet.

    Chat rows are written by the student's template, and the teacher reads the same characters.
    Texts are not packed: what is beyond ``seq_len`` tokens is truncated, and a row without a target
    for both models is dropped.

    Args:
        rows: as ``encode_rows`` takes them.
        student: gives the student's ids and the chat template.
        teacher: gives the teacher's ids.
        seq_len: T; a longer text is cut.
        teacher_seq_len: U; default T. Give more to a teacher whose tokens are shorter.
        loss_on: see ``encode_rows``.
        template: see ``encode_rows``.
        add_eos: end plain texts with each tokenizer's own end-of-text token, which meet too.

    Raises:
        UserError: a row has no accepted form, or no row has two places where both meet.
    """
    rows = list(rows)
    examples = encode_rows(  # also checks the rows
        rows, student, loss_on=loss_on, template=template, add_eos=add_eos
    )
    chat = bool(student.chat_template) and template != "plain"
    rendered = [
        render_row(row, f"row {i}", student, chat, loss_on == "completion", add_eos)
        for i, row in enumerate(rows, 1)
    ]
    own = _read(rendered, student, add_eos)
    other = _read(rendered, teacher, add_eos)
    for example, read in zip(examples, own, strict=True):
        assert np.array_equal(example.tokens, read.example.tokens)
    shorter = teacher_seq_len or seq_len
    student_rows = [crop(example, 0, seq_len) for example in examples]
    teacher_rows = [crop(read.example, 0, shorter) for read in other]
    meetings = [
        _meetings(a.ends[:seq_len], b.ends[:shorter]) for a, b in zip(own, other, strict=True)
    ]
    if not any(len(p) > 1 for p in meetings):
        raise UserError(
            f"the student's tokenizer (of {len(student)} tokens) and the teacher's (of "
            f"{len(teacher)}) end at no common place in any of {len(rows)} texts; accepted: texts "
            "of two tokens or more that both can spell; give other data or another teacher"
        )
    kept = [
        i
        for i, pair in enumerate(zip(student_rows, teacher_rows, strict=True))
        if all(target_mask(example).any() for example in pair)
    ]
    if not kept:
        raise UserError(
            f"none of {len(rows)} texts has a target in the student's first {seq_len} tokens and "
            f"the teacher's first {shorter}; give a larger --seq-len, or longer texts"
        )
    pairs = [meetings[i] for i in kept]
    pair = np.zeros((len(pairs), max(map(len, pairs)), 2), np.int32)
    mask = np.zeros(pair.shape[:2], np.bool_)
    for n, found in enumerate(pairs):
        pair[n, : len(found)], mask[n, : len(found)] = found, True
    alone = functools.partial(pack, packing="none")
    student_packed = alone([student_rows[i] for i in kept], seq_len, pad_id=_pad(student))
    return Paired(
        student=recount(student_packed, examples, kept),
        teacher=alone([teacher_rows[i] for i in kept], shorter, pad_id=_pad(teacher)),
        pair_student=np.ascontiguousarray(pair[..., 0]),
        pair_teacher=np.ascontiguousarray(pair[..., 1]),
        pair_mask=mask,
    )


def _pad(tokenizer: PreTrainedTokenizerFast) -> int:
    pad: Any = tokenizer.pad_token_id
    return pad or 0


def _read(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerFast, add_eos: bool
) -> list[_Read]:
    """Encode strings, and tell how many characters have been read whole after each token."""
    # Post-processing may move offsets away from spaces, so texts are read without it too.
    bare = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    bare.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    eos: Any = tokenizer.eos_token_id if add_eos else None
    found = []
    for at in range(0, len(rendered), _CHUNK):
        rows = rendered[at : at + _CHUNK]
        texts = [row.text if row.text.strip() else "" for row in rows]
        inner = bare.encode_batch(texts, add_special_tokens=False)
        for special in (False, True):
            picked = [i for i, row in enumerate(rows) if row.special is special]
            encoded = encode(tokenizer, [texts[i] for i in picked], bos=special)
            for i, (ids, _) in zip(picked, encoded, strict=True):
                offsets = np.array(inner[i].offsets, np.int64).reshape(-1, 2)
                first = len(ids) - len(offsets)
                offsets = np.concatenate([np.zeros((first, 2), np.int64), offsets])
                if not texts[i]:
                    ids, offsets, first = [], offsets[:0], 0
                example = example_of(rows[i], ids, offsets, tokenizer, eos if texts[i] else None)
                # Beginnings have read nothing; an end has read the text and, as one more, its end.
                ends = np.zeros(len(example.tokens), np.int64)
                ends[first : len(ids)] = _ends(offsets[first:])
                ends[len(ids) :] = len(rows[i].text) + 1
                found.append((at + i, _Read(example, ends)))
    return [read for _, read in sorted(found, key=lambda item: item[0])]


def _ends(offsets: np.ndarray) -> np.ndarray:
    """Return how far each token ends the text, -1 where a later one still adds to a character.

    The pieces of one character all claim the whole of it; only the last of them has read it.
    """
    if not len(offsets):
        return np.zeros(0, np.int64)
    start, end = offsets[:, 0], offsets[:, 1]
    later = np.append(np.minimum.accumulate(start[::-1])[::-1][1:], end.max())
    whole = (np.maximum.accumulate(end) <= end) & (later >= end)
    return np.where(whole, end, -1)


def _meetings(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return the pairs ``[P, 2]`` of places that end at the same character, the last of each."""
    last = {int(end): j for j, end in enumerate(teacher) if end >= 0}
    own = {int(end): i for i, end in enumerate(student) if end >= 0}
    found = [(i, last[end]) for end, i in sorted(own.items()) if end in last]
    return np.array(found, np.int32).reshape(-1, 2)
