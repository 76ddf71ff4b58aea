"""Checkpoints: what is saved is what was, damage is noticed, failed writes are heard of."""

import errno
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import _orbax
from jaxdistill.errors import UserError
from jaxdistill.train import checkpoint, manifest
from jaxdistill.train.checkpoint import Checkpoints, recover


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


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?[!b]", "tab\t%2F#{é}"])
def test_any_name_holds_checkpoints(name, tmp_path):
    """Orbax reads wildcards in its own directory: `a*` would merge the arrays of `a1` too."""
    for folder, value in (("a1", 1.0), (name, 2.0)):
        with Checkpoints(tmp_path / folder / "c") as checkpoints:
            checkpoints.save(7, state(value), "data")
    with Checkpoints(tmp_path / name / "c") as checkpoints:
        got = checkpoints.restore(state(0.0), "data")
    np.testing.assert_array_equal(got["w"]["kernel"], state(2.0)["w"]["kernel"])


def test_the_first_checkpoint_is_read_back_before_training_continues(tmp_path, monkeypatch):
    def other_values(load, tree):
        return really(lambda abstract: jax.tree.map(lambda x: x + 1, load(abstract)), tree)

    really = checkpoint.read_back
    monkeypatch.setattr(checkpoint, "read_back", other_values)
    with (
        pytest.raises(UserError, match=r"checkpoint .*/c/1 .*\['step'\] has other values"),
        Checkpoints(tmp_path / "c") as checkpoints,
    ):
        checkpoints.save(1, state(1.0), "data")


def test_saving_leaks_neither_descriptors_nor_threads(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in range(1, 16):
            checkpoints.save(step, state(step), "data", wait=True)
            early = count() if step == 5 else early if step > 5 else None
        assert all(late <= before + 4 for late, before in zip(count(), early, strict=True))


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints, 1 to 3, of a state that does not compress to nothing."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    noise = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, noise | {"step": jnp.asarray(step)}, "data", skipped=step)
    return folder, noise


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.name != "commit_success.txt")


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_changed_byte_anywhere_is_noticed(saved):
    """Of the array data above all, which tensorstore hands out as it finds them."""
    step = saved[0] / "3"
    data = max(files_of(step), key=lambda p: p.stat().st_size)
    assert data.stat().st_size > 64 * 64 * 3 and manifest.damage(step) is None
    for file in files_of(step):
        if file.name == "_CHECKPOINT_METADATA":  # it also holds times
            continue
        for at in (0, file.stat().st_size // 2, -1):
            flip(file, at)
            assert manifest.damage(step) is not None, (file.name, at)
            flip(file, at)
    text = (step / "_CHECKPOINT_METADATA").read_text()
    assert '"skipped": 3' in text
    (step / "_CHECKPOINT_METADATA").write_text(text.replace('"skipped": 3', '"skipped": 4'))
    assert manifest.damage(step) == "_CHECKPOINT_METADATA has other values"
    (step / "_CHECKPOINT_METADATA").write_text(text.replace("item_handlers", "item_handLers"))
    assert manifest.damage(step) == "_CHECKPOINT_METADATA has other values"
    (step / "_CHECKPOINT_METADATA").write_text(text)
    assert manifest.damage(step) is None


def remove_array(step):
    max(files_of(step), key=lambda p: p.stat().st_size).unlink()


def cut_array(step):
    file = max(files_of(step), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def flip_array(step):
    flip(max(files_of(step), key=lambda p: p.stat().st_size), 1000)


def add_file(step):
    (step / "state" / "more").write_text("x")


def cut_manifest(step):
    (step / "checksums.crc32").write_text('{"files": ')


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_array, " bytes, not "),
        (remove_array, " is missing"),
        (remove_state, " is missing"),
        (flip_array, " has other bytes"),
        (add_file, "state/more does not belong to it"),
        (cut_manifest, "checksums.crc32 cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(saved, tmp_path, spoil, reason):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    spoil(folder / "3")
    said = []
    assert recover(folder, said.append) == 2
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 2 and checkpoints.skipped(2) == 2
        got = checkpoints.restore(saved[1] | {"step": jnp.asarray(0)}, "data")
        np.testing.assert_array_equal(got["w"], saved[1]["w"])
        checkpoints.save(3, got, "data")  # in its place
    (line,) = said
    aside = tmp_path / "damaged-checkpoints" / "3"
    assert line.startswith("checkpoint 3 is damaged (") and reason in line
    assert line.endswith(f"): moved to {aside}; going on from checkpoint 2")
    assert aside.is_dir() and recover(folder, said.append) == 3


def test_where_all_are_damaged_it_says_so_and_leaves_them(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")
    for step in (1, 2, 3):
        flip_array(tmp_path / "c" / str(step))
    with pytest.raises(UserError) as e:
        recover(tmp_path / "c")
    assert str(e.value).startswith(f"checkpoint {tmp_path / 'c' / '3'} is damaged (")
    assert str(e.value).endswith(") and none before it is whole; start again in another --out")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2", "3"]


def test_one_without_a_manifest_is_taken_as_it_is(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")
    (tmp_path / "c" / "3" / "checksums.crc32").unlink()
    assert recover(tmp_path / "c") == 3


class Disk:
    """Makes the writing of manifests, in orbax's background thread, fail as a disk would."""

    def __init__(self, monkeypatch, *numbers):
        self.left, self.really = list(numbers), manifest.seal_checkpoint
        monkeypatch.setattr(checkpoint, "seal_checkpoint", self.seal)
        monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))

    def seal(self, directory, metadata):
        if self.left and (number := self.left.pop(0)):
            raise OSError(number, "no")
        self.really(directory, metadata)


def test_a_full_disk_is_heard_of_at_the_next_save(tmp_path, monkeypatch):
    Disk(monkeypatch, 0, errno.ENOSPC)
    run = tmp_path / "run"
    with pytest.raises(UserError) as e, Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state(1.0), "data")
        checkpoints.save(2, state(2.0), "data")
        checkpoints.save(3, state(3.0), "data")
    assert str(e.value) == (
        f"{run} has no room (No space left on device); checkpoint 1 is kept; free space, then go "
        "on with --resume"
    )
    # What was half written is gone, and what it would have replaced is there.
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["1"]
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert int(checkpoints.restore(state(0.0), "data")["step"]) == 1


def test_what_is_still_written_to_is_cleared_away_too(tmp_path, monkeypatch):
    Disk(monkeypatch, errno.ENOSPC)
    really, calls = shutil.rmtree, []

    def interrupted(path, ignore_errors):  # as where a file is added behind its back
        calls.append(path)
        if len(calls) > 2:
            really(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", interrupted)
    with pytest.raises(UserError), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1.0), "data", wait=True)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_heard_of_at_the_end(wait, tmp_path, monkeypatch):
    Disk(monkeypatch, errno.EDQUOT)
    with (
        pytest.raises(
            UserError, match="has no room .Disk quota exceeded.; no checkpoint was saved"
        ),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(1, state(1.0), "data", wait=wait)


def test_a_write_that_ends_after_the_save_failed_says_nothing(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: heard.append(str(what.exc_value)))
    _orbax._ignore_late_writes()
    for said in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(said)))
    assert heard == ["something else"]


def test_what_may_pass_is_saved_again(tmp_path, monkeypatch):
    Disk(monkeypatch, errno.EIO, errno.EIO, 0, errno.EIO)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1.0), "data", wait=True)
        assert checkpoints.latest == 1
        checkpoints.save(2, state(2.0), "data")
        checkpoints.save(3, state(3.0), "data")  # hears that 2 failed, and is its second try
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


def test_the_third_failure_ends_the_run(tmp_path, monkeypatch):
    Disk(monkeypatch, 0, *[errno.EIO] * 9)
    with (
        pytest.raises(UserError, match="cannot be written .Input/output error.; checkpoint 1 is k"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        for step in range(1, 9):
            checkpoints.save(step, state(step), "data")
    assert step == 5  # 2, 3 and 4 failed
