"""Examples in rows of one length, and rows in batches."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.mesh import HostRows
from jaxdistill.train import packing as packing_module
from jaxdistill.train.curriculum import CurriculumBatches
from jaxdistill.train.data import (
    Example,
    Packed,
    batches,
    eval_batches,
    fingerprint,
    pack,
)
from tests.errors import error_of

ROOT = Path(__file__).resolve().parents[2]


def make_examples(*lengths: int) -> list[Example]:
    """Makes examples whose tokens count up over all of them, from 100."""
    examples, start = [], 100
    for n in lengths:
        tokens = np.arange(start, start + n, dtype=np.int32)
        examples.append(Example(tokens=tokens, loss_mask=np.arange(n) > 0))
        start += n
    return examples


@pytest.mark.parametrize("seq_len", [2, 3, 7, 8, 50, 200])
def test_packing_keeps_the_stream_and_counts_its_targets(seq_len):
    lengths = [5, 1, 0, 20, 2, 8, 3, 0, 17, 1]
    examples = make_examples(*lengths)
    packed = pack(examples, seq_len, packing="wrap", pad_id=9)
    total = sum(lengths)
    shape = (-(-total // seq_len), seq_len)
    stream = np.full(shape, 9).reshape(-1)
    stream[:total] = np.concatenate([e.tokens for e in examples])

    # By hand, token by token.
    segment, position, mask = (np.zeros(stream.shape, kind) for kind in (int, int, bool))
    at = expected_targets = 0
    for n in lengths:
        pieces = len({i // seq_len for i in range(at, at + n)})
        expected_targets += n - pieces
        for k in range(n):
            here = at + k
            new_row, first = here % seq_len == 0, k == 0 or here % seq_len == 0
            segment[here] = 1 if new_row else segment[here - 1] + first
            position[here] = 0 if first else position[here - 1] + 1
            mask[here] = not first
        at += n
    useful = mask.reshape(shape).any(axis=1)  # a row without a target is dropped
    expected = {"tokens": stream, "segment_ids": segment, "positions": position, "loss_mask": mask}
    for name, array in expected.items():
        assert (getattr(packed, name) == array.reshape(shape)[useful]).all()
    assert packed.counts.targets == packed.loss_mask.sum() == expected_targets
    assert packed.counts.dropped == total - packed.counts.targets - packed.counts.masked
    assert {a.dtype.name for a in packed[:].values()} == {"int32", "bool"}


def test_packing_keeps_masks():
    tokens = np.arange(6, dtype=np.int32)
    mask = np.array([False, False, True, True, False, True])
    packed = pack([Example(tokens=tokens, loss_mask=mask)] * 2, 4, packing="wrap")
    expected = [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1]]  # token 0 of row 2 was a target before
    assert packed.loss_mask.astype(int).tolist() == expected
    # An example may not sneak its first token in as a target.
    packed = pack([Example(tokens=tokens, loss_mask=np.ones(6, bool))], 8)
    assert packed.loss_mask[0].tolist() == [False] + [True] * 5 + [False] * 2


def test_one_example_a_row():
    packed = pack(make_examples(3, 1, 0, 2, 6), 4, packing="none", pad_id=7)
    assert packed.tokens.tolist() == [[100, 101, 102, 7], [104, 105, 7, 7], [106, 107, 108, 109]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 2, 3]]
    assert packed.loss_mask.astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    greedy = Example(tokens=np.arange(3, dtype=np.int32), loss_mask=np.ones(3, bool))
    assert pack([greedy], 3, packing="none").loss_mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize("packing", ["best-fit", "wrap", "none"])
def test_nothing_to_lay_out(packing):
    for examples in ([], make_examples(0, 0)):
        packed = pack(examples, 4, packing=packing)
        assert packed.tokens.shape == packed.positions.shape == (0, 4)
    assert error_of(pack, make_examples(3), 1, packing=packing) == (
        "seq_len is 1; accepted: 2 or more, as the first token of a row is never predicted; "
        "raise it"
    )


def rows_of(batch: dict[str, np.ndarray]) -> list[int]:
    """Names the rows of a batch by their first token."""
    return batch["tokens"][:, 0].tolist()


@pytest.fixture
def ten_rows() -> Packed:
    packed = pack(make_examples(7, 40, 13), 6, packing="wrap")
    assert len(packed) == 10
    return packed


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 2), (4, 5), (3, 10), (20, 1)])
def test_every_row_comes_once_an_epoch_in_a_new_order(ten_rows, batch_size, steps):
    ds = batches(ten_rows, batch_size=batch_size, seed=3)
    epochs = batch_size * steps // 10
    seen = [row for step in range(3 * steps) for row in rows_of(ds[step])]
    orders = [seen[at : at + 10] for at in range(0, 30 * epochs, 10)]
    assert all(sorted(order) == sorted(ten_rows.tokens[:, 0]) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_batch_holds_whole_rows(ten_rows):
    batch = batches(ten_rows, batch_size=4, seed=0)[11]
    assert set(batch) == {"tokens", "loss_mask", "segment_ids", "positions"}
    where = [ten_rows.tokens[:, 0].tolist().index(row) for row in rows_of(batch)]
    for name, array in batch.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == getattr(ten_rows, name).dtype
        assert (array == getattr(ten_rows, name)[where]).all()


def test_a_run_resumes_exactly(ten_rows):
    whole = batches(ten_rows, batch_size=3, seed=1)
    run = [rows_of(whole[i]) for i in range(40)]
    for start in (0, 1, 17, 39):
        fresh = batches(pack(make_examples(7, 40, 13), 6, packing="wrap"), batch_size=3, seed=1)
        assert [rows_of(fresh[i]) for i in range(start, 40)] == run[start:]
    assert [rows_of(whole[i]) for i in reversed(range(40))] == run[::-1]
    assert [rows_of(batches(ten_rows, batch_size=3, seed=2)[i]) for i in range(40)] != run
    assert len(whole) > 10**15  # endless for every purpose


def test_a_host_reads_its_own_rows_alone(ten_rows, monkeypatch):
    read = []

    class Counted:
        def __len__(self):
            return len(ten_rows)

        def __getitem__(self, i):
            read.append(i)
            return ten_rows[i]

    whole = batches(ten_rows, batch_size=4, seed=1)[5]["tokens"]
    served = batches(Counted(), batch_size=4, seed=1, per_host=True)
    assert (served[5]["tokens"] == whole).all() and len(read) == 4  # one host: all
    monkeypatch.setattr(packing_module, "own_rows", lambda batch_size: np.array([1, 3]))
    read.clear()
    part = served[5]
    assert isinstance(part, HostRows) and part.batch_size == 4 and len(read) == 2
    assert (part["tokens"] == whole[[1, 3]]).all() and part.index.tolist() == [1, 3]
    easy = CurriculumBatches(Counted(), np.arange(10.0), batch_size=4, seed=0, rise=9)
    assert len(easy[3]["tokens"]) == 2 and len(read) == 4


def test_order_and_fingerprint_are_the_same_in_another_process():
    code = (
        "import numpy as np\n"
        "from jaxdistill.train.data import Example, pack, batches, fingerprint\n"
        "tokens = np.arange(60, dtype=np.int32)\n"
        "packed = pack([Example(tokens=tokens, loss_mask=tokens > 0)], 6)\n"
        "ds = batches(packed, batch_size=4, seed=5)\n"
        "order = [ds[i]['tokens'][:, 0].tolist() for i in range(9)]\n"
        "result = fingerprint(packed), order\n"
    )
    here: dict = {}
    exec(code, here)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(result)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == f"{here['result']}\n"


def test_without_shuffling_rows_come_in_order(ten_rows):
    ds = batches(ten_rows, batch_size=4, seed=0, shuffle=False)
    seen = [row for step in range(5) for row in rows_of(ds[step])]
    assert seen == ten_rows.tokens[:, 0].tolist() * 2


def test_fewer_rows_than_a_batch_are_repeated():
    packed = pack(make_examples(12), 6)
    for step in range(3):
        assert sorted(rows_of(batches(packed, batch_size=4, seed=0)[step])) == [100, 100, 106, 106]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 16])
def test_eval_batches_keep_order_shape_and_count(ten_rows, batch_size):
    got = eval_batches(ten_rows, batch_size)
    assert {b["tokens"].shape for b in got} == {(batch_size, 6)}
    for name in ("tokens", "loss_mask", "segment_ids", "positions"):
        joined = np.concatenate([b[name] for b in got])
        assert joined.dtype == getattr(ten_rows, name).dtype
        assert (joined[:10] == getattr(ten_rows, name)).all()
        assert not joined[10:].any()
    assert sum(int(b["loss_mask"].sum()) for b in got) == ten_rows.loss_mask.sum()


def test_batch_errors(ten_rows):
    empty = pack([], 6)
    no_rows = (
        "the data has no rows of tokens to make batches of; accepted: at least one row; "
        "give examples of two tokens or more, with a target among them"
    )
    assert error_of(batches, empty, batch_size=2, seed=0) == no_rows
    assert error_of(eval_batches, empty, 2) == no_rows
    too_small = "batch_size is 0; accepted: 1 or more; raise it"
    assert error_of(batches, ten_rows, batch_size=0, seed=0) == too_small
    assert error_of(eval_batches, ten_rows, 0) == too_small
    assert error_of(batches, ten_rows, batch_size=1, seed=-1) == (
        "seed is -1; accepted: 0 to 4294967295; choose one of these"
    )


def test_fingerprint_sees_every_array_and_shape(ten_rows):
    fingerprints = {fingerprint(ten_rows)}
    assert fingerprints == {fingerprint(pack(make_examples(7, 40, 13), 6, packing="wrap"))}
    for name in ("tokens", "loss_mask", "segment_ids", "positions"):
        arrays = {k: v.copy() for k, v in ten_rows[:].items()}
        arrays[name][2, 1] = not arrays[name][2, 1]
        fingerprints.add(fingerprint(Packed(**arrays)))
    fingerprints.add(fingerprint(Packed(**{k: v.reshape(6, 10) for k, v in ten_rows[:].items()})))
    assert len(fingerprints) == 6
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)


def random_examples(seed: int) -> list[Example]:
    """Makes texts and chats of 1 to 40 tokens, each token its example's number."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, n in enumerate(rng.integers(1, 41, 60)):
        prompt = rng.integers(0, n) if i % 2 else 0
        mask = np.arange(n) > prompt
        examples.append(Example(tokens=np.full(n, i, np.int32), loss_mask=mask))
    return examples


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("packing", ["best-fit", "none"])
def test_an_example_that_fits_into_a_row_is_whole(packing, by_length, seed):
    examples, seq_len = random_examples(seed), 24
    packed = pack(examples, seq_len, packing=packing, by_length=by_length, pad_id=-1)
    seen: dict[int, list[int]] = {}
    for tokens, segments, positions in zip(
        packed.tokens, packed.segment_ids, packed.positions, strict=True
    ):
        assert (np.diff(np.flatnonzero(segments)) == 1).all()  # padding comes last
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            (number,) = set(tokens[here])
            assert (positions[here] == np.arange(here.sum())).all()
            seen.setdefault(int(number), []).append(int(here.sum()))
        assert packing == "best-fit" or segments.max() == 1
    for i, example in enumerate(examples):
        n = len(example.tokens)
        text = example.loss_mask[1:].all()
        cut = text and packing == "best-fit"
        pieces = [min(seq_len, n - at) for at in range(0, n if cut else 1, seq_len)]
        in_reach = example.loss_mask[:seq_len].any()
        assert sorted(seen.get(i, [])) == sorted(p for p in pieces if p > 1 and in_reach)
    counts, total = packed.counts, sum(len(e.tokens) for e in examples)
    assert counts.targets + counts.masked + counts.padded == packed.tokens.size
    assert counts.targets + counts.masked + counts.truncated + counts.dropped == total
    assert counts.padded == (packed.segment_ids == 0).sum()
    assert packed.loss_mask.any(axis=1).all()


def test_best_fit_rows_are_those_of_best_fit_decreasing():
    """Against the textbook's loop: longest first, each into the fullest row that has room."""
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(2, 30, 80)
        room: list[int] = []
        for length in sorted(lengths, reverse=True):
            fits = [i for i, space in enumerate(room) if space >= length]
            if not fits:
                fits, room = [len(room)], [*room, 32]
            room[min(fits, key=lambda i: room[i])] -= length
        packed = pack(make_examples(*lengths), 32)
        assert sorted((packed.segment_ids == 0).sum(axis=1)) == sorted(room)


def test_rows_by_length_go_from_short_examples_to_long_ones():
    examples = make_examples(*np.random.default_rng(0).integers(2, 30, 80))
    for packing in ("best-fit", "wrap", "none"):
        packed = pack(examples, 32, packing=packing, by_length=True)
        first = {int(e.tokens[0]): len(e.tokens) for e in examples}
        order = [first[t] for t in packed.tokens.reshape(-1).tolist() if t in first]
        assert order == sorted(len(e.tokens) for e in examples)


def test_counts_say_what_was_cut_truncated_and_dropped():
    text, chat = np.arange(10, dtype=np.int32), np.arange(9, dtype=np.int32)
    examples = [
        Example(tokens=text, loss_mask=text > 0),  # rows of 4, 4 and 2
        Example(tokens=chat, loss_mask=chat > 2),  # one of 4, one target
        Example(tokens=chat, loss_mask=chat > 3),  # no target within a row
    ]
    counts = pack(examples, 4).counts
    assert (counts.rows, counts.targets, counts.masked, counts.padded) == (4, 8, 6, 2)
    assert (counts.cut, counts.truncated, counts.dropped) == (6, 5, 9)
    for part in ("8 targets", "2 padding (12.5%)", "6 cut", "5 truncated", "9 dropped"):
        assert part in str(counts)


def test_a_token_of_weight_0_is_not_a_target():
    tokens = np.arange(4, dtype=np.int32)
    weights = np.array([1, 1, 0, 2], np.float32)
    example = Example(tokens=tokens, loss_mask=tokens > 0, weights=weights)
    assert pack([example], 4).loss_mask.tolist() == [[False, True, False, True]]
    nothing = Example(tokens=tokens, loss_mask=tokens > 0, weights=weights * 0)
    assert len(pack([nothing], 4)) == 0
