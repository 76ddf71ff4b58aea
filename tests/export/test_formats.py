"""What is told of a format beforehand is what its writer does."""

import dataclasses
import itertools
import re

import pytest
from tokenizers import Tokenizer, models

from jaxdistill.errors import UserError
from jaxdistill.export.compressed_tensors import write_compressed_tensors
from jaxdistill.export.formats import check_format, format_problem
from jaxdistill.export.gguf import write_gguf
from jaxdistill.export.mlx import write_mlx
from jaxdistill.models.hub import load_config
from jaxdistill.models.tokenizer import Tokenizer as Fast
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import Policy, default_policy
from tests import stored, tiny
from tests.gguf_files import float_params

WRITERS = {"gguf": write_gguf, "compressed-tensors": write_compressed_tensors, "mlx": write_mlx}
SPECS = {
    "channel": QuantSpec(),
    "group 32": QuantSpec(group_size=32),
    "group 16": QuantSpec(group_size=16),
    "asymmetric": QuantSpec(group_size=32, symmetric=False),
    "8 bits": QuantSpec(bits=8, group_size=32),
}
DIVIDE_48 = ("channel", "group 16")
SHAPES = {"even": {}, "48 inside": {"intermediate_size": 48}, "untied": {"tie_embeddings": False}}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [*itertools.product(("even", "untied"), SPECS), *itertools.product(["48 inside"], DIVIDE_48)],
)
def test_a_problem_is_told_just_where_the_writer_refuses(shape, spec, format, tmp_path):
    config = tiny.config(vocab_size=260, **SHAPES[shape])
    asked = SPECS[spec]
    policy = default_policy(asked, tied=config.tie_embeddings)
    params = stored.stored(
        float_params(config), group=asked.group_size, bits=asked.bits, symmetric=asked.symmetric
    )
    try:
        WRITERS[format](tmp_path / "out", config, params, tiny.byte_tokenizer())
        refused = False
    except UserError:
        refused = True
    problem = format_problem(format, config, policy, tiny.byte_tokenizer())
    assert (problem is not None) == refused, problem


def test_172_inputs_fit_neither_gguf_nor_mlx():
    """The hidden layers of stories260K."""
    config = tiny.config(intermediate_size=172)
    policy = default_policy(QuantSpec(), tied=True)
    for format in ("gguf", "mlx"):
        line = f"--format {format} .* mlp/down_proj/kernel has 172 inputs .*; accepted: compressed"
        with pytest.raises(UserError, match=re.sub(" mlp", " layers/mlp", line)):
            check_format(format, config, policy)
    check_format("compressed-tensors", config, policy)
    check_format("hf", config, None)


def test_a_float_student_has_nothing_to_pack():
    for format in ("compressed-tensors", "mlx"):
        with pytest.raises(UserError, match="is quantized; accepted: gguf, hf"):
            check_format(format, tiny.config(), None)


def test_a_head_that_is_not_packed_does_not_count():
    policy = Policy(rules=((r"^lm_head/kernel$", QuantSpec(bits=8, group_size=32)),))
    config = tiny.config(tie_embeddings=False)
    assert format_problem("compressed-tensors", config, policy) is None
    assert format_problem("compressed-tensors", config, policy, pack_head=False)


def test_a_tokenizer_that_gguf_cannot_name_is_told():
    policy = default_policy(QuantSpec(group_size=32), tied=True)
    words = Fast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert "WordLevel" in (format_problem("gguf", tiny.config(), policy, words) or "")
    assert format_problem("mlx", tiny.config(), policy, words) is None


def test_large_models_fit_every_format():
    config = load_config("llama-2-7b")
    policy = default_policy(QuantSpec(group_size=128), tied=config.tie_embeddings)
    assert not any(format_problem(f, config, policy) for f in ("gguf", "mlx", "hf"))
    odd = dataclasses.replace(config, intermediate_size=11009)
    assert format_problem("gguf", odd, default_policy(QuantSpec(), tied=False))
