"""The distill job on tiny models: every family through one door, and what it leaves behind."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.models.hub import load_model
from jaxdistill.paths import walk
from jaxdistill.recipes.cache_teacher import CacheTeacher, cache_teacher
from jaxdistill.recipes.distill import Distill, distill
from jaxdistill.recipes.evaluate import Evaluate, evaluate
from tests import tiny

SMALL = {"steps": 6, "batch_size": 2, "seq_len": 32, "lr": 3e-3, "eval_tokens": 256}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    teacher = tiny.save_model(folder / "teacher", num_layers=3)
    other = tiny.save_model(folder / "other", seed=1, num_layers=2, hidden_size=32)
    return teacher, other, tiny.save_text(folder / "text.jsonl")


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_cut_student_learns_and_is_a_model_directory(inputs, tmp_path, capsys):
    teacher, _, data = inputs
    out = tmp_path / "run"
    job = Distill(
        teacher=teacher, data=data, eval_data=data, out=out, student_init=("cut:layers=2",), **SMALL
    )
    results = distill(job)
    assert list(results) == ["teacher", "start", "student"]
    assert results["student"]["kl"] < results["start"]["kl"]
    assert results["teacher"]["bytes"] > results["student"]["bytes"]
    for name in ("config.json", "metrics.jsonl", "results.json", "README.md", "plots/kl.png"):
        assert (out / name).is_file(), name
    assert load_model(out / "student").config.num_layers == 2
    again = evaluate(Evaluate(model=str(out), teacher=teacher, data=data, seq_len=32))
    assert np.isfinite(again["kl"])
    with pytest.raises(SystemExit) as e:
        main(["export", "--run", str(out), "--format", "gguf", "--out", str(tmp_path / "g")])
    assert e.value.code == 2 and "is a float model" in capsys.readouterr().err


def test_families_compose_in_one_run(inputs, tmp_path):
    """Two teachers, weighted tokens, a TAID schedule, hidden states, 4 bits, ov-freeze, batches."""
    teacher, other, data = inputs
    out = tmp_path / "run"
    results = distill(
        Distill(
            teacher=f"{teacher},{other}",
            data=data,
            eval_data=data,
            out=out,
            student_init=("cut:layers=2",),
            objective="taid+0.2*hidden+0.1*ce",
            mixture="confidence",
            token_weight="consensus",
            correction="label_mix:share=0.2",
            bits=4,
            freeze="ov",
            curriculum="teacher",
            accumulate=2,
            **SMALL,
        )
    )
    assert list(results) == ["teacher", "teacher 2", "ptq", "student"]
    rows = metrics_of(out)
    assert all(row["hidden"] > 0 for row in rows)
    assert results["student"]["kl"] < results["ptq"]["kl"]
    ts = [row["taid.t"] for row in rows]
    assert ts[0] == pytest.approx(0.4) and ts == sorted(ts) and ts[-1] > 0.8
    stored = load_model(out)
    assert stored.params["layers"]["mlp"]["up_proj"]["kernel_q"].dtype == "int4"
    assert not any("projections" in path for path, _ in walk(stored.params))


@pytest.fixture(scope="module")
def cache(inputs, tmp_path_factory):
    teacher, _, data = inputs
    out = tmp_path_factory.mktemp("cache") / "cache"
    cache_teacher(
        CacheTeacher(teacher=teacher, data=data, eval_data=data, out=out, k=8, seq_len=32)
    )
    return out


def from_cache(inputs, cache, out, **changes):
    teacher, _, data = inputs
    given = SMALL | {"student": teacher, "bits": 2, "freeze": "ov", "lr": 1e-3} | changes
    return Distill(cache=cache, data=data, eval_data=data, out=out, **given)


@pytest.mark.parametrize("objective", ["reverse_kl", "cakld", "0.9*forward_kl+0.1*ce"])
def test_a_quantized_student_learns_from_the_cache_alone(objective, inputs, cache, tmp_path):
    """KD-QAT from top-k logits on disk: the job gets no teacher."""
    results = distill(from_cache(inputs, cache, tmp_path / "run", objective=objective))
    assert list(results) == ["ptq", "student"]
    rows = metrics_of(tmp_path / "run")
    assert np.mean([r["kl"] for r in rows[-2:]]) < rows[0]["kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 16}, "data"),
        ({"objective": "forward_kl:temperature=2"}, "temperature"),
        ({"objective": "forward_kl+hidden"}, "hidden"),
        ({"top_k": 4}, "--top-k given with --cache"),
        ({"curriculum": "teacher"}, "--curriculum teacher asks a live teacher"),
        ({"student": None}, "no model given; give --teacher, or --cache and --student"),
    ],
)
def test_what_a_cache_cannot_tell_is_refused(changes, message, inputs, cache, tmp_path):
    with pytest.raises(UserError, match=message):
        distill(from_cache(inputs, cache, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_lora_is_quantized_as_its_base_is(inputs, tmp_path):
    """Fresh adapters add nothing, so PTQ with them is PTQ; trained ones are merged and rounded."""
    teacher, _, data = inputs
    given = SMALL | {"steps": 0, "bits": 4}
    job = Distill(teacher=teacher, data=data, eval_data=data, out=tmp_path / "plain", **given)
    plain = distill(job)["ptq"]
    again = dataclasses.replace(
        job, out=tmp_path / "lora", student_init=("lora:rank=4",), steps=2, freeze="ov"
    )
    results = distill(again)
    for name in ("nll", "kl", "agreement", "bytes"):
        assert results["ptq"][name] == pytest.approx(plain[name])
    assert results["student"]["bytes"] == plain["bytes"]
    assert results["student"]["kl"] != pytest.approx(plain["kl"], rel=1e-6)
    kernels = load_model(tmp_path / "lora").params["layers"]["mlp"]["up_proj"]
    assert set(kernels) == {"kernel_q", "kernel_scale"}


def test_a_padded_teacher_writes_no_word_that_the_student_lacks(inputs, tmp_path):
    _, student, data = inputs
    large = tiny.save_model(tmp_path / "large", seed=5, vocab_size=600)
    distill(
        Distill(
            teacher=large,
            student=student,
            data=data,
            eval_data=data,
            out=tmp_path / "r",
            text_from="teacher",
            prompt_length=8,
            objective="ce",
            **(SMALL | {"steps": 1}),
        )
    )
    with np.load(tmp_path / "r" / "teacher_text.npz") as text:
        assert text["tokens"].max() < 260


def test_text_of_the_teacher_and_of_the_student(inputs, tmp_path):
    """Sequence-level text is made once; on-policy answers are the student's; LoRA trains alone."""
    teacher, _, data = inputs
    out = tmp_path / "run"
    job = Distill(
        teacher=teacher,
        data=data,
        eval_data=data,
        out=out,
        student_init=("cut:layers=2", "lora:rank=4"),
        objective="jsd",
        text_from="teacher",
        on_policy=0.5,
        prompt_length=8,
        checkpoint_every=2,
        keep=9,
        **SMALL,
    )
    results = distill(job)
    with np.load(out / "teacher_text.npz") as text:
        assert text["tokens"].shape[1] == 32 and text["loss_mask"][:, 8:].any()
    before, after = load_model(teacher).params, load_model(out).params
    np.testing.assert_array_equal(
        before["embed_tokens"]["embedding"], after["embed_tokens"]["embedding"]
    )
    moved = np.abs(
        after["layers"]["mlp"]["up_proj"]["kernel"]
        - before["layers"]["mlp"]["up_proj"]["kernel"][np.array([0, 2])]
    )
    assert moved.max() > 0
    # Cut off after the checkpoint of step 4, it goes on as if it had not been.
    shutil.copytree(out, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "student")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    again = distill(dataclasses.replace(job, out=tmp_path / "cut", resume=True))
    assert again == results
    assert [r["loss"] for r in metrics_of(tmp_path / "cut")] == [r["loss"] for r in metrics_of(out)]


def test_rationales_weigh_as_asked(tmp_path, inputs):
    teacher, _, _ = inputs
    data = tmp_path / "sums.jsonl"
    rows = [
        {"instruction": f"{a}+1?", "output": str(a + 1), "rationale": f"one more than {a}"}
        for a in range(30)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    job = Distill(
        teacher=teacher,
        data=str(data),
        eval_data=str(data),
        out=out,
        student_init=("cut:layers=2",),
        objective="ce",
        loss_on="completion",
        rationale_weight=0.25,
        **(SMALL | {"seq_len": 64}),
    )
    assert (
        distill(job)["student"]["nll"]
        < distill(dataclasses.replace(job, out=tmp_path / "none", steps=0))["student"]["nll"]
    )


def test_a_teacher_of_another_tokenizer_needs_the_right_objective(inputs, tmp_path):
    teacher, _, data = inputs
    stranger = tiny.save_model(tmp_path / "stranger", seed=3, vocab_size=300)
    shifted = tiny.byte_tokenizer(bos=True)
    shifted.add_tokens(["the quick", " brown"])
    shifted.save_pretrained(stranger)
    job = Distill(
        teacher=stranger, student=teacher, data=data, eval_data=data, out=tmp_path / "r", **SMALL
    )
    with pytest.raises(UserError, match="or use a cross-tokenizer objective"):
        distill(job)
    assert not job.out.exists()
    results = distill(dataclasses.replace(job, objective="uld+0.5*ce"))
    assert list(results) == ["start", "student"]
    assert results["student"]["nll"] < results["start"]["nll"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "no model given; give --teacher, or --cache and --student"),
        ({"student_init": ()}, "the student is the teacher itself, which has nothing to learn"),
        ({"on_policy": 1.5}, "--on-policy 1.5, --sample-temperature 1.0 given; accepted: 0 to 1"),
        ({"on_policy": 0.5, "prompt_length": 32}, "--prompt-length 32 given with --seq-len 32"),
        ({"on_policy": 0.5, "cache": "c", "prompt_length": 8}, "--cache given with generated text"),
        ({"objective": "kl"}, "no objective is named 'kl'; accepted: "),
        ({"student_init": ("cut:layers=9",)}, "9"),
        ({"teacher": None, "student": "t"}, "compares with a teacher; give --teacher or --cache"),
        ({"freeze": "auto"}, "--freeze auto compares a quantized student with"),
        ({"teacher": ","}, "no model given"),
        ({"top_k": 4, "objective": "uld"}, "--top-k given with a cross-tokenizer objective"),
        ({"token_weight": "consensus"}, "consensus compares teachers"),
        ({"token_weight": "certainty:power=1..2"}, "is a ramp; accepted: one number"),
        ({"objective": "forward_kl+relations:heads=5"}, "heads"),
        ({"objective": "policy_gradient"}, "policy_gradient needs text that the student sampled"),
        ({"activation_bits": "8"}, "--activation-bits given for a float student"),
        ({"mixture": "best"}, "no mixture is named 'best'"),
        ({"cache": "nowhere"}, "nowhere holds no teacher cache"),
        ({"attention": "splash"}, "--attention splash given, and the devices are cpus; accepted"),
        ({"attention": "cudnn"}, "by cudnn of float32 numbers given; accepted: bfloat16"),
        ({"attention": "cudnn", "dtype": "bfloat16"}, "it cannot be: cuDNN is not detected."),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(changes, message, inputs, tmp_path):
    teacher, _, data = inputs
    given = {"teacher": teacher, "student_init": ("cut:layers=2",)} | changes
    if "cache" in given:
        given["cache"] = tmp_path / given["cache"]
    with pytest.raises(UserError) as e:
        distill(Distill(data=data, out=tmp_path / "r", **(SMALL | given)))
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "r").exists()


def test_the_command_prints_json(inputs, tmp_path, capsys):
    teacher, _, data = inputs
    main(
        [
            *("distill", "--teacher", teacher, "--data", data, "--out", str(tmp_path / "r")),
            *("--student-init", "cut:layers=1", "--steps", "1", "--batch-size", "2"),
            *("--seq-len", "32", "--objective", "0.9*forward_kl:temperature=4..1+0.1*ce", "--json"),
        ]
    )
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(result) == ["teacher", "start", "student"]
    assert jax.tree.all(jax.tree.map(np.isfinite, result))
