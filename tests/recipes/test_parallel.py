"""Recipes on meshes and on several processes: the same run, and one line for what cannot be."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdistill.dd.stored_set import load_set
from jaxdistill.errors import UserError
from jaxdistill.mesh import MeshShape
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.recipes.parallel import Parallel, join_hosts, mesh_shape
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.train.run_directory import read_metrics
from tests import tiny
from tests.recipes.test_condense import save_points

JOB = {
    "steps": 4,
    "batch_size": 8,
    "seq_len": 32,
    "lr": 1e-3,
    "group_size": 32,
    "ranges": "absmax",
    "signal_every": -1,
    "eval_tokens": 256,
    "checkpoint_every": 2,
    "eval_every": 4,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    model = tiny.save_model(path / "model", num_heads=4, num_kv_heads=2)
    return model, tiny.save_text(path / "text.jsonl"), path


@pytest.fixture(scope="module")
def alone(inputs):
    model, text, path = inputs
    quantize(Quantize(model=model, data=text, out=path / "alone", **JOB))
    return path / "alone"


def assert_same(found, expected):
    losses = [[row["loss"] for row in read_metrics(run)] for run in (found, expected)]
    assert len(losses[0]) == JOB["steps"]
    # Sums in another order move a weight over the border between two integers here and there.
    np.testing.assert_allclose(*losses, rtol=1e-3)
    mine, other = (jax.tree.leaves(load_model(run).floats().params) for run in (found, expected))
    apart = sum(float(np.sum((np.asarray(a) - b) ** 2)) for a, b in zip(mine, other, strict=True))
    assert apart <= 1e-4 * sum(float(np.sum(np.asarray(b) ** 2)) for b in other)


# Does its jobs one after the other; a limit is the largest file that the first process may write.
CHILD = """
import json, resource, sys
from jaxdistill.cli import main
host, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
codes = []
for limit, arguments in jobs:
    if limit and host == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main(arguments)
        codes.append(0)
    except SystemExit as e:
        codes.append(e.code)
print(json.dumps(codes), file=sys.stderr)
"""


def flags(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def on_two_processes(*jobs):
    """Run jobs ``(limit, arguments)`` on two processes of four devices; give each one's output."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    processes = []
    for i in range(2):
        hosts = ["--mesh=data=2,fsdp=4", f"--hosts=127.0.0.1:{port},2,{i}"]
        own = [(limit, [*arguments, *hosts]) for limit, arguments in jobs]
        command = [sys.executable, "-c", CHILD, str(i), json.dumps(own)]
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | {"XLA_FLAGS": xla},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


def test_two_processes_make_one_run_that_one_may_go_on_with(inputs, alone):
    """Distil, condense and fill a disk on both, and go on with the first run on one."""
    model, text, path = inputs
    out = path / "two"
    points = save_points(path / "points.npz", number=64)
    learn = {"data": points, "per_class": 2, "architecture": "linear", "inner_steps": 3}
    learn |= {"batch_size": 16, "checkpoint_every": -1}
    rows = {"data": text, "model": model, "examples": 8, "seq_len": 16, "batch_size": 8}
    rows |= {"steps": 1, "inner_steps": 2, "inner_rate": 1e-3, "checkpoint_every": -1}
    cut = "cut:layers=1"
    said = on_two_processes(
        (0, ["quantize", *flags({"model": model, "data": text, "out": out} | JOB), "--json"]),
        (0, ["condense", *flags(learn | {"steps": 3, "out": path / "set"})]),
        (0, ["condense", *flags(rows | {"student_init": cut, "out": path / "rows"})]),
        (9000, ["condense", *flags(learn | {"steps": 300, "out": path / "full"})]),
    )
    assert [json.loads(error.splitlines()[-1]) for _, error in said] == [[0, 0, 0, 2]] * 2, said
    assert ['"student"' in out for out, _ in said] == [True, False]  # what is said is said once
    assert_same(out, alone)

    condense(Condense(**learn | {"steps": 3, "out": path / "set_alone"}))
    sets = [load_set(path / name / "set").synthetic for name in ("set", "set_alone")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *sets)
    condense(Condense(**rows | {"student_init": (cut,), "out": path / "rows_alone"}))
    ((mine,), (other,)) = (read_metrics(path / name) for name in ("rows", "rows_alone"))
    np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-5)
    np.testing.assert_allclose(mine["grad_norm"], other["grad_norm"], rtol=1e-4)

    first, second = (error.splitlines()[-2] for _, error in said)
    assert "full has no room (File too large)" in first and "error: " in first
    assert "full/metrics.jsonl; its own message says why" in second and "error: " in second
    assert read_metrics(path / "full")[-1]["step"] < 300

    # The same run, from the checkpoint that both wrote, on one device.
    shutil.rmtree(out / "checkpoints" / "4")
    quantize(Quantize(model=model, data=text, out=out, resume=True, **JOB))
    assert_same(out, alone)


def test_a_batch_that_cannot_be_divided_is_refused(inputs, tmp_path):
    model, text, _ = inputs
    with pytest.raises(UserError, match=r"--batch-size 6 .* accepted: a multiple of 8"):
        quantize(
            Quantize(
                model=model, data=text, out=tmp_path / "o", mesh="fsdp=8", **JOB | {"batch_size": 6}
            )
        )
    assert not (tmp_path / "o").exists()


def test_a_mesh_of_other_devices_is_refused(inputs, tmp_path):
    model, text, _ = inputs
    with pytest.raises(UserError, match="of 2 devices given, and there are 8"):
        quantize(Quantize(model=model, data=text, out=tmp_path / "o", mesh="data=2", **JOB))


def test_auto_is_fsdp_over_all_devices():
    assert mesh_shape(Parallel(mesh="auto")) == MeshShape(fsdp=8)
    assert mesh_shape(Parallel(hosts="auto")) == MeshShape(fsdp=8)
    assert mesh_shape(Parallel()) is None


@pytest.mark.parametrize("hosts", ["", "here", "a:1,2", "a:1,x,0", "a,2,0", "a:1,2,2"])
def test_hosts_that_are_none_are_refused(hosts):
    with pytest.raises(UserError, match="--hosts"):
        join_hosts(hosts)
