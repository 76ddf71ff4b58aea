"""The lattice's forward against qwix's: same weights and float16 scales, same integers, values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, quantize

qarray = pytest.importorskip("qwix._src.core.qarray")


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_and_values_equal_qwix(group, bits):
    w = jax.random.normal(jax.random.key(bits), (128, 24))
    how = qarray.HowToQuantize(
        qtype=jnp.int4 if bits == 4 else jnp.int8,
        channelwise_axes=(1,),
        tiled_axes={} if group is None else {0: group},
    )
    calibration = qarray.calibrate(w, how)
    scale, _ = qarray.compute_scale_zero_point(calibration, how.qtype)
    scale = scale.astype(jnp.float16)  # qwix's own range, at our precision
    theirs = qarray.quantize_with_scale_zero_point(w, how.qtype, scale.astype(jnp.float32), None)
    spec = QuantSpec(bits=bits, group_size=group)
    np.testing.assert_array_equal(
        quantize(w, (scale,), spec).astype(jnp.int32), theirs.qvalue.astype(jnp.int32)
    )
    np.testing.assert_array_equal(fake_quant(w, (scale,), spec), qarray.dequantize(theirs))
