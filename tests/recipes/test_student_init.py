"""What a student starts from, as a user writes it."""

import jax
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.cut import cut_layers, cut_width
from jaxdistill.models.hub import Model
from jaxdistill.models.lora import LORA_FREEZE, merge_lora
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, dequantize_params, quantize_params
from jaxdistill.recipes.student_init import student_from
from tests import tiny

C = tiny.config(num_layers=4)
PARAMS = tiny.params(C)
MODEL = Model(config=C, params=PARAMS, tokenizer=None, source="tiny")


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_without_specs_it_is_the_model_and_a_quantized_one_in_float():
    student = student_from(MODEL, [])
    assert (student.config, student.transform, student.freeze) == (C, None, ())
    assert_same(student.params, PARAMS)
    policy = default_policy(QuantSpec(ranges="absmax"), tied=True)
    stored = quantize_params(add_scales(PARAMS, policy), policy)
    quantized = Model(config=C, params=stored, tokenizer=None, source="tiny")
    want = dequantize_params(stored)
    assert_same(student_from(quantized, []).params, want)
    got = student_from(quantized, ["cut:hidden=48"])
    assert_same(got.params, cut_width(C, want, hidden=48)[1])


def test_cuts_and_adapters_come_one_after_the_other():
    student = student_from(MODEL, ["cut:layers=0/3/1,intermediate=48", "lora:rank=4,alpha=8"], 7)
    config, params = cut_width(*cut_layers(C, PARAMS, [0, 3, 1]), intermediate=48)
    assert student.config == config and student.freeze == (LORA_FREEZE,)
    assert student.transform is merge_lora
    assert_same(merge_lora(student.params), params)
    leaves = dict(walk(student.params))
    scale = leaves["layers/mlp/up_proj/kernel_lora_scale"]
    assert scale.dtype == np.float16 and scale.tolist() == [2.0] * 3
    assert leaves["layers/mlp/up_proj/kernel_lora_a"].shape == (3, 64, 4)
    other = dict(walk(student_from(MODEL, ["lora:rank=4"], 8).params))
    assert student_from(MODEL, ["cut:layers=2,heads=2"]).config.num_layers == 2
    assert not np.array_equal(
        other["layers/mlp/up_proj/kernel_lora_a"][:3], leaves["layers/mlp/up_proj/kernel_lora_a"]
    )


@pytest.mark.parametrize(
    "spec",
    ["prune:layers=2", "cut", "cut:depth=2", "cut:layers", "cut:layers=two", "cut:layers=1/x",
     "lora", "lora:alpha=8", "lora:rank=4,rank=8", "lora:rank=1.5", ""],
)  # fmt: skip
def test_what_is_accepted_is_listed(spec):
    with pytest.raises(UserError) as e:
        student_from(MODEL, [spec])
    assert str(e.value).startswith(f"student init {spec!r} ") and "\n" not in str(e.value)
    assert "accepted: cut:layers=N or A/B/C,intermediate=N,heads=N,hidden=N and lora:" in str(
        e.value
    )


def test_adapters_come_last_and_cuts_fit_the_model():
    with pytest.raises(UserError, match="'cut:layers=2' given after lora"):
        student_from(MODEL, ["lora:rank=4", "cut:layers=2"])
    with pytest.raises(UserError, match="a cut to 5 layers given; accepted: 1 to 4"):
        student_from(MODEL, ["cut:layers=5"])
