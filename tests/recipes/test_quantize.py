"""The main job on a tiny model: what it leaves behind, that it resumes, exports and evaluates."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.compare import compare, summarize
from jaxdistill.models.hub import load_model
from jaxdistill.paths import walk
from jaxdistill.quant.policy import dequantize_params
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.recipes.run_report import warnings_of
from jaxdistill.train.checkpoint import Checkpoints
from tests import tiny

SMALL = {"steps": 6, "batch_size": 2, "seq_len": 32, "lr": 1e-3, "group_size": 32}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.save_model(folder / "model"), tiny.save_text(folder / "text.jsonl")


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    model, data = inputs
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, quantize(Quantize(model=model, data=data, out=out, **SMALL))


def test_run_directory_explains_itself(run):
    out, results = run
    for name in ("config.json", "metrics.jsonl", "results.json", "README.md", "student"):
        assert (out / name).exists(), name
    assert {p.name for p in (out / "plots").iterdir()} == {"loss.png", "kl.png", "recovered.png"}
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results) == ["teacher", "ptq", "student"]
    for result in results.values():
        assert {"nll", "perplexity", "kl", "agreement", "bytes", "tokens"} <= result.keys()
    assert results["teacher"]["bytes"] > 2 * results["student"]["bytes"]
    assert results["student"]["kl"] < results["ptq"]["kl"]


def test_stored_student_is_the_trained_forward(run, inputs):
    """The evaluation of the run directory, read back from disk, is the run's own result."""
    from jaxdistill.recipes.evaluate import Evaluate, evaluate

    out, results = run
    model, data = inputs
    rows = [line for i, line in enumerate(Path(data).read_text().splitlines()) if i % 20 == 19]
    held = out.parent / "held.jsonl"
    held.write_text("\n".join(rows) + "\n")
    again = evaluate(Evaluate(model=str(out), teacher=model, data=str(held), seq_len=32))
    for name in ("nll", "kl", "agreement", "tokens"):
        assert again[name] == pytest.approx(results["student"][name], rel=1e-5), name


def test_exports_hold_the_stored_values(run, tmp_path, capsys):
    out, _ = run
    main(["export", "--run", str(out), "--format", "hf", "--out", str(tmp_path / "hf")])
    main(["export", "--run", str(out), "--format", "gguf", "--out", str(tmp_path / "m.gguf")])
    want = dict(walk(jax.jit(dequantize_params)(load_model(out).params)))
    for path in (tmp_path / "hf", tmp_path / "m.gguf"):
        got = dict(walk(load_model(path).params))
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{path.name} {name}")
    assert capsys.readouterr().out.split() == [str(tmp_path / "hf"), str(tmp_path / "m.gguf")]


def test_every_option_of_the_quantizer_composes(inputs, tmp_path, capsys):
    """AWQ start, learned asymmetric ranges, 8-bit activations, the analysed freeze, looks."""
    from jaxdistill.recipes.evaluate import Evaluate, evaluate

    model, data = inputs
    out = tmp_path / "r"
    job = Quantize(
        model=model,
        data=data,
        eval_data=data,
        out=out,
        ptq="awq",
        asymmetric=True,
        learn_ranges=True,
        activation_bits="8",
        freeze="auto",
        signal_every=2,
        eval_tokens=0,
        **SMALL,
    )
    results = quantize(job)
    assert "freeze: " in capsys.readouterr().err
    assert results["student"]["kl"] < results["ptq"]["kl"]
    # The student read back from disk, activations quantized, is the one that was judged.
    again = evaluate(Evaluate(model=str(out), teacher=model, data=data, seq_len=32))
    assert again["kl"] == pytest.approx(results["student"]["kl"], rel=1e-4)
    stored = load_model(out)
    assert stored.params["layers"]["mlp"]["up_proj"]["kernel_q"].dtype == "uint4"
    assert stored.activations[0][1].bits == 8
    bare = evaluate(Evaluate(model=model, teacher=str(out), data=data, seq_len=32))
    assert bare["kl"] != pytest.approx(again["kl"], rel=1e-3)

    looks = [json.loads(line) for line in (out / "signal.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [2, 4, 6]
    for look in looks:
        for name in ("gradient", "rms", "sqnr", "clipped", "flips"):
            assert np.isfinite(look[name]).all() and np.shape(look[name]) == (2, 7), name
        assert 0 < np.mean(look["flips"]) < 0.5 and np.min(look["gradient"]) > 0
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged[1]["signal/v_proj/sqnr"] == pytest.approx(np.mean(looks[0]["sqnr"], 0)[2])


@pytest.fixture(scope="module")
def window(inputs, tmp_path_factory):
    """A run whose ov-freeze is released after three of six steps."""
    model, data = inputs
    out = tmp_path_factory.mktemp("window") / "run"
    job = Quantize(
        model=model, data=data, out=out, freeze_stop=3, checkpoint_every=2, keep=9, **SMALL
    )
    return job, quantize(job)


def load_checkpoint(run, step):
    with Checkpoints(run / "checkpoints") as saved:
        like = jax.tree.map(
            lambda m: jax.numpy.zeros(m.shape, m.dtype),
            saved._orbax.metadata(step).metadata,
            is_leaf=lambda m: hasattr(m, "shape"),
        )
        return saved._orbax.load(step, like)


def test_what_a_window_froze_is_released(window):
    job, _ = window
    kernels = {}
    for step in (2, 3, 4, 6):
        attention = load_checkpoint(job.out, step)["params"]["layers"]["self_attn"]
        kernels[step] = {x: np.asarray(attention[f"{x}_proj"]["kernel"]) for x in "qv"}
    np.testing.assert_array_equal(kernels[2]["v"], kernels[3]["v"])
    assert (kernels[4]["v"] != kernels[3]["v"]).mean() > 0.5
    assert (kernels[6]["v"] != kernels[4]["v"]).mean() > 0.5
    assert (kernels[3]["q"] != kernels[2]["q"]).mean() > 0.5


@pytest.mark.parametrize("last", [2, 3, 4])
def test_a_window_resumes_from_either_side_of_its_release(window, last, tmp_path):
    job, results = window
    shutil.copytree(job.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    for step in (2, 3, 4, 6):
        if step > last:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    again = quantize(dataclasses.replace(job, out=tmp_path / "run", resume=True))
    assert again == results


def test_a_freeze_that_leaves_nothing_is_named(inputs, tmp_path):
    job = Quantize(model=inputs[0], data=inputs[1], out=tmp_path / "r", freeze="weights", **SMALL)
    with pytest.raises(UserError) as e:
        quantize(job)
    assert str(e.value) == (
        "--freeze weights leaves nothing to train; give fewer patterns, or --learn-ranges"
    )
    assert not (tmp_path / "r").exists()


def test_steps_zero_is_plain_ptq(inputs, tmp_path):
    model, data = inputs
    options = SMALL | {"steps": 0}
    results = quantize(Quantize(model=model, data=data, out=tmp_path / "r", **options))
    assert results["student"] == results["ptq"]
    assert load_model(tmp_path / "r").config.vocab_size == 260


def test_a_quantized_model_may_be_the_teacher(run, inputs, tmp_path):
    """On the same values an 8-bit student of a 4-bit teacher loses almost nothing."""
    out, _ = run
    options = SMALL | {"steps": 0, "bits": 8}
    results = quantize(Quantize(model=str(out), data=inputs[1], out=tmp_path / "r", **options))
    assert results["ptq"]["kl"] < 0.01 and results["ptq"]["agreement"] > 0.9


def test_fewer_bits_are_fewer_bytes(inputs, tmp_path):
    sizes = []
    for bits in (2, 3, 4, 8):
        options = SMALL | {"steps": 0, "bits": bits}
        job = Quantize(model=inputs[0], data=inputs[1], out=tmp_path / str(bits), **options)
        sizes.append(quantize(job)["ptq"]["bytes"])
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert [b - a for a, b in zip(sizes, sizes[1:], strict=False)] == [
        weights // 8,
        weights // 8,
        weights // 2,
    ]


def test_failures_before_training_write_nothing(inputs, tmp_path):
    model, data = inputs
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="the held-out data have no target token"):
        quantize(
            Quantize(model=model, data=data, eval_data=str(short), out=tmp_path / "r", **SMALL)
        )
    assert not (tmp_path / "r").exists()
    with pytest.raises(UserError, match="exists and is not a run; choose another --out"):
        quantize(Quantize(model=model, data=data, out=Path(model), **SMALL))
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="cannot be written"):
        quantize(Quantize(model=model, data=data, out=tmp_path / "file" / "r", **SMALL))


def test_warnings_say_when_training_was_needless_or_hurt():
    random = np.random.default_rng(0)

    def evaluation(nll, kl, noise):
        tokens = np.full(30, 100.0)
        drawn = random.normal(0, noise, (2, 30))
        return summarize(
            {
                "nll": ((nll + drawn[0]) * tokens, tokens),
                "kl": ((kl + drawn[1]) * tokens, tokens),
            }
        )

    def said(ptq, student, noise):
        results = {"teacher": evaluation(2.0, 0.0, 0.0), "ptq": evaluation(*ptq, noise)}
        results["student"] = evaluation(*student, noise)
        compare(results, "ptq")
        return warnings_of(results), results

    good, bad = (2.005, 0.1), (2.7, 0.3)
    assert said(bad, good, 1e-4)[0] == []
    warnings, results = said(good, bad, 1e-4)
    assert "no training needed" in warnings[0]
    assert warnings[1].startswith("held-out KL ended at 0.3") and "above PTQ's 0.1" in warnings[1]
    assert results["student"]["against"]["ptq"]["kl"] == pytest.approx([0.2, 0.2, 0.2], abs=1e-3)
    noise, results = said(good, bad, 2.0)  # the rows do not tell these models apart
    assert noise == [] and results["student"]["gap_recovered"]["nll"] is None


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(inputs, tmp_path):
    """Kill -9 in mid-run, resume: every parameter, moment and metric as in a run left alone."""
    model, data = inputs
    command = ["quantize", "--model", model, "--data", data, "--steps", "24", "--batch-size", "2"]
    command += ["--seq-len", "32", "--group-size", "32", "--lr", "1e-3", "--checkpoint-every", "4"]
    command += ["--signal-every", "-1", "--eval-tokens", "64"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out, *more):
        return subprocess.Popen(
            [*(sys.executable, "-c", "from jaxdistill.cli import main; main()")]
            + [*command, "--out", str(out), *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main([*command, "--out", str(whole)])
    process, began = start(cut), time.monotonic()
    checkpoints = cut / "checkpoints"
    while not [p for p in checkpoints.glob("*") if p.name.isdigit() and int(p.name) >= 8]:
        assert process.poll() is None and time.monotonic() - began < 300
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "student").exists()
    assert start(cut, "--resume").wait(300) == 0

    final = []
    for out in (whole, cut):
        with Checkpoints(out / "checkpoints") as saved:
            assert saved.latest == 24
            shapes = saved._orbax.metadata(24).metadata
            like = jax.tree.map(
                lambda m: jax.numpy.zeros(m.shape, m.dtype),
                shapes,
                is_leaf=lambda m: hasattr(m, "shape"),
            )
            final.append(saved._orbax.load(24, like))
    leaves = [jax.tree_util.tree_leaves_with_path(state) for state in final]
    assert len(leaves[0]) == len(leaves[1]) > 20
    for (path, a), (_, b) in zip(*leaves, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    results = [json.loads((out / "results.json").read_text()) for out in (whole, cut)]
    assert results[0] == results[1]
    rows = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, cut)]
    losses = [[json.loads(row)["loss"] for row in part] for part in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0 given; accepted: 1 or more"),
        ({"accumulate": 3}, "--accumulate 3 does not divide --batch-size 8; choose a divisor"),
        ({"seed": -1}, "--seed -1 given; accepted: 0 or more"),
        (
            {"weight_decay": -0.1},
            "--weight-decay -0.1 given; accepted: 0 or more",
        ),
        (
            {"lr": float("nan")},
            "--lr nan given; accepted: above 0, and finite",
        ),
        (
            {"objective": "forward_kl:temperature=0"},
            "forward_kl:temperature is 0.0; accepted: above 0",
        ),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(UserError) as e:
        Quantize(model="m", data="d", out=tmp_path, **options)
    assert str(e.value) == message


def test_slices_are_watched_and_rare_texts_mixed_in(inputs, tmp_path, capsys):
    model, data = inputs
    rare = tmp_path / "rare.jsonl"
    rare.write_text(json.dumps({"text": "over the fox row 7"}) + "\n")
    given = {"model": model, "data": data, "eval_data": data, "out": tmp_path / "run"}
    asked = {"slice": ("seven=row [0-9]*7", "longest:0.2"), "mix": (f"{rare}:0.25",)}
    quantize(Quantize(**given, **asked, **(SMALL | {"steps": 2})))
    slices = json.loads((tmp_path / "run" / "slices.json").read_text())
    assert {name: of["items"] for name, of in slices.items()} == {
        "all": 40,
        "seven": 4,
        "longest:0.2": 8,
    }
    for of in slices.values():
        assert list(of["metrics"]) == ["teacher", "ptq", "student"]
        assert {"lost", "gap_recovered"} <= set(of["derived"])
    assert "excess" in slices["seven"]["derived"] and "excess" not in slices["all"]["derived"]
    readme = (tmp_path / "run" / "README.md").read_text()
    assert "| seven | 4 |" in readme and "| slices.json |" in readme
    assert "seven" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice": ("none=zebra",)}, "--slice none holds none of the 2 held-out texts"),
        ({"slice": ("topic",)}, "--slice topic given for data"),
        ({"mix": ("rare.jsonl",)}, "--mix rare.jsonl given; accepted: FILE:RATE"),
        ({"mix": ("nowhere.jsonl:0.1",)}, "nowhere.jsonl"),
    ],
)
def test_bad_slices_and_mixes_write_nothing(changes, message, inputs, tmp_path):
    model, data = inputs
    with pytest.raises(UserError) as e:
        quantize(Quantize(model=model, data=data, out=tmp_path / "r", **(SMALL | changes)))
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "r").exists()
