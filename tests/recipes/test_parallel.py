"""Recipes on meshes and on several processes: the same run, and one line for what cannot be."""

import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.mesh import MeshShape
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.parallel import Parallel, join_hosts, mesh_shape
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.train.run_directory import read_metrics
from tests import tiny

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


def test_two_processes_make_one_run_that_one_may_go_on_with(inputs, alone):
    model, text, path = inputs
    out = path / "two"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = [f"--{k.replace('_', '-')}={v}" for k, v in JOB.items()]
    options += [f"--model={model}", f"--data={text}", f"--out={out}", "--mesh=data=2,fsdp=4"]
    code = "import sys; from jaxdistill.cli import main; main(sys.argv[1:])"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [*(sys.executable, "-c", code, "quantize", *options, "--json")]
            + [f"--hosts=127.0.0.1:{port},2,{i}"],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert ['"student"' in out for out, _ in said] == [True, False]  # what is said is said once
    assert_same(out, alone)
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
