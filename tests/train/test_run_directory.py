"""The run directory: one configuration each, metrics that rewind, refusals that write nothing."""

import json

import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.run_directory import RunDirectory, read_metrics


def test_explains_itself_and_rewinds(tmp_path):
    run = RunDirectory(tmp_path / "r", {"lr": 0.1, "seed": 0}, resume=False)
    for step in (1, 2, 3):
        run.log(step, {"loss": 1.0 / step})
    run.close()
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["options"] == {"lr": 0.1, "seed": 0}
    assert config["environment"]["packages"]["jax"]
    with (tmp_path / "r" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')  # cut off by a kill
    (tmp_path / "r" / "signal.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"step"')
    again = RunDirectory(tmp_path / "r", {"lr": 0.1, "seed": 0}, resume=True)
    again.rewind(2)
    assert (tmp_path / "r" / "signal.jsonl").read_text() == '{"step": 2}\n'
    again.log(3, {"loss": 5.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "r")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 5.0),
    ]
    assert list((tmp_path / "r" / "tensorboard").iterdir())


def test_refusals(tmp_path):
    RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=False)
    cases = [
        ("r", {"lr": 0.1}, False, "already holds a run; pass --resume to go on with it, or choose"),
        ("r", {"lr": 0.2}, True, "was started with lr=0.1, now 0.2 is given; resume with the same"),
        ("none", {"lr": 0.1}, True, "holds no run to resume; start it without --resume"),
        ("full", {"lr": 0.1}, False, "exists and is not a run; choose another --out"),
    ]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for name, options, resume, message in cases:
        with pytest.raises(UserError) as e:
            RunDirectory(tmp_path / name, options, resume=resume)
        assert str(e.value).startswith(f"{tmp_path / name} {message}")
    assert not (tmp_path / "none").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
