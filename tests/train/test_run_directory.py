"""The run directory: one configuration and one writer each, metrics that rewind, a full disk."""

import errno
import json
import resource

import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.board import Board
from jaxdistill.train.run_directory import RunDirectory, append, read_metrics


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
    RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=False).close()
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


def test_one_writer_at_a_time(tmp_path):
    with RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=False):
        with pytest.raises(UserError, match="r is being written by process "):
            RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=True)
    RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=True).close()


def test_a_run_killed_before_it_began_is_no_hindrance(tmp_path):
    (tmp_path / "r").mkdir()
    for name in (".lock", "config.json.part"):
        (tmp_path / "r" / name).write_text("left")
    RunDirectory(tmp_path / "r", {"lr": 0.1}, resume=False).close()
    assert json.loads((tmp_path / "r" / "config.json").read_text())["options"] == {"lr": 0.1}


def test_a_full_disk_ends_a_run_in_one_line(tmp_path):
    with pytest.raises(UserError) as e, RunDirectory(tmp_path / "r", {}, resume=False) as run:
        (run.checkpoints / "20").mkdir(parents=True)
        (run.checkpoints / "30.orbax-checkpoint-tmp").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(e.value) == (
        f"{tmp_path / 'r'} has no room (No space left on device); checkpoint 20 is kept; free "
        "space, then go on with --resume"
    )
    with pytest.raises(OSError, match="no such"), RunDirectory(tmp_path / "r", {}, resume=True):
        raise OSError(errno.ENOENT, "no such file")


@pytest.fixture
def small_files():
    """No file may grow past 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_row_that_cannot_be_written_whole_is_not_written(tmp_path, small_files):
    file = tmp_path / "metrics.jsonl"
    append(file, "x" * 69 + "\n")
    small_files()
    with pytest.raises(OSError, match="File too large"):
        append(file, "y" * 39 + "\n")
    assert file.read_text() == "x" * 69 + "\n"


def test_tensorboard_s_events_are_there(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    board = Board(tmp_path, 7)
    board.add(7, {"loss": 0.5})
    board.close()
    (file,) = tmp_path.iterdir()
    data, events = file.read_bytes(), []
    while data:  # a TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    version, start, row = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, SessionLog.START)
    (value,) = row.summary.value
    assert (row.step, value.tag, value.simple_value) == (7, "loss", 0.5)


def test_no_run_ends_for_tensorboard(tmp_path, small_files):
    """SummaryWriter would wait for ever for its thread, which a failed write has ended."""
    board = Board(tmp_path, 1)
    small_files()
    for step in range(1000):
        board.add(step, {"loss": 1.0})
    board.close()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= 100


def test_what_a_run_learns_from_may_move_but_not_change(tmp_path):
    here = {"data": "here.jsonl", "teacher": "a", "lr": 0.1}
    contents = {"teacher": "01", "held-out text": "02"}
    RunDirectory(tmp_path / "r", here, resume=False, contents=contents).close()
    there = here | {"data": "there.jsonl", "teacher": "b"}
    RunDirectory(tmp_path / "r", there, resume=True, contents=contents).close()
    for changes, words in (
        ({"teacher": "03"}, "another teacher .*teacher 01, now 03"),
        ({"teacher": "3", "held-out text": "4"}, "another teacher and held-out text .* 02, now 4"),
        ({"student": "05"}, "another student .*student none, now 05"),
    ):
        with pytest.raises(UserError, match=words):
            RunDirectory(tmp_path / "r", here, resume=True, contents=contents | changes)
    with pytest.raises(UserError, match=r"lr=0.1, now 0.2"):
        RunDirectory(tmp_path / "r", here | {"lr": 0.2}, resume=True, contents=contents)
    with pytest.raises(UserError, match=r"data='here.jsonl', now 'there.jsonl'"):
        RunDirectory(tmp_path / "r", there, resume=True)  # contents that nobody knows
