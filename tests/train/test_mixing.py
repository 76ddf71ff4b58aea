"""Mixing curated examples in: the stated share, every row, evenly."""

import json

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.data import load_rows
from jaxdistill.train.mixing import mixed_order, mixed_rows, parse_mix


@pytest.mark.parametrize(("extra", "rate"), [(3, 0.1), (3, 0.5), (500, 0.2), (1, 0.02)])
def test_the_share_is_the_stated_one(extra, rate):
    source, row = mixed_order([90, extra], [rate])
    assert np.mean(source == 1) == pytest.approx(rate, abs=0.01)
    np.testing.assert_array_equal(row[source == 0], np.arange(90))  # each once, in order
    seen = np.bincount(row[source == 1], minlength=extra)
    assert seen.max() - seen.min() <= 1  # in turn
    halves = [np.mean(part == 1) for part in np.array_split(source, 2)]
    assert halves[0] == pytest.approx(halves[1], abs=0.03)  # spread over the whole


def test_two_files():
    source, _ = mixed_order([60, 5, 7], [0.1, 0.3])
    np.testing.assert_allclose(np.bincount(source) / source.size, [0.6, 0.1, 0.3], atol=0.01)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_files(tmp_path):
    common = load_rows(write(tmp_path / "a.jsonl", [{"text": f"c{i}"} for i in range(8)]))
    chats = [{"instruction": "ask", "output": "answer"}]
    rare = write(tmp_path / "rare.jsonl", chats)
    rows = mixed_rows(common, [f"{rare}:0.2"])
    assert len(rows) == 10
    assert sum("instruction" in row for row in rows) == 2
    assert [row["text"] for row in rows if "text" in row] == [f"c{i}" for i in range(8)]
    assert all(None not in row.values() for row in rows)
    assert mixed_rows(common, []) is common


@pytest.mark.parametrize("text", ["rare.jsonl", "rare.jsonl:2", ":0.1", "rare.jsonl:some"])
def test_what_is_no_mix(text):
    with pytest.raises(UserError, match="accepted: FILE:RATE, the rate between 0 and 1"):
        parse_mix(text)


def test_rates_that_leave_nothing():
    with pytest.raises(UserError, match="rates of 1 in all given; accepted: less than 1"):
        mixed_order([10, 2, 2], [0.5, 0.5])
