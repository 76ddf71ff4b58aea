"""Tests the quantized model on disk: what is read back is what was stored, bit for bit."""

import jax
import numpy as np
import pytest

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
