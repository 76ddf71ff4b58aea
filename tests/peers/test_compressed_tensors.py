"""The compressed-tensors directory, opened by transformers with that package: the same logits."""

import json
import re

import numpy as np
import pytest

from jaxdistill.export.compressed_tensors import write_compressed_tensors
from jaxdistill.export.leaves import pack_words
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hub import load_model
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from tests import stored, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

# Both compute in float32 from equal weights; they sum products in another order.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keeps progress bars of every layer out of the test's output."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


def theirs(directory, ids, **options):
    """Logits of the model as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", **options
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(ids))).logits.float().numpy()


def ours(config, params, ids):
    apply = make_apply(config, transform=dequantize_params)
    run = jax.jit(lambda p, t: apply(p, t).logits())
    return np.asarray(run(jax.tree.map(jnp.asarray, params), jnp.asarray(ids, jnp.int32)))


def worst(got, want):
    """Largest difference, as a share of the largest logit."""
    return float(np.abs(got - want).max() / np.abs(want).max())


IDS = np.random.default_rng(0).integers(0, 96, (2, 24))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("tied", "channel"),
        ("tied", "group 32"),
        ("untied", "group 32"),
        ("wide heads", "channel"),
        ("wide heads", "3 bits"),
        ("qwen3", "8 bits"),
        ("biases", "group 32"),
    ],
)
def test_transformers_gives_our_logits(name, spec, tmp_path):
    config, params = stored.model(name, spec)
    write_compressed_tensors(tmp_path / "out", config, params)
    want = ours(config, params, IDS)
    assert np.abs(want).max() > 0.5  # no flat model
    assert worst(theirs(tmp_path / "out", IDS, dtype="auto"), want) < TOLERANCE


def test_mixed_kinds_of_layers_and_a_float_head_are_read(tmp_path):
    config, params = stored.model("untied", "channel")
    for path, spec in (("mlp/up_proj", "group 32"), ("self_attn/v_proj", "8 bits")):
        other = stored.model("untied", spec)[1]["layers"]
        node = stored.node_of(other, path)
        part, projection = path.split("/")
        params["layers"][part][projection] = node
    kernel = stored.values(params)["layers"]["mlp"]["down_proj"]["kernel"]
    params["layers"]["mlp"]["down_proj"] = {"kernel": kernel}
    want = ours(config, params, IDS)
    for pack_head in (True, False):
        write_compressed_tensors(tmp_path / "out", config, params, pack_head=pack_head)
        assert worst(theirs(tmp_path / "out", IDS, dtype="auto"), want) < TOLERANCE


# The package's releases 0.18 to 0.20 leave the zero points of a model without weights unpacked, so
# that transformers finds the packed ones of another shape; 0.17 loads them. `dequantize` goes
# another way, in the scales' float16, and knows one kind of layer alone, hence the float head.
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("tied", "asymmetric channel"),
        ("untied", "asymmetric group 32"),
        ("wide heads", "asymmetric 8 bits"),
    ],
)
def test_asymmetric_layers_are_read_by_dequantizing(name, spec, tmp_path):
    config, params = stored.model(name, spec)
    write_compressed_tensors(tmp_path / "out", config, params, pack_head=False)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings["quantization_config"]["dequantize"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    got = theirs(tmp_path / "out", IDS, dtype="auto")
    assert worst(got, ours(config, params, IDS)) < 1e-3


@pytest.mark.parametrize("spec", stored.SPECS)
def test_the_package_unpacks_the_very_values(spec, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config, params = stored.model("wide heads", spec)
    write_compressed_tensors(tmp_path / "out", config, params)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(settings).config_groups
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    values = stored.values(params)
    modules = {
        f"model.layers.1.{module}": stored.node_of(values["layers"], path)["kernel"][1].T
        for path, module in stored.PROJECTIONS.items()
    } | {"lm_head": values["lm_head"]["kernel"].T}
    for module, want in modules.items():
        scheme = next(
            g
            for g in groups.values()
            for target in g.targets
            if target in ("Linear", module) or re.match(target.removeprefix("re:"), module)
        )
        parts = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if module in n}
        parts["weight_scale"] = parts["weight_scale"].float()  # as a float32 model holds them
        got = compressor.decompress(parts, scheme)["weight"].numpy()
        assert np.array_equal(got, want), module


@pytest.mark.parametrize("bits", [4, 8])
def test_the_packing_is_the_packages_own(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    u = np.random.default_rng(bits).integers(0, 2**bits, (5, 43), dtype=np.uint8)
    signed = torch.tensor(u.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    want = pack_to_int32(signed, bits).numpy()
    assert np.array_equal(pack_words(u, bits).view(np.int32), want)


def test_tokenizer_and_chat_template_are_read_with_it(tmp_path):
    config, params = stored.model("bytes", "channel")
    tokenizer = tiny.byte_tokenizer()
    write_compressed_tensors(tmp_path / "out", config, params, tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert again("some text")["input_ids"] == tokenizer("some text")["input_ids"]


@pytest.mark.slow
def test_smollm2_gives_the_training_forwards_logits(smollm2_path, tmp_path):
    model = load_model(smollm2_path)
    policy = default_policy(QuantSpec(ranges="absmax"), tied=True)
    student = add_scales(model.params, policy)
    stored_params = quantize_params(student, policy)
    write_compressed_tensors(tmp_path / "out", model.config, stored_params, model.tokenizer)
    text = "Question: Natalia sold clips to 48 of her friends in April, and half as many in May. "
    ids = np.array([model.tokenizer(text * 3)["input_ids"][:64]])
    training = jax.jit(make_apply(model.config, transform=fake_quant_params(policy)))
    want = np.asarray(training(student, jnp.asarray(ids, jnp.int32)).logits())
    got = theirs(tmp_path / "out", ids, dtype="auto")
    print(f"SmolLM2, compressed-tensors: max abs logit difference {np.abs(got - want).max():.2e}")
    assert np.abs(got - want).max() < 1e-3
    assert (got.argmax(-1) == want.argmax(-1)).all()
