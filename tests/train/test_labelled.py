"""Labelled data: what is read, what is refused, and which examples are in a slice."""

import gzip
import json

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.labelled import load_labelled
from jaxdistill.train.slices import slices_of

ROWS = [
    {"text": "a Red fox", "label": "animal", "rare": True, "kind": "mammal"},
    {"text": "an oak", "label": "plant", "rare": False, "kind": ""},
    {"text": "red maple", "label": "plant", "rare": False, "kind": "tree"},
    {"text": "a toad", "label": "animal", "rare": True, "kind": "frog"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(*args, **kwargs):
    with pytest.raises(UserError) as e:
        load_labelled(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_words_are_numbered_by_the_alphabet_and_numbers_by_value(tmp_path):
    words = load_labelled(write(tmp_path / "a.jsonl", ROWS))
    assert words.classes == ("animal", "plant") and words.labels.tolist() == [0, 1, 1, 0]
    assert words.labels.dtype == np.int32 and len(words) == 4
    assert words.texts == [row["text"] for row in ROWS]
    assert set(words.columns) == {"rare", "kind"}
    zipped = tmp_path / "b.jsonl.gz"
    with gzip.open(zipped, "wt") as file:
        file.write("".join(json.dumps({"text": "t", "label": n}) + "\n" for n in (10, 9, 10)))
    numbers = load_labelled(str(zipped))
    assert numbers.classes == ("9", "10") and numbers.labels.tolist() == [1, 0, 1]
    # A test set is read with the classes of the training data, though it lack one of them.
    test = load_labelled(write(tmp_path / "t.jsonl", ROWS[:1]), classes=words.classes)
    assert test.classes == words.classes and test.labels.tolist() == [0]
    part = words.take(np.array([2, 0]))
    assert part.texts == ["red maple", "a Red fox"] and part.columns["kind"] == ["tree", "mammal"]


def test_arrays(tmp_path):
    path = tmp_path / "x.npz"
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    labels = np.array([0, 1, 2, 0, 1, 2])
    np.savez(path, images=images, labels=labels, rare=labels == 2)
    found = load_labelled(str(path))
    np.testing.assert_allclose(found.inputs, images.astype(np.float64) / 255, rtol=1e-6)
    assert found.inputs.dtype == np.float32 and found.classes == ("0", "1", "2")
    assert slices_of(found.described, ["rare"])["rare"].tolist() == (labels == 2).tolist()
    again = load_labelled(str(path))
    assert found.fingerprint() == again.fingerprint()
    np.savez(path, inputs=np.ones((6, 3)), labels=labels)
    assert load_labelled(str(path)).fingerprint() != again.fingerprint()
    np.savez(path, inputs=np.full((6, 3), np.nan), labels=labels)
    assert "not finite" in said(str(path))
    np.savez(path, inputs=np.ones((6, 3)), labels=labels[:4])
    assert "labels of shape (4,) for 6 inputs" in said(str(path))
    np.savez(path, inputs=np.ones(6), labels=labels)
    assert "shape (6,)" in said(str(path))
    np.savez(path, pictures=images, labels=labels)
    assert "the arrays pictures, labels" in said(str(path))
    np.savez(path, inputs=np.array([None] * 6), labels=labels)
    assert "cannot be read" in said(str(path))
    path.write_bytes(path.read_bytes()[:40])
    assert "cannot be read" in said(str(path))
    assert "does not exist" in said(str(tmp_path / "none.npz"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "row 2 of .* has no label"),
        (["a", ""], "row 2 of .* has no label"),
        ([0, "a"], "the columns text; accepted: .* labels of one kind"),
        ([-1, 0], "row 1 of .* has the label -1"),
        ([0.5, 1.5], "row 1 of .* has the label 0.5"),
        ([3, 3], "one class alone, '3'"),
    ],
)
def test_wrong_labels(labels, message, tmp_path):
    rows = [{"text": "t", "label": label} for label in labels]
    with pytest.raises(UserError, match=message):
        load_labelled(write(tmp_path / "a.jsonl", rows))


def test_other_wrong_data(tmp_path):
    assert "the columns text; accepted" in said(write(tmp_path / "a.jsonl", [{"text": "t"}]))
    path = write(tmp_path / "b.jsonl", [{"text": "t", "label": "rock"}])
    assert "label 'rock'; accepted: animal, plant" in said(path, classes=("animal", "plant"))


def test_slices(tmp_path):
    data = load_labelled(write(tmp_path / "a.jsonl", ROWS))
    found = slices_of(data.described, ["rare", "kind", "red=^(a )?red"])
    assert {name: np.flatnonzero(mask).tolist() for name, mask in found.items()} == {
        "rare": [0, 3],
        "kind=frog": [3],
        "kind=mammal": [0],
        "kind=tree": [2],
        "red": [0, 2],
    }
    for spec, message in (("none", "columns rare, kind"), ("x=(", "no regular expression")):
        with pytest.raises(UserError, match=message):
            slices_of(data.described, [spec])
    assert slices_of(data.described, ["none"], required=False) == {}
