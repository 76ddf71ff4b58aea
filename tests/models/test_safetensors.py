"""Safetensors files against the safetensors package, both ways, and damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxdistill.errors import UserError
from jaxdistill.models.safetensors import DTYPES, SafetensorsFile, write_safetensors


def write_raw(path, header: bytes, data: bytes = b""):
    """Writes a file with this header and data, whatever they are."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_it_reads_what_the_package_writes(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "c": np.array([[-3]], np.int32),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert file.read(name).dtype == array.dtype


def test_the_package_reads_what_it_writes(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array([1, 255], np.uint8),
        "c": np.array([-1.5, 2.0], np.float16),
    }
    tensors = [(name, a.dtype, a.shape) for name, a in arrays.items()]
    assert write_safetensors(tmp_path / "x.safetensors", tensors, arrays.__getitem__) == 30
    back = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("tag", DTYPES)
def test_every_type_comes_back(tag, tmp_path):
    array = np.array([[0, 1, 1]]).astype(DTYPES[tag])
    write_safetensors(tmp_path / "x", [("a", array.dtype, array.shape)], {"a": array}.__getitem__)
    file = SafetensorsFile(tmp_path / "x")
    assert file.entries["a"].tag == tag
    assert file.read("a").dtype == array.dtype
    np.testing.assert_array_equal(file.read("a").astype(float), [[0, 1, 1]])


def test_writing_casts_and_checks_shapes(tmp_path):
    tensors = [("a", np.dtype(ml_dtypes.bfloat16), (2,))]
    write_safetensors(tmp_path / "x", tensors, lambda _: np.array([1.0, 1.001], np.float32))
    assert SafetensorsFile(tmp_path / "x").read("a").astype(np.float32).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"a: \(3,\) was given for shape \(2,\)"):
        write_safetensors(tmp_path / "y", tensors, lambda _: np.zeros(3, np.float32))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    array = np.arange(10, dtype=np.float32)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", array.dtype, array.shape)], {"a": array}.__getitem__)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_safetensors_file_is_refused(header, tmp_path):
    write_raw(tmp_path / "x", header, bytes(4))
    with pytest.raises(UserError, match="is not a safetensors file; fetch it again"):
        SafetensorsFile(tmp_path / "x")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
    ],
)
def test_bytes_that_do_not_fit_the_shape_are_refused(entry, tmp_path):
    write_raw(tmp_path / "x", json.dumps({"a": entry}).encode(), bytes(8))
    with pytest.raises(UserError, match="is damaged: the bytes of a do not fit its shape"):
        SafetensorsFile(tmp_path / "x")


def test_a_missing_file_and_an_unknown_type_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*gone: No such file or directory"):
        SafetensorsFile(tmp_path / "gone")
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    write_raw(tmp_path / "x", json.dumps({"a": entry}).encode(), bytes(1))
    with pytest.raises(UserError, match="a in .*x is stored as F4; accepted: F64, F32"):
        SafetensorsFile(tmp_path / "x").read("a")
