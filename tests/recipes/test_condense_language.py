"""Learned rows for language models: what learning them computes, and training on them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxdistill.cli import main
from jaxdistill.dd.stored_set import load_set, save_set
from jaxdistill.errors import UserError
from jaxdistill.models.cut import cut_layers
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.hub import load_model
from jaxdistill.quant.policy import add_scales, fake_quant_params
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_language import _student_of
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.recipes.distill import distill
from jaxdistill.recipes.learned_rows import learned_rows
from jaxdistill.recipes.options import Distill, Quantization, Quantize, policy_of
from jaxdistill.recipes.prepare import pack_rows
from jaxdistill.recipes.quantize import quantize
from jaxdistill.train.data import batches, load_rows
from jaxdistill.train.run_directory import read_metrics
from tests import tiny

RATE = 0.01
ROWS = {
    "examples": 3,
    "seq_len": 12,
    "inner_steps": 2,
    "inner_rate": RATE,
    "steps": 3,
    "batch_size": 4,
    "checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.save_model(folder / "model", hidden_size=32, intermediate_size=32)
    return model, tiny.save_text(folder / "text.jsonl", rows=2)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run through the command line, of a student of one layer; all that can be learned is."""
    model, data = inputs
    out = tmp_path_factory.mktemp("runs") / "r"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in ROWS.items()]
    options += ["--student-init", "cut:layers=1", "--soft-labels", "--learn-rates"]
    main(["condense", "--data", data, "--model", model, "--out", str(out), *options, "--json"])
    return out


def job(inputs, out, **changes):
    model, data = inputs
    given = ROWS | {"model": model, "student_init": ("cut:layers=1",)} | changes
    return Condense(data=data, out=out, **given)


def training(inputs, data, out, **changes):
    model, text = inputs
    given = {"steps": 4, "batch_size": 3, "seq_len": 32, "lr": RATE, "eval_tokens": 256}
    given |= {"student_init": ("cut:layers=1",), "eval_data": text} | changes
    return Distill(teacher=model, data=str(data), out=out, **given)


def divergence(read, params, batch, answers):
    """The mean KL of a batch, of the places before targets."""
    z = read(params, batch["tokens"], batch["positions"], batch["segment_ids"]).logits()
    p, q = (jax.nn.log_softmax(x[:, :-1]) for x in (answers, z))
    each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    kept = jnp.where(batch["loss_mask"][:, 1:], each, 0.0)
    return jnp.sum(kept) / jnp.sum(batch["loss_mask"][:, 1:], dtype=jnp.float32)


def test_the_first_loss_is_that_of_two_steps_by_hand(inputs, run):
    model, data = inputs
    stored, teacher = load_set(run / "set"), load_model(model).floats()
    packed = pack_rows(load_rows(data), teacher, 12)
    config, params = cut_layers(teacher.config, teacher.params, 1)
    student, guide = make_apply(config), teacher.apply_fn()

    def answers(batch):
        inside = (batch["tokens"], batch["positions"], batch["segment_ids"])
        return guide(teacher.params, *inside).logits()

    rows = {k: jnp.asarray(x[stored.settings["rows"]]) for k, x in packed[:].items()}
    # The rows are embeddings, which stay where the student's own table moves.
    said, table = answers(rows), params["embed_tokens"]["embedding"]
    rows["tokens"] = table[rows["tokens"]]
    for _ in range(2):
        found = jax.grad(lambda p: divergence(student, p, rows, said))(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, found)
    real = batches(packed, batch_size=4, seed=0)[0]
    want = divergence(student, params, jax.tree.map(jnp.asarray, real), answers(real))
    assert read_metrics(run)[0]["loss"] == pytest.approx(float(want), rel=1e-4)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_what_is_stored_and_how_it_is_shown(inputs, run):
    model, data = inputs
    stored, teacher = load_set(run / "set"), load_model(model).floats()
    assert stored.level == "embeddings" and stored.classes == () and stored.has_rows
    learned, fixed = stored.synthetic.learned, stored.synthetic.fixed
    assert set(learned) == {"embeddings", "teacher_logits", "log_rates"}
    assert set(fixed) == {"tokens", "loss_mask", "positions", "segment_ids"}
    rows = pack_rows(load_rows(data), teacher, 12)[:]
    np.testing.assert_array_equal(fixed["tokens"], rows["tokens"][stored.settings["rows"]])
    table = teacher.params["embed_tokens"]["embedding"]
    inside = (fixed["tokens"], fixed["positions"], fixed["segment_ids"])
    starts = {
        "embeddings": table[fixed["tokens"]],
        "teacher_logits": teacher.apply_fn()(teacher.params, *inside).logits(),
        "log_rates": np.full(2, np.log(RATE)),
    }
    for name, start in starts.items():  # three updates of Adam, of at most --lr each
        moved = np.abs(np.asarray(learned[name]) - start).max()
        assert 0.01 < moved < 0.06, name
    assert stored.settings["student_init"] == ["cut:layers=1"] and stored.settings["bits"] == "none"
    assert stored.settings["reading"]["seq_len"] == 12 and stored.settings["inner_steps"] == 2
    # Two small updates do not leave the nearest token.
    first = teacher.text_tokenizer().decode(np.asarray(fixed["tokens"][0]).tolist())
    assert stored.texts[0] == first and len(stored.texts) == 3
    readme = (run / "README.md").read_text()
    assert first.strip()[:8] in readme
    assert "--student-init cut:layers=1 --data" in readme and "tokens nearest" in readme
    result = json.loads((run / "results.json").read_text())
    assert result["examples"] == 3 and result["level"] == "embeddings"
    assert (run / "plots" / "outer_loss.png").is_file()


def test_a_run_cut_off_ends_as_one_that_was_not(inputs, run, tmp_path):
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "set")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "3")
    again = job(inputs, tmp_path / "cut", soft_labels=True, learn_rates=True, resume=True)
    condense(again)
    one, other = (load_set(path / "set").synthetic.batch() for path in (run, tmp_path / "cut"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_a_quantized_student_is_the_model_on_its_lattice(inputs, tmp_path):
    model, o = load_model(inputs[0]).floats(), job(inputs, tmp_path, bits=2, student_init=())
    student, params = _student_of(o, model)
    policy = policy_of(Quantization(bits=2), model)
    whole = make_apply(model.config, transform=fake_quant_params(policy))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    want = whole(add_scales(model.params, policy), tokens).logits()
    np.testing.assert_array_equal(student(params, tokens).logits(), want)


def test_a_quantized_student_reads_the_rows_and_their_answers(inputs, run, tmp_path):
    """KD-QAT on the rows alone; the first step's KL is that of the rows, by hand."""
    model, text = inputs
    o = Quantize(
        model=model,
        data=str(run),
        eval_data=text,
        out=tmp_path / "q",
        bits=2,
        freeze="none",
        objective="cakld",
        batch_size=3,
        seq_len=32,
        steps=6,
        lr=RATE,
        eval_tokens=256,
        eval_every=6,
        signal_every=-1,
        checkpoint_every=-1,
    )
    results = quantize(o)
    assert results["student"]["kl"] < results["ptq"]["kl"]
    teacher, rows = load_model(model).floats(), load_set(run / "set").synthetic.batch()
    policy = policy_of(o, teacher)
    student = make_apply(teacher.config, transform=fake_quant_params(policy))
    read = {**rows, "tokens": rows["embeddings"]}
    want = divergence(student, add_scales(teacher.params, policy), read, rows["teacher_logits"])
    seen = read_metrics(tmp_path / "q")
    assert seen[0]["kl"] == pytest.approx(float(want), rel=1e-3)
    logits = np.asarray(rows["teacher_logits"], np.float64)[:, :-1]
    top = np.exp(log_softmax(logits, axis=-1).max(-1))
    mean = top[np.asarray(rows["loss_mask"])[:, 1:]].mean()
    assert learned_rows(str(run)).confidence() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_data": None}, "give --eval-data"),
        ({"batch_size": 4}, "--batch-size 4 given for the 3 rows"),
        ({"on_policy": 0.5, "prompt_length": 4}, "--on-policy given with the learned rows"),
        ({"text_from": "teacher", "prompt_length": 4}, "--text-from given with the learned"),
        ({"curriculum": "length"}, "--curriculum given with the learned rows"),
        ({"top_k": 4}, "--top-k given with the learned rows"),
        ({"objective": "forward_kl+hidden"}, "--objective hidden given with the learned rows"),
        ({"objective": "uld"}, "--objective uld given with the learned rows"),
        ({"student_init": ("cut:hidden=16",)}, "student is 16 wide"),
        ({"teacher": "other"}, "was learned of .* of the fingerprint"),
        ({"student": "other"}, "has another table than"),
    ],
)
def test_what_learned_rows_cannot_serve_is_refused(changes, message, inputs, run, tmp_path):
    if "other" in changes.values():
        other = tiny.save_model(tmp_path / "o", 3, hidden_size=32, intermediate_size=32)
        changes = dict.fromkeys(changes, other)
    with pytest.raises(UserError, match=message) as error:
        distill(dataclasses.replace(training(inputs, run, tmp_path / "r"), **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_init": ()}, "give --student-init or --bits"),
        ({"model": None}, "give --model"),
        ({"examples": 400}, "--examples 400 given, and data"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"seq_len": 129}, "exceeds the 128 positions"),
        ({"student_init": ("lora:rank=2",)}, "leave out lora"),
        ({"student_init": ("cut:hidden=16",)}, "makes a student of width 16"),
        ({"slice": ("a=b",), "per_slice": 1}, "--slice given with rows"),
        ({"architecture": "mlp"}, "--architecture given with rows"),
        ({"start": "noise"}, "--start given with rows"),
        ({"networks": 2}, "--networks given with rows"),
        ({"method": "kernel-ridge"}, "given for plain text"),
        ({"method": "random", "steps": 400}, "--student-init given, which is of the student"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(changes, message, inputs, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        condense(job(inputs, tmp_path / "r", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_damaged_rows_are_named(run, tmp_path):
    stored = load_set(run / "set")
    fixed, learned = stored.synthetic.fixed, stored.synthetic.learned

    def refused(message, group, **changes):
        arrays = {"learned": learned, "fixed": fixed}
        arrays[group] = {k: x for k, x in (arrays[group] | changes).items() if x is not None}
        with pytest.raises(UserError, match=message):
            dataclasses.replace(stored, synthetic=stored.synthetic.replace(**arrays))

    refused("have no tokens", "fixed", tokens=None)
    refused("rows of the shapes", "fixed", positions=fixed["positions"][:, :5])
    refused("rows of the shapes", "learned", embeddings=learned["embeddings"][..., 0])
    refused("tokens of the type int32 from", "fixed", tokens=fixed["tokens"] + 200)
    refused("no place of the rows is a target", "fixed", loss_mask=fixed["loss_mask"] & False)
    refused("embeddings .* is not finite", "learned", embeddings=learned["embeddings"] + jnp.inf)
    narrow = stored.synthetic.replace(
        learned=learned | {"embeddings": learned["embeddings"][..., :7]}
    )
    save_set(tmp_path / "set", dataclasses.replace(stored, synthetic=narrow))
    with pytest.raises(UserError, match="is damaged: condense again"):
        model = stored.settings["reading"]["model"]
        distill(training((model, model), tmp_path, tmp_path / "r"))
    with pytest.raises(SystemExit) as e:
        main(["evaluate-set", "--set", str(run), "--test", model])
    assert e.value.code == 2
