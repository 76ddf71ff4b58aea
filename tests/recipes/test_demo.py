"""The demo on a tiny model: everything it promises is there, and nobody's files are in danger."""

import json

import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.demo import Demo, demo, write_text
from tests import tiny


def test_demo_leaves_what_it_promises_and_may_run_again(tmp_path, capsys):
    model, out = tiny.save_model(tmp_path / "model"), tmp_path / "demo"
    out.mkdir()
    (out / "demo.json").write_text("{}")  # an earlier demo
    (out / "stale").touch()
    arguments = ["demo", "--model", model, "--out", str(out), "--steps", "2", "--batch-size", "2"]
    arguments += ["--seq-len", "32", "--eval-tokens", "128", "--prompt", "hi", "--json"]
    main(arguments)
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    models = ["teacher", "PTQ absmax", "PTQ MSE", "KD-QAT", "KD-QAT + ov-freeze"]
    assert list(report["results"]) == models
    assert report["results"]["PTQ absmax"] != report["results"]["PTQ MSE"]
    assert report["results"]["KD-QAT"] != report["results"]["KD-QAT + ov-freeze"]
    assert list(report["answers"]) == ["teacher", "PTQ MSE", "KD-QAT + ov-freeze"]
    assert report["seconds"] > 0 and report["peak_mib"] > 0
    assert load_model(report["gguf"]).config.vocab_size == 260
    assert len(list((out / "plots").glob("*.png"))) == 3
    assert not (out / "stale").exists()


def test_text_is_split_by_topic(tmp_path):
    train, held_out = (set(p.read_text().splitlines()) for p in write_text(tmp_path))
    assert len(held_out) > 5 and len(train) > 6 * len(held_out)
    assert not train & held_out


def test_what_is_no_demo_is_left_alone(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    mine = tmp_path / "mine"
    (mine / "text").mkdir(parents=True)
    (mine / "precious").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for out in (mine, tmp_path / "file"):
        with pytest.raises(UserError) as e:
            demo(Demo(model=model, out=out))
        assert str(e.value) == f"{out} exists and is no demo; choose another --out"
    assert (mine / "precious").read_text() == "keep" == (tmp_path / "file").read_text()


def test_bad_model_costs_no_earlier_demo(tmp_path):
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(UserError):
        demo(Demo(model=str(tmp_path / "none.gguf"), out=tmp_path))
    assert (tmp_path / "demo.json").exists()
