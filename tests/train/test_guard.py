"""The guard: bad losses stop a run or send it back, and it goes on with other data, exactly."""

import json

import numpy as np
import pytest
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.train.guard import Guard, Watch
from jaxdistill.train.run_directory import RunDirectory, read_metrics
from tests.train.test_loop import go, params_after, timeless

BACK = Guard(on_spike="rollback")


def test_a_rollback_leaves_out_the_batches_since_the_checkpoint(tmp_path, capsys):
    done = go(tmp_path / "r", 9, bad=[5], guard=BACK, console=Console(stderr=True))
    # Checkpoint 4; batches 4 and 5 are left out.
    np.testing.assert_array_equal(done.params["w"], params_after([0, 1, 2, 3, 6, 7, 8, 9, 10]))
    rows = read_metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[4]["loss"] == pytest.approx(1 / 7)
    assert read_metrics(tmp_path / "r", "rollbacks.jsonl") == [
        {
            "step": 4,
            "failed": 6,
            "problem": "loss nan, gradient norm 1.0 (loss is not finite)",
            "skipped": 2,
        }
    ]
    assert (
        "loss nan, gradient norm 1.0 (loss is not finite) at step 6: back to checkpoint 4, and on "
        "without the 2 batches since (rollback 1 of 3)\n"
    ) in capsys.readouterr().err


# Before the first checkpoint after the rollback, at it, and after it.
@pytest.mark.parametrize("crash", [6, 7, 9])
def test_a_resumed_run_leaves_out_the_same_batches(crash, tmp_path):
    whole = go(tmp_path / "whole", 9, bad=[5], guard=BACK)

    def fail():
        raise RuntimeError("killed")

    # The batch `crash` is met only after the rollback.
    with pytest.raises(RuntimeError):
        go(tmp_path / "cut", 9, bad=[5], guard=BACK, during_batch={crash: fail})
    resumed = go(tmp_path / "cut", 9, bad=[5], guard=BACK, resume=True)
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
    logs = [(tmp_path / name / "rollbacks.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_stopped_run_may_go_on_by_rollback(tmp_path):
    with pytest.raises(UserError, match="or lower --lr") as e:
        go(tmp_path / "r", 9, bad=[5])
    assert "; go on without the batches since by --resume --on-spike rollback, or" in str(e.value)
    done = go(tmp_path / "r", 9, bad=[5], guard=BACK, resume=True)
    np.testing.assert_array_equal(done.params["w"], params_after([0, 1, 2, 3, 6, 7, 8, 9, 10]))


def test_three_rollbacks_are_the_most(tmp_path):
    with pytest.raises(UserError) as e:
        go(tmp_path / "r", 9, bad=range(5, 99), guard=BACK)
    assert str(e.value).startswith(
        "loss nan, gradient norm 1.0 (loss is not finite) at step 5, after 3 rollbacks; checkpoint "
        "4 is kept; lower --lr"
    )
    rows = read_metrics(tmp_path / "r", "rollbacks.jsonl")
    assert [row["skipped"] for row in rows] == [2, 3, 4]


def test_without_a_checkpoint_it_stops(tmp_path):
    with pytest.raises(UserError, match="no checkpoint was saved yet; lower --lr"):
        go(tmp_path / "r", 9, bad=[1], guard=BACK)


def watch_of(tmp_path, losses, sigma):
    run = RunDirectory(tmp_path / "r", {}, resume=False)
    with (run.path / "metrics.jsonl").open("w") as f:
        f.writelines(json.dumps({"step": i + 1, "loss": x}) + "\n" for i, x in enumerate(losses))
    watch = Watch(Guard(spike_sigma=sigma), run)
    watch.take_up(len(losses), 0)
    run.close()
    return watch


def test_a_spike_is_far_above_the_median_of_the_last_128(tmp_path):
    rng = np.random.default_rng(0)
    # Old losses, far higher, are out of the window; one spike in it moves no bound.
    losses = [*(rng.normal(9, 0.1, 50)), *(rng.normal(3, 0.1, 127)), 50.0]
    watch = watch_of(tmp_path, losses, sigma=20)
    last = np.asarray(losses[-128:])
    bound = np.median(last) + 20 * 1.4826 * np.median(np.abs(last - np.median(last)))
    assert watch.problem({"loss": bound - 0.01, "grad_norm": 1.0}) is None
    said = watch.problem({"loss": bound + 0.5, "grad_norm": 1.0})
    assert said.startswith(f"loss {bound + 0.5:.4g}, above ") and said.endswith(
        " by 128 before it,"
    )
    assert watch.problem({"loss": -50.0, "grad_norm": 1.0}) is None
    assert "gradient norm inf" in watch.problem({"loss": 1.0, "grad_norm": float("inf")})


def test_no_spike_without_the_option_or_before_64_losses(tmp_path):
    assert watch_of(tmp_path / "off", [1.0] * 100, 0).problem({"loss": 9e9, "grad_norm": 1}) is None
    few = watch_of(tmp_path / "few", [1.0] * 63, 20)
    assert few.problem({"loss": 9e9, "grad_norm": 1}) is None
    # The 64th is in; of losses all alike a hundredth is a deviation.
    assert few.problem({"loss": 1.19, "grad_norm": 1}) is None
    assert few.problem({"loss": 1.21, "grad_norm": 1}) is not None


def test_bad_bounds_are_named():
    with pytest.raises(UserError, match="--spike-sigma -1 given; accepted: 0 or more"):
        Guard(spike_sigma=-1)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (("nll", "kl", "loss", "grad_norm"), "the student's logits"),
        (("kl", "loss", "grad_norm"), "the teacher's logits"),
        (("hidden_mse", "loss", "grad_norm"), "hidden_mse is not finite"),
        (("loss", "grad_norm"), "loss is not finite"),
        (("grad_norm",), "the loss is finite, its gradient is not"),
    ],
)
def test_a_bad_loss_names_what_was_not_finite_first(bad, cause, tmp_path):
    values = dict.fromkeys(("loss", "nll", "kl", "hidden_mse", "grad_norm"), 1.0)
    watch = watch_of(tmp_path, [1.0], 0)
    assert f"({cause}" in (watch.problem(values | dict.fromkeys(bad, float("nan"))) or "")
