"""The loop: NaN stops it with the last good checkpoint kept, and a resumed run is the same run."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxdistill import _progress
from jaxdistill.errors import UserError
from jaxdistill.kd.step import TrainState
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.guard import Guard
from jaxdistill.train.loop import Look, train
from jaxdistill.train.run_directory import RunDirectory, read_metrics


class Data:
    """Batch i is a function of i, as grain's data sets are."""

    def __getitem__(self, i):
        return {"tokens": np.full((2, 4), i, np.int32)}


def updated(w, i):
    return w * 1.5 + i


def step_of(bad, during_step, during_batch, empty=()):
    def step(state, teacher, batch):
        i = int(batch["tokens"][0, 0])
        for actions, at in ((during_step, int(state.step) + 1), (during_batch, i)):
            actions.get(at, lambda: None)()
        loss = jnp.asarray(np.nan if i in bad else 1.0 / (i + 1), jnp.float32)
        one = jnp.ones(())
        params = {"w": updated(state.params["w"], i)}
        new = TrainState(step=state.step + 1, params=params, opt_state=state.opt_state)
        count = one * float(i not in empty)
        return new, {"loss": (loss * count, count), "grad_norm": (one, one)}

    return step


def fresh():
    return TrainState(step=jnp.zeros((), jnp.int32), params={"w": jnp.ones(3)}, opt_state=())


def params_after(numbers):
    """The params that batches of these numbers make."""
    w = fresh().params["w"]
    for i in numbers:
        w = updated(w, i)
    return w


def go(
    path,
    steps,
    bad=(),
    resume=False,
    checkpoint_every=2,
    guard=Guard(),  # noqa: B008
    during_step={},  # noqa: B006  what to do in a step, by its number
    during_batch={},  # noqa: B006
    during_look={},  # noqa: B006
    console=None,
    empty=(),
):
    def look(step, params):
        during_look.get(step, lambda: None)()
        return {"eval/kl": float(params["w"][0])}

    with RunDirectory(path, {"steps": 9}, resume=resume) as run:
        return train(
            step_of(bad, during_step, during_batch, empty),
            fresh(),
            None,
            Data(),
            steps=steps,
            run=run,
            fingerprint="f",
            resume=resume,
            checkpoint_every=checkpoint_every,
            guard=guard,
            looks=[Look(3, look), Look(4, lambda step, _: {"number": step}, at_end=False)],
            console=console or Console(stderr=True, quiet=True),
        )


def timeless(path):
    """A run's metrics without its clock's."""
    rows = read_metrics(path)
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_batch_without_a_target_logs_no_metric_and_does_not_move_the_guard(tmp_path):
    """Many losses of 0 would make the first ordinary one a spike."""
    go(tmp_path / "r", 4, empty=[1, 2])
    rows = timeless(tmp_path / "r")
    assert [sorted(set(row) & {"loss", "grad_norm"}) for row in rows] == [
        ["grad_norm", "loss"],
        [],
        [],
        ["grad_norm", "loss"],
    ]
    guard = Guard(spike_sigma=10)
    go(tmp_path / "s", 66, empty=range(64), guard=guard)
    go(tmp_path / "s", 70, empty=range(64), guard=guard, resume=True)
    assert len(read_metrics(tmp_path / "s")) == 70


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError) as e:
        go(tmp_path / "r", 9, bad=[5])
    assert str(e.value) == (
        "loss nan, gradient norm 1.0 (loss is not finite) at step 6; checkpoint 4 is kept; go on "
        "without the batches since by --resume --on-spike rollback, or lower --lr or look at the "
        "data, then start again in another --out"
    )
    with Checkpoints(tmp_path / "r" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
        assert np.isfinite(checkpoints.restore(fresh(), "f").params["w"]).all()
    assert [r["step"] for r in read_metrics(tmp_path / "r")] == [1, 2, 3, 4, 5]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = go(tmp_path / "whole", 9)
    with pytest.raises(UserError):
        go(tmp_path / "cut", 9, bad=[6])
    resumed = go(tmp_path / "cut", 9, resume=True)
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    rows = timeless(tmp_path / "whole")
    assert rows == timeless(tmp_path / "cut")
    assert [row["step"] for row in rows if "eval/kl" in row] == [3, 6, 9]


def test_without_a_terminal_a_run_writes_lines_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(_progress, "EVERY", 0.0)
    said, at_step = io.StringIO(), []
    hear = {3: lambda: at_step.append(said.getvalue())}
    go(tmp_path / "r", 4, during_look=hear, console=Console(file=said, width=20))
    assert at_step[0].splitlines()[-1].startswith("train: 2 of 4, loss ")
    line = said.getvalue().splitlines()[-1]
    assert re.fullmatch(r"train: 4 of 4, loss [\d.]+, [\d,.]+ \w+/s, 0:00:\d\d elapsed", line)
