"""Tests the quantized model on disk: what is read back is what was stored, bit for bit."""

import jax
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models import quantized
from jaxdistill.models.quantized import load_quantized, save_quantized
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy
from tests import stored


@pytest.mark.parametrize("spec", stored.SPECS)
def test_every_stored_form_is_read_back_bit_for_bit(spec, tmp_path):
    config, params = stored.model("untied", spec)
    save_quantized(tmp_path / "m", config, params, None, default_policy(QuantSpec(), tied=False))
    again, got, tokenizer = load_quantized(tmp_path / "m")
    assert again == config and tokenizer is None
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), path


def test_a_flipped_bit_is_named_and_a_directory_without_checksums_is_read(tmp_path):
    config, params = stored.model("untied", "channel")
    save_quantized(tmp_path / "m", config, params, None, default_policy(QuantSpec(), tied=False))
    arrays = max((p for p in tmp_path.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    for file in (arrays, tmp_path / "m" / "config.json"):
        good = file.read_bytes()
        file.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
        with pytest.raises(UserError, match=f"m is damaged .*{file.name} has other bytes"):
            load_quantized(tmp_path / "m")
        file.write_bytes(good)
    (tmp_path / "m" / "notes.txt").write_text("mine")  # what is added does not count
    assert load_quantized(tmp_path / "m")[0] == config
    (tmp_path / "m" / "checksums.crc32").unlink()
    assert load_quantized(tmp_path / "m")[0] == config


def test_a_student_that_does_not_read_back_is_not_stored(tmp_path, monkeypatch):
    config, params = stored.model("untied", "channel")
    monkeypatch.setattr(quantized, "read_back", lambda load, tree: "w has other values")
    policy = default_policy(QuantSpec(), tied=False)
    with pytest.raises(UserError, match="does not read back .w has other values"):
        save_quantized(tmp_path / "m", config, params, None, policy)
    assert not (tmp_path / "m").exists()
