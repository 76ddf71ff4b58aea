"""Signals: the step under way ends, its state is saved, and the run goes on as if nothing was."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import _signals, cli
from jaxdistill.train import preemption
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.preemption import Stopped, StopRequest, agreed
from jaxdistill.train.run_directory import read_metrics
from tests.train.test_loop import go, timeless


def kill(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Both signals as a terminal leaves them; a shell's background jobs ignore SIGINT."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run left alone: its state and its metrics."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return go(out, 9), timeless(out)


@pytest.mark.parametrize(
    ("number", "place", "step"),
    [
        (signal.SIGTERM, "step", 2),
        (signal.SIGINT, "step", 3),  # while the checkpoint of the one before is written
        (signal.SIGTERM, "look", 3),  # in an evaluation
    ],
)
def test_a_signal_saves_the_step_under_way(number, place, step, whole, tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as e:
        go(tmp_path / "cut", 9, **{f"during_{place}": {step: lambda: kill(number)}})
    assert str(e.value) == (
        f"stopped by {number.name} after step {step}; checkpoint {step} is saved; go on with "
        "--resume"
    )
    assert e.value.exit_code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    with Checkpoints(tmp_path / "cut" / "checkpoints") as checkpoints:
        assert checkpoints.latest == step
    assert [r["step"] for r in read_metrics(tmp_path / "cut")] == list(range(1, step + 1))
    resumed = go(tmp_path / "cut", 9, resume=True)
    np.testing.assert_array_equal(whole[0].params["w"], resumed.params["w"])
    assert timeless(tmp_path / "cut") == whole[1]


def test_without_checkpoints_it_says_so(tmp_path):
    with pytest.raises(Stopped, match="after step 2; no checkpoint is kept; go on with --resume"):
        go(tmp_path / "r", 9, checkpoint_every=0, during_step={2: lambda: kill(signal.SIGTERM)})
    assert not list((tmp_path / "r" / "checkpoints").iterdir())


def test_a_second_signal_ends_at_once_and_a_late_one_is_not_lost(monkeypatch):
    ended = []
    monkeypatch.setattr(_signals, "end", ended.append)
    with (
        pytest.raises(Stopped, match="stopped by SIGTERM; go on with --resume"),
        StopRequest() as s,
    ):
        assert not s.asked()
        kill(signal.SIGTERM)
        assert s.asked()
        assert not ended
        kill(signal.SIGINT)
        assert set(ended) == {signal.SIGINT}


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as s:
            kill(signal.SIGINT)
            assert not s.asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_agree(monkeypatch):
    assert agreed(True) and not agreed(False)
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    for others, want in ((True, True), (False, False)):
        monkeypatch.setattr(
            preemption.multihost_utils,
            "process_allgather",
            lambda own, others=others: np.stack([own, np.asarray(others)]),
        )
        assert agreed(False) is want


def test_outside_of_training_the_command_ends_at_once(monkeypatch, capsys):
    monkeypatch.setattr(cli, "run", lambda _: kill(signal.SIGTERM))
    with pytest.raises(SystemExit) as e:
        cli.main(["objectives"])
    assert e.value.code == 143
    assert capsys.readouterr().err == (
        "stopped by SIGTERM; go on with --resume where the verb has it\n"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SWALLOWED = """
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[3])  # without the package: quick
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals.GRACE = 0.3
with signals.heard(sys.argv[1]):
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(9)
    except BaseException:
        print("caught", flush=True)
    time.sleep(9)
print("went on")
"""


@pytest.mark.parametrize(
    ("mode", "name", "output"),
    [("raise", "SIGINT", "caught\n"), ("raise", "SIGTERM", "caught\n"), ("exit", "SIGINT", "")],
)
def test_a_signal_whose_error_is_swallowed_ends_the_process_all_the_same(mode, name, output):
    """Importing and compiling run code that catches or ignores every error."""
    command = [sys.executable, "-c", SWALLOWED, mode, name, _signals.__file__]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    code = {"SIGTERM": 143, "SIGINT": 130}[name]
    assert (process.returncode, process.stdout) == (code, output)
    assert process.stderr == f"stopped by {name}; go on with --resume where the verb has it\n"


PROCESS = """
import os, signal, sys, jax
from jaxdistill.train.preemption import StopRequest
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with StopRequest() as stop:
    for step in range(1, 99):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.asked():
            break
    print(step, stop.stopped("").exit_code, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [p.communicate(timeout=300)[0].split()[-2:] for p in running] == [["3", "143"]] * 2
