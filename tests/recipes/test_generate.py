"""`generate` from stored integers: the same text however they are held, packed as they are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling, generate, sample
from jaxdistill.models.hub import load_model
from jaxdistill.models.quantized import save_quantized
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from jaxdistill.recipes.generate import _apply_of, held
from tests import tiny

C = tiny.config(vocab_size=260, eos_token_id=0, bos_token_id=1)
HOW = Sampling(max_new_tokens=12)
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module", params=[True, False], ids=["symmetric", "asymmetric"])
def student(request):
    policy = default_policy(QuantSpec(group_size=32, symmetric=request.param), tied=True)
    return policy, add_scales(tiny.params(C), policy)


def test_packed_integers_give_the_text_of_the_fake_quantized_masters(student):
    policy, masters = student
    apply = make_apply(C, transform=fake_quant_params(policy))
    want = generate(apply, masters, C, PROMPTS, how=HOW)
    floats = generate(make_apply(C), masters, C, PROMPTS, how=HOW)
    stored = quantize_params(masters, policy)

    for weights in ("packed", "int8", "float"):
        apply = _apply_of(C, (), weights)
        got = generate(apply, held(stored, weights), C, PROMPTS, how=HOW)
        assert got == want, weights
    assert want != floats  # four bits are seen in the text


def test_the_float_weights_of_one_layer_exist_at_a_time(student):
    """What the compiled program holds besides its arguments, as the number of layers grows."""
    policy, _ = student
    wide = tiny.params(tiny.config(intermediate_size=512))
    two = quantize_params(add_scales(wide, policy), policy)
    sizes = {}
    for bits in (4, 8):
        for depth in (2, 10):
            c = tiny.config(num_layers=depth, intermediate_size=512)
            kinds = {"int4": jnp.int8, "uint4": jnp.uint8} if bits == 8 else {}
            grown = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(  # one layer's, so many times
                    (depth, *x.shape[1:]),  # noqa: B023
                    kinds.get(x.dtype.name, x.dtype),  # noqa: B023
                ),
                two["layers"],
            )
            rest = {k: v for k, v in two.items() if k != "layers"}
            apply = jax.jit(make_apply(c, transform=dequantize_params))
            compiled = apply.lower(rest | {"layers": grown}, jnp.zeros((1, 4), jnp.int32)).compile()
            sizes[bits, depth] = compiled.memory_analysis().temp_size_in_bytes
    a_layer = 3 * 64 * 512 + 2 * 64 * 64 + 2 * 64 * 32  # weights
    # XLA for CPUs widens 4-bit integers to 8 bits before the loop; no float copy is ever whole.
    assert (sizes[4, 10] - sizes[4, 2]) / 8 < 1.1 * a_layer
    assert (sizes[8, 10] - sizes[8, 2]) / 8 < 0.1 * a_layer


def test_a_held_model_has_the_bytes_of_its_form(student):
    policy, masters = student
    stored = quantize_params(masters, policy)

    def kernel(weights):
        return held(stored, weights)["layers"][1]["mlp"]["up_proj"]["kernel"]

    size = kernel("float").size
    assert kernel("float").nbytes == 4 * size and kernel("bfloat16").nbytes == 2 * size
    assert kernel("int8").q.nbytes == size and kernel("packed").q.nbytes == size // 2


def test_the_verb_answers_the_same_from_every_form(student, tmp_path, capsys):
    policy, masters = student
    tokenizer = tiny.byte_tokenizer()
    save_quantized(tmp_path / "m", C, quantize_params(masters, policy), tokenizer, policy)
    answers = []
    for weights in ("packed", "int8", "float", "bfloat16"):
        arguments = ["--prompt", "hello", "--max-new-tokens", "8", "--weights", weights]
        main(["generate", "--model", str(tmp_path / "m"), *arguments])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] and answers[0].strip() and answers[3].strip()
    logits = load_model(tmp_path / "m").apply_fn()(
        load_model(tmp_path / "m").params, jnp.asarray([PROMPTS[0]])
    )
    forward = make_apply(C, transform=fake_quant_params(policy))
    want = forward(masters, jnp.asarray([PROMPTS[0]])).logits()
    np.testing.assert_allclose(logits.logits(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize("group", [None, 32])
def test_decoding_holds_no_weight_in_another_form(weights, group):
    """Neither the prompt's products nor the loop's keep what they unpack of a layer."""
    policy = default_policy(QuantSpec(group_size=group, ranges="absmax"), tied=True)
    sizes = {}
    for depth in (2, 6):
        config = tiny.config(num_layers=depth, intermediate_size=512)
        stored = quantize_params(add_scales(tiny.params(config), policy), policy)
        apply, how = make_apply(config), Sampling(max_new_tokens=2)

        def written(params, tokens, apply=apply, config=config, how=how):
            key, valid = jax.random.key(0), jnp.ones_like(tokens)
            return sample(apply, config, params, tokens, valid, key, how=how, stop=())

        lowered = jax.jit(written).lower(held(stored, weights), jnp.ones((1, 8), jnp.int32))
        sizes[depth] = lowered.compile().memory_analysis().temp_size_in_bytes
    a_layer = 3 * 64 * 512 + 2 * 64 * 64 + 2 * 64 * 32  # weights; a byte each would be as many
    assert (sizes[6] - sizes[2]) / 4 < 0.15 * a_layer
