"""The loop: NaN stops it with the last good checkpoint kept, and a resumed run is the same run."""

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.kd.step import TrainState
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.loop import Look, train
from jaxdistill.train.run_directory import RunDirectory, read_metrics


class Data:
    """Batch i is a function of i, as grain's data sets are."""

    def __getitem__(self, i):
        return {"tokens": np.full((2, 4), i, np.int32)}


def step_that_breaks_at(bad):
    def step(state, teacher, batch):
        i = int(batch["tokens"][0, 0])
        loss = jnp.asarray(np.nan if i == bad else 1.0 / (i + 1), jnp.float32)
        one = jnp.ones(())
        params = {"w": state.params["w"] * 1.5 + i}
        new = TrainState(step=state.step + 1, params=params, opt_state=state.opt_state)
        return new, {"loss": (loss, one), "grad_norm": (one, one)}

    return step


def fresh():
    return TrainState(step=jnp.zeros((), jnp.int32), params={"w": jnp.ones(3)}, opt_state=())


def go(path, steps, bad=None, resume=False):
    run = RunDirectory(path, {"steps": 9}, resume=resume)
    return train(
        step_that_breaks_at(bad),
        fresh(),
        None,
        Data(),
        steps=steps,
        run=run,
        fingerprint="f",
        resume=resume,
        checkpoint_every=2,
        looks=[
            Look(3, lambda _, params: {"eval/kl": float(params["w"][0])}),
            Look(4, lambda step, _: {"number": step}, at_end=False),
        ],
        console=Console(quiet=True),
    )


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError) as e:
        go(tmp_path / "r", 9, bad=5)
    assert str(e.value) == (
        "loss nan, gradient norm 1.0 at step 6; checkpoint 4 is kept; lower --lr or look at the "
        "data, then start again in another --out"
    )
    with Checkpoints(tmp_path / "r" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
        assert np.isfinite(checkpoints.restore(fresh(), "f").params["w"]).all()
    assert [r["step"] for r in read_metrics(tmp_path / "r")] == [1, 2, 3, 4, 5]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = go(tmp_path / "whole", 9)
    with pytest.raises(UserError):
        go(tmp_path / "cut", 9, bad=6)
    resumed = go(tmp_path / "cut", 9, resume=True)
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in part] for part in rows
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in rows[0] if "eval/kl" in row] == [3, 6, 9]
