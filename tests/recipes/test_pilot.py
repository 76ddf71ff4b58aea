"""`pilot`: every part is there, agrees with the verbs it stands for, and can be gone on with."""

import json
import re
import shlex

import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.cascade_model import CascadeModel
from jaxdistill.recipes import pilot as module
from jaxdistill.recipes.evaluate import Evaluate, evaluate
from jaxdistill.recipes.pilot import Pilot, pilot
from jaxdistill.recipes.pilot_report import advice_of
from tests import tiny

WORDS = (
    "fox dog brown quick over lazy jumps river stone house paper light cloud green seven".split()
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and held-out texts long enough to ask what follows."""
    import numpy as np

    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    model = tiny.save_model(folder / "model", max_position_embeddings=512)
    texts = [" ".join(rng.choice(WORDS, 100 + i).tolist()) for i in range(24)]
    for name, some in (("train", texts[:12]), ("held", texts[12:])):
        lines = (json.dumps({"text": text}) + "\n" for text in some)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {
        "model": model,
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held.jsonl"),
        "steps": 3,
        "batch_size": 2,
        "seq_len": 64,
        "eval_tokens": 0,
        "lr": 1e-3,
        "samples": 2,
    }


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pilot"
    return out, pilot(Pilot(**inputs, out=out))


def test_every_part_is_there(made):
    out, report = made
    assert json.loads((out / "pilot.json").read_text()) == json.loads(json.dumps(report))
    assert report["trained"] and report["made_questions"] and report["steps"] == 3
    assert set(report["seconds"]) == {"ptq", "analysis", "run", "cascade", "all"}
    assert len(report["advice"]) == 5
    page = (out / "index.html").read_text()
    for heading in ("What to do", "Before and after", "Slices", "Side by side", "Cascade", "Cost"):
        assert f"<h2>{heading}</h2>" in page
    for link in ("run/index.html", "analysis/index.html"):
        assert f'href="{link}"' in page and (out / link).is_file()


def test_its_numbers_are_those_of_the_verbs(made, inputs):
    out, report = made
    held = {"data": inputs["eval_data"], "seq_len": 64, "batch_size": 2}
    again = evaluate(Evaluate(model=str(out / "run"), teacher=inputs["model"], **held))
    for name in ("nll", "kl", "agreement"):
        assert report["results"]["student"][name] == pytest.approx(again[name], rel=1e-4)
    alone = evaluate(Evaluate(model=inputs["model"], **held))
    assert report["results"]["teacher"]["nll"] == pytest.approx(alone["nll"], rel=1e-4)
    assert report["results"]["ptq"]["kl"] != pytest.approx(again["kl"], rel=1e-2)
    shown = json.loads((out / "run" / "slices.json").read_text())
    assert set(shown) == {"all", "longest:0.35", "rare_words:0.35"}
    assert report["results"]["student"]["bytes"] < report["results"]["teacher"]["bytes"] / 2
    costs = {n: 1e3 * u["seconds_a_request"] for n, u in report["cost"]["answers"].items()}
    assert report["cascade"]["alone"]["student"]["cost"] == pytest.approx(costs["student"])
    assert costs["student"] < costs["teacher"]
    lines = (out / "questions.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"context", "choices", "label", "text"}
    assert len(lines) == sum(report["cascade"]["questions"].values())
    samples = json.loads((out / "run" / "samples.json").read_text())
    assert [list(s["answers"]) for s in samples] == [["teacher", "PTQ", "student"]] * 2


def test_it_goes_on_where_it_stopped(inputs, tmp_path, monkeypatch):
    out = tmp_path / "pilot"

    def gone(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "cascade", gone)
    with pytest.raises(KeyboardInterrupt):
        pilot(Pilot(**inputs, out=out))
    monkeypatch.undo()
    kept = (out / "run.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run; pass --resume"):
        pilot(Pilot(**inputs, out=out))
    (out / "analysis.json").unlink()  # as if it had been cut off while it wrote
    (out / "analysis" / "signal.json").unlink()
    monkeypatch.setattr(module, "quantize", gone)  # is not needed any more
    report = pilot(Pilot(**inputs, out=out, resume=True))
    assert (out / "run.json").read_bytes() == kept
    assert (out / "analysis" / "signal.json").is_file()
    assert report["results"] == json.loads(kept)["result"]


def test_given_questions_choose_the_threshold(inputs, tmp_path, capsys, monkeypatch):
    rows = [
        {"context": f"{w} {i}", "choices": WORDS[:2], "label": i % 2}
        for i, w in enumerate(WORDS * 2)
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--{k.replace('_', '-')}={v}" for k, v in inputs.items()]
    out = tmp_path / "pilot"
    main(
        ["pilot", *words, "--bits=8", "--slice", "--questions", str(asked)]
        + ["--max-drop=0.3", f"--out={out}", "--json"]
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not report["made_questions"] and report["cascade"]["max_drop"] == 0.3
    assert CascadeModel.load(out / "cascade")("fox 1", WORDS[:2]).choice in (0, 1)
    assert sum(report["cascade"]["questions"].values()) == len(rows)
    assert not report["trained"] and report["analysis"] is None  # 8 bits lose nothing
    assert report["advice"][0].startswith("No training needed: ")
    assert "requests" not in report["advice"][4]  # nothing was trained that could pay
    (export,) = re.findall(r"Next: (.*)", report["advice"][4])
    monkeypatch.chdir(tmp_path)
    main(shlex.split(export)[1:])
    assert (tmp_path / "student.gguf").stat().st_size > 1000
    assert "No slice was watched" in report["advice"][2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0 given; accepted: 1 or more"),
        ({"seq_len": 4096}, "--seq-len 4096 exceeds the 512 positions"),
        ({"price": -1.0}, "--price -1.0 given"),
        ({"seed": -1}, "--seed -1 given; accepted: 0 or more"),
        ({"slice": ("none=zebra",)}, "none"),
        ({"max_drop": 1.5}, "--max-drop 1.5 given; accepted: between 0 and 1"),
        ({"confidence": 0.0}, "--confidence 0.0 given; accepted: between 0 and 1"),
        ({"limit": -1}, "--limit -1 given; accepted: 0 or more"),
        ({"steps": 0}, "--steps 0 given; accepted: 1 or more"),
        ({"device": "abacus"}, "abacus"),
        ({"slice": ("nowhere",)}, "nowhere"),
        ({"questions": "missing.jsonl"}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(changes, message, inputs, tmp_path):
    out = tmp_path / "pilot"
    with pytest.raises(UserError, match=message):
        pilot(Pilot(**(inputs | changes), out=out))
    assert not out.exists()


def result(perplexity: float, kl: float, size: int) -> dict:
    return {"perplexity": perplexity, "kl": kl, "bytes": size}


def test_advice_follows_the_numbers(made):
    _, report = made
    results = {
        "teacher": result(10.0, 0.0, 4_000_000),
        "ptq": result(20.0, 0.8, 1_000_000),
        "student": result(12.0, 0.2, 1_000_000)
        | {
            "against": {"ptq": {"kl": [-0.6, -0.7, -0.5]}},
            "gap_recovered": {"kl": [0.75, 0.7, 0.8]},
        },
    }
    lost, excess = [0.2, 0.1, 0.3], [0.1, -0.2, 0.4]
    many = {
        name: {"items": 14, "metrics": {}, "derived": derived, "detectable": 0.05}
        for name, derived in (("all", {}), ("longest:0.35", {"lost": lost, "excess": excess}))
    }
    said = advice_of(report | {"results": results}, None, many, ["jaxdistill", "quantize"])
    assert said[2] == "No watched slice surely lost more than the others."
    assert "from 10.00 to 20.00; 3 steps brought it to 12.00, 75% of the KL" in said[0]
    assert "4 MB before and 1 after. Next: jaxdistill quantize" in said[4]
    even = {"results": results, "cascade": report["cascade"] | {"student_lost": [0.0, -0.2, 0.2]}}
    few = many | {"longest:0.35": many["longest:0.35"] | {"detectable": 0.5}}
    said = advice_of(report | even, None, few, ["again"])
    assert "0.500 more than the others' 0.100 nats a token; about 350 items" in said[2]
    assert said[3].endswith("cannot be told apart: +0.0% lost (-20.0% to +20.0%).")
    even["cascade"]["student_lost"] = [0.2, 0.1, 0.3]
    assert "told apart" not in advice_of(report | even, None, {}, ["again"])[3]
    hurt = {"against": {"ptq": {"kl": [0.1, 0.05, 0.15]}}}
    worse = results | {"student": result(30.0, 0.9, 1) | hurt}
    said = advice_of(report | {"results": worse}, "the slice 'x' lost most", many, ["again"])
    assert "did not help: KL 0.800 to 0.900. Lower --lr" in said[0]
    assert said[2] == "Mind the rare cases: the slice 'x' lost most."
    assert shlex.split(said[4])[-1] == "again"
