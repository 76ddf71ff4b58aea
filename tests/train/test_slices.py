"""Named slices: by regex, column and frequency."""

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.slices import Described, described, slices_of

TEXTS = ["the cat sat", "the dog sat", "a zebra yawned quietly", "the cat", "Zebra the"]
DATA = Described(count=5, texts=TEXTS, columns={"label": ["x", "x", "y", "x", "x"]}, source="d")


def members(*specs):
    return {name: np.flatnonzero(mask).tolist() for name, mask in slices_of(DATA, specs).items()}


def test_by_frequency():
    assert members("longest:0.2") == {"longest:0.2": [2]}
    # -log of frequencies: "a", "yawned", "quietly" occur once, "zebra" twice; then "zebra the" with
    # (log 2 + log 4) / 2 against "the dog sat" with (log 4 + log 1 + log 2) / 3.
    assert members("rare_words:0.4") == {"rare_words:0.4": [1, 2]}
    assert members("rare_labels:0.2") == {"rare_labels:0.2": [2]}
    assert members("rare_labels:0.1") == {"rare_labels:0.1": []}
    assert members("longest:0.01") == {"longest:0.01": [2]}  # one at least


def test_by_regex_and_column():
    assert members("zebra=zebra", "label") == {
        "zebra": [2, 4],
        "label=x": [0, 1, 3, 4],
        "label=y": [2],
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("longest:2", "a share between 0 and 1"),
        ("longest:much", "a share between 0 and 1"),
        ("=x", "accepted: a column, NAME=REGEX over the text, or longest:SHARE"),
        ("all=cat", "the name 'all' is taken"),
        ("topic", "with the columns label; accepted: one of these"),
    ],
)
def test_what_is_no_slice(spec, message):
    with pytest.raises(UserError, match=message):
        members(spec)


def test_names_are_not_used_twice():
    assert list(members("longest:0.2", "longest:0.4")) == ["longest:0.2", "longest:0.4"]
    with pytest.raises(UserError, match="the name 'x' is taken"):
        members("x=cat", "x=dog")


def test_labels_that_are_none_or_lists():
    some = Described(count=3, texts=TEXTS[:3], columns={"label": [None, "a", "a"]})
    assert slices_of(some, ["rare_labels:0.9"])["rare_labels:0.9"].tolist() == [False, True, True]
    lists = Described(count=1, texts=["a"], columns={"label": [[1, 2]]})
    with pytest.raises(UserError, match="the column `label` holds"):
        slices_of(lists, ["rare_labels:0.9"])
    assert slices_of(Described(count=1), ["rare_labels:0.9"], required=False) == {}


def test_slices_that_need_what_is_not_there():
    bare = Described(count=2, columns={"a": [1, 2]}, source="arrays.npz")
    for spec in ("longest:0.5", "x=y", "rare_words:0.5"):
        with pytest.raises(UserError, match="holds no texts; accepted: the name of a column"):
            slices_of(bare, [spec])
    with pytest.raises(UserError, match="no column `label`"):
        slices_of(bare, ["rare_labels:0.5"])


def test_rows_of_every_form_are_texts():
    rows = [
        {"text": "plain", "topic": "a"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "sing", "output": "la"},
    ]
    known = described(rows, "rows")
    assert known.texts == ["plain", "hi\nyo", "add\n1 2\n3", "sing\nla"]
    assert slices_of(known, ["topic"])["topic=a"].tolist() == [True, False, False, False]
