"""The signal analysis against transformers: outputs by forward hooks, gradients by torch."""

import jax
import numpy as np
import pytest

from jaxdistill.kd.signal import make_signal
from jaxdistill.kd.signal_sums import PARTS, PROJECTIONS
from jaxdistill.models.hf import load_hf, save_hf
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.golden.make_golden import build, random_tokens  # noqa: E402

SEED, LENGTH = 7, 40  # of 48 tokens the last 8 are padding


def observe(model, tokens, inside, guide=None):
    """Returns every projection's output, logits, and |dL/dW|^2 of the mean over target tokens.

    The loss is transformers' own next-token loss, or with `guide` the KL to its distributions.
    `inside` says by layer and projection which weights get a gradient, [out, in].
    """
    outputs, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for name, part in PARTS.items():
            module = getattr(getattr(layer, part), name)

            def keep(_, __, y, key=(i, name)):
                outputs[key] = y.detach().numpy().astype(np.float64)[:, :LENGTH]

            hooks.append(module.register_forward_hook(keep))
    model.zero_grad()
    ids = torch.from_numpy(tokens.astype(np.int64))
    mask = torch.arange(ids.shape[1]) < LENGTH
    mask = mask.long()[None].expand_as(ids)
    labels = torch.where(mask.bool(), ids, -100)
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    loss = found.loss
    if guide is not None:
        log_q = torch.log_softmax(found.logits[:, : LENGTH - 1], -1)
        log_p = torch.log_softmax(guide[:, : LENGTH - 1], -1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    squares = [
        [
            ((getattr(getattr(layer, part), name).weight.grad * inside[i][name]).double() ** 2)
            .sum()
            .item()
            for name, part in PARTS.items()
        ]
        for i, layer in enumerate(model.model.layers)
    ]
    return outputs, found.logits.detach(), np.asarray(squares), loss.item()


@pytest.mark.parametrize("name", ["llama_bias", "qwen3_head_dim"])
def test_equals_hooks_and_gradients_of_transformers(name, tmp_path):
    build(name, SEED).save_pretrained(tmp_path / "teacher")
    config, teacher = load_hf(tmp_path / "teacher")
    policy = default_policy(QuantSpec(bits=3), tied=config.tie_embeddings, head_group_size=None)
    student, transform = add_scales(teacher, policy), fake_quant_params(policy)
    # The quantized model as a float model of theirs, so that each runs it with its own code.
    save_hf(tmp_path / "student", config, jax.jit(transform)(student))
    theirs = [
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / which, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for which in ("teacher", "student")
    ]

    everywhere = [dict.fromkeys(PROJECTIONS, True)] * config.num_layers
    inside = []  # where straight-through gradients are 1: a clipped weight has none
    for i in range(config.num_layers):
        nodes = {p: student["layers"][part][p] for p, part in PARTS.items()}
        places = {
            p: np.asarray(n["kernel"][i]) / np.asarray(n["kernel_scale"][i], np.float32)
            for p, n in nodes.items()
        }
        inside.append({p: torch.from_numpy(((v >= -4) & (v <= 3)).T) for p, v in places.items()})
    assert 0.9 < np.mean([m.float().mean() for m in inside[0].values()]) < 1

    tokens = random_tokens(SEED)
    real = np.broadcast_to(np.arange(tokens.shape[1]) < LENGTH, tokens.shape)
    batch = {"tokens": tokens, "loss_mask": real.copy(), "segment_ids": real.astype(np.int32)}
    batch["positions"] = np.broadcast_to(np.arange(48, dtype=np.int32), tokens.shape) * real
    batch["positions"] = batch["positions"].astype(np.int32)
    batch["loss_mask"][:, 0] = False
    got = make_signal(config, transform=transform)(teacher, student, [batch])

    out_t, logits, squares_t, nll_t = observe(theirs[0], tokens, everywhere)
    out_s, _, squares_s, nll_s = observe(theirs[1], tokens, inside)
    _, _, squares_kd, kl = observe(theirs[1], tokens, inside, logits)

    def table(function):
        rows = range(config.num_layers)
        return np.asarray([[function((i, p)) for p in PROJECTIONS] for i in rows])

    want = {
        "gradient/teacher": squares_t,
        "gradient/student": squares_s,
        "gradient/student_kd": squares_kd,
        "rms/teacher": table(lambda k: np.sqrt((out_t[k] ** 2).mean())),
        "rms/student": table(lambda k: np.sqrt((out_s[k] ** 2).mean())),
        "sqnr": table(
            lambda k: 10 * np.log10((out_t[k] ** 2).sum() / ((out_t[k] - out_s[k]) ** 2).sum())
        ),
        "nll/teacher": nll_t,
        "nll/student": nll_s,
        "kl": kl,
    }
    for quantity, value in want.items():
        worst = np.max(np.abs(got[quantity] / value - 1))
        print(f"{name} {quantity}: largest relative difference {worst:.1e}")
        np.testing.assert_allclose(got[quantity], value, rtol=2e-4, err_msg=quantity)
    np.testing.assert_allclose(
        got["mean/student"], table(lambda k: out_s[k].mean()), atol=1e-5, err_msg="mean"
    )
    assert got["sqnr"].max() < 30 and got["kl"] > 0.01  # the two models do differ
