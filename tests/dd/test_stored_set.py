"""A synthetic set on disk, read back by us, by safetensors and by datasets; and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.dd.stored_set import StoredSet, load_set, save_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.train.data import load_rows

CLASSES = ("world", "sports", "sci/tech")


def stored(**changes) -> StoredSet:
    rng = np.random.default_rng(0)
    learned = {
        "inputs": jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32),
        "label_logits": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "log_rates": jnp.float32(-1.5),
    }
    fixed = {"labels": jnp.array([0, 2, 1, 0], jnp.int32), "mask": jnp.ones((4, 2), bool)}
    return StoredSet(
        **{
            "synthetic": Synthetic(learned=learned, fixed=fixed),
            "level": "embeddings",
            "method": "meta_gradient",
            "classes": CLASSES,
            "texts": ("one", 'two "quoted"', "drei\nLinien", "四"),
            "settings": {"inner_steps": 7, "fingerprint": "ab12", "inner_rate": 0.05},
            "slices": {"rare": [1, 3], "none": []},
        }
        | changes
    )


def with_learned(**changes) -> StoredSet:
    base = stored()
    learned = base.synthetic.learned | changes
    return stored(synthetic=Synthetic(learned=learned, fixed=base.synthetic.fixed))


def softmax(x):
    shares = np.exp(x)
    return shares / shares.sum(axis=-1, keepdims=True)


def read_with_datasets(path, kind, cache):
    return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))


@pytest.fixture
def folder(tmp_path):
    return save_set(tmp_path / "deep" / "set", stored())


def test_a_set_comes_back_as_it_was(folder):
    before, after = stored(), load_set(folder)
    for field in dataclasses.fields(StoredSet):
        if field.name != "synthetic":
            assert getattr(before, field.name) == getattr(after, field.name)
    for group in ("learned", "fixed"):
        one, other = (getattr(x.synthetic, group) for x in (before, after))
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
            np.testing.assert_array_equal(one[name], other[name])
    assert sorted(os.listdir(folder)) == [
        "checksums.crc32",
        "synthetic.safetensors",
        "train.parquet",
    ]
    assert os.listdir(folder.parent) == ["set"]  # nothing half written beside it


def test_safetensors_and_datasets_read_the_files(folder, tmp_path):
    s = stored()
    arrays = load_file(folder / "synthetic.safetensors")
    np.testing.assert_array_equal(arrays["learned/inputs"], s.synthetic.learned["inputs"])
    rows = read_with_datasets(folder / "train.parquet", "parquet", tmp_path)
    assert rows.features["label"].names == list(CLASSES)
    back = np.array([np.reshape(r["inputs"], r["shape"]) for r in rows], np.float32)
    np.testing.assert_array_equal(back, s.synthetic.learned["inputs"])
    assert rows["label"] == [0, 2, 1, 0] and tuple(rows["text"]) == s.texts
    assert rows["mask"] == [[True, True]] * 4
    probs = softmax(np.asarray(s.synthetic.learned["label_logits"], np.float64))
    np.testing.assert_allclose(rows["label_probs"], probs, atol=1e-6)
    assert load_rows(str(folder))["text"] == list(s.texts or ())


def test_texts_are_rows_that_training_reads(tmp_path):
    batch = Synthetic(learned={}, fixed={"labels": np.array([2, 0, 1, 1], np.int32)})
    s = stored(level="text", synthetic=batch, settings={})
    folder = save_set(tmp_path / "set", s)
    assert sorted(os.listdir(folder)) == [
        "checksums.crc32",
        "synthetic.safetensors",
        "train.jsonl",
    ]
    for rows in (
        load_rows(str(folder)),
        read_with_datasets(folder / "train.jsonl", "json", tmp_path),
    ):
        assert tuple(rows["text"]) == s.texts
        assert rows["label"] == [2, 0, 1, 1] and rows["label_name"][0] == "sci/tech"
        assert rows["label_probs"] == np.eye(3)[[2, 0, 1, 1]].tolist()
    assert load_set(folder).texts == s.texts


def test_without_classes_the_labels_are_the_tasks_own(tmp_path):
    logits = jnp.zeros((2, 5, 9), jnp.bfloat16)
    arrays = {"inputs": jnp.ones((2, 5, 4), jnp.bfloat16), "label_logits": logits}
    s = stored(
        synthetic=Synthetic(learned=arrays, fixed={}), classes=(), texts=None, slices={"a": [1]}
    )
    folder = save_set(tmp_path / "set", s)
    back = load_set(folder).synthetic.learned
    assert back["inputs"].dtype == jnp.bfloat16 and back["label_logits"].shape == (2, 5, 9)
    rows = read_with_datasets(folder / "train.parquet", "parquet", tmp_path)
    assert set(rows.column_names) == {"inputs", "shape"} and rows["inputs"] == [[1.0] * 20] * 2


def test_a_set_is_replaced_whole_and_nothing_else_is(folder):
    save_set(folder, stored(method="herding"))
    assert load_set(folder).method == "herding"
    (folder / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.md; accepted"):
        save_set(folder, stored())
    assert load_set(folder).method == "herding" and (folder / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("at", ["writing", "renaming"])
def test_a_write_that_fails_leaves_the_old_set(folder, monkeypatch, at):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    rename = Path.rename
    if at == "writing":
        monkeypatch.setattr("jaxdistill.dd.stored_set.pq.write_table", full)
    else:
        monkeypatch.setattr(
            Path, "rename", lambda p, to: full() if p.suffix == ".part" else rename(p, to)
        )
    with pytest.raises(UserError, match="No space left"):
        save_set(folder, stored(method="herding"))
    assert load_set(folder).method == "meta_gradient" and os.listdir(folder.parent) == ["set"]


@pytest.mark.parametrize("share", [0, 4, 100, -1])
def test_a_file_cut_off_is_named(folder, share):
    path = folder / "synthetic.safetensors"
    path.write_bytes(path.read_bytes()[:share])
    with pytest.raises(UserError, match=r"is damaged \(synthetic\.safetensors has .* bytes, not "):
        load_set(folder)
    (folder / "checksums.crc32").unlink()
    with pytest.raises(UserError, match=r"synthetic\.safetensors is cut off"):
        load_set(folder)


def test_other_damage_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no synthetic\.safetensors"):
        load_set(tmp_path)
    path = folder / "synthetic.safetensors"
    (folder / "checksums.crc32").unlink()
    arrays = load_file(path)
    head = path.read_bytes()
    text = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"]
    save_file(arrays | {"learned/inputs": np.full((4, 2), np.nan)}, path, metadata=text)
    with pytest.raises(UserError, match=r"safetensors: inputs of the synthetic set is not finite"):
        load_set(folder)
    save_file({k: v for k, v in arrays.items() if "inputs" not in k}, path, metadata=text)
    with pytest.raises(UserError, match="accepted: inputs"):
        load_set(folder)
    save_file(arrays, path, metadata=text | {"set": "{}"})
    with pytest.raises(UserError, match="is damaged"):
        load_set(folder)
    save_file(arrays | {"other": arrays["fixed/labels"]}, path, metadata=text)
    with pytest.raises(UserError, match="is damaged"):
        load_set(folder)
    save_file(arrays, path)
    with pytest.raises(UserError, match="has the format None"):
        load_set(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stored(texts=("one",)), "1 texts given for 4 examples"),
        (lambda: stored(level="text", texts=None), "has no texts"),
        (lambda: stored(slices={"rare": [4]}), r"slice 'rare' names the rows \[4\]"),
        (lambda: stored(settings={"rate": jnp.ones(())}), "JSON cannot hold"),
        (lambda: stored(settings={"rate": float("nan")}), "JSON cannot hold"),
        (lambda: stored(classes=("a", "b")), "label_logits of the shape"),
        (lambda: stored(classes=("a", "b", "a")), "given twice"),
        (lambda: with_learned(inputs=jnp.ones((3, 2))), "one number of rows"),
        (lambda: with_learned(inputs=jnp.full((4, 2), jnp.inf)), "inputs .* is not finite"),
        (lambda: with_learned(log_rates=jnp.float32(jnp.nan)), "log_rates .* is not finite"),
        (lambda: with_learned(log_rates=jnp.zeros((4, 2))), "log_rates of the shape"),
        (
            lambda: stored(
                synthetic=Synthetic(
                    learned={"inputs": jnp.ones((2, 2))}, fixed={"labels": jnp.array([0, 3])}
                ),
                texts=None,
                slices={},
            ),
            "from 0 to 3 given; accepted: one whole number from 0 to 2",
        ),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["synthetic.safetensors", "train.parquet"])
def test_a_flipped_bit_is_named(name, folder):
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"is damaged \({name} has other bytes\)"):
        load_set(folder)
