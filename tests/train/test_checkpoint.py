"""Checkpoints: what is saved is what was, the last n are kept, damage, other data are refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.checkpoint import Checkpoints


def state(value: float):
    return {
        "step": jnp.asarray(int(value), jnp.int32),
        "w": {
            "kernel": jnp.full((64, 64), value),
            "kernel_scale": jnp.full((4,), 0.5, jnp.float16),
        },
    }


def test_saved_state_survives_donation_at_once(tmp_path):
    """The save is asynchronous: the very next step may reuse the buffers."""
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        live = state(3.0)
        checkpoints.save(3, live, "data")
        jax.block_until_ready(spoil(live))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        got = checkpoints.restore(state(0.0), "data")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state(3.0)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_only_the_last_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state(step), "data")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["3", "4"]


def damage_arrays(step):
    for path in step.rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:40])


def remove_state(step):
    shutil.rmtree(step / "state")


# A load that fails leaves coroutines of orbax behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [damage_arrays, remove_state])
def test_cut_off_checkpoint_is_named_and_the_one_before_still_serves(tmp_path, damage):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(1.0), "data")
        checkpoints.save(2, state(2.0), "data")
    damage(tmp_path / "c" / "2")
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match="cannot be restored") as e,
    ):
        checkpoints.restore(state(0.0), "data")
    assert "\n" not in str(e.value)
    assert str(e.value).startswith(f"checkpoint {tmp_path / 'c' / '2'} cannot be restored (")
    assert str(e.value).endswith(
        "); delete that directory to resume from the one before, or start again in another --out"
    )
    shutil.rmtree(tmp_path / "c" / "2")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert int(checkpoints.restore(state(0.0), "data")["step"]) == 1


def test_other_data_and_other_shapes_are_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(1.0), "abc")
        checkpoints._orbax.wait()
        with pytest.raises(UserError) as e:
            checkpoints.restore(state(0.0), "xyz")
        assert str(e.value) == (
            f"checkpoint {tmp_path / 'c' / '1'} was trained on data abc, these are xyz; resume "
            "with the same --data, --seq-len and tokenizer"
        )
        other = state(0.0) | {"w": {"kernel": jnp.zeros((8, 8)), "kernel_scale": jnp.zeros(4)}}
        with pytest.raises(UserError, match=r"cannot be restored \(it is of another model or opt"):
            checkpoints.restore(other, "abc")
