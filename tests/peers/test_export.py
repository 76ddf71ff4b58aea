"""A whole quantized SmolLM2: written as GGUF, opened by transformers, same logits as trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.export.gguf import write_gguf
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import load_model
from jaxdistill.paths import OV_PATTERN
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
    snap,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "Question: Natalia sold clips to 48 of her friends in April, and half as many in May. "


@pytest.mark.slow
def test_exported_files_give_the_training_forwards_logits(smollm2_path, tmp_path):
    model = load_model(smollm2_path)
    policy = default_policy(QuantSpec(ranges="absmax"), tied=True)
    student = snap(add_scales(model.params, policy), policy, OV_PATTERN)
    stored = quantize_params(student, policy)
    write_gguf(tmp_path / "student.gguf", model.config, stored, model.tokenizer)
    save_hf(tmp_path / "hf", model.config, jax.jit(dequantize_params)(stored), model.tokenizer)

    ids = model.tokenizer(TEXT * 3)["input_ids"][:64]
    training = jax.jit(make_apply(model.config, transform=fake_quant_params(policy)))
    want = np.asarray(training(student, jnp.asarray([ids], jnp.int32)).logits()[0])
    for where, options in ((tmp_path, {"gguf_file": "student.gguf"}), (tmp_path / "hf", {})):
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, **options
        )
        with torch.no_grad():
            got = peer(torch.tensor([ids])).logits[0].numpy()
        worst = float(np.abs(got - want).max())
        print(f"{options or 'hf'}: max abs logit difference {worst:.2e}")
        assert worst < 1e-3
        assert (got.argmax(-1) == want.argmax(-1)).all()
