"""Several processes of which one dies: the others end with a line that names it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

HEARTBEAT = 4

# A step is a sum over both processes, as in training.
CHILD = """
import sys, jax, numpy
from jaxdistill.mesh import MeshShape, make_mesh
from jaxdistill.recipes.parallel import Parallel, join_hosts, parallel
join_hosts(sys.argv[1], heartbeat=float(sys.argv[2]))
def recipe(o, console):
    sharding = jax.NamedSharding(make_mesh(MeshShape(fsdp=2)), jax.P("fsdp"))
    x = jax.make_array_from_callback((2,), sharding, lambda _: numpy.ones(1))
    print("runs", flush=True)
    while True:
        x = jax.jit(lambda x: x.sum() / 2 * x)(x).block_until_ready()
parallel(recipe)(Parallel(hosts=sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_survivors_end_with_a_line_that_names_the_dead(victim, how):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, f"127.0.0.1:{port},2,{i}", str(HEARTBEAT)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "runs\n"
        processes[victim].send_signal(how)
        began = time.monotonic()
        _, said = processes[1 - victim].communicate(timeout=60)
        assert time.monotonic() - began < 4 * HEARTBEAT
        assert processes[1 - victim].returncode == 1
        last = said.strip().splitlines()[-1]
        hosts = {0: ("127.0.0.1", socket.gethostname()), 1: (socket.gethostname(),)}[victim]
        lines = [f"process {victim} on host {host} has died; start all" for host in hosts]
        assert any(line in last for line in lines) and "--resume" in last
    finally:
        for process in processes:
            process.kill()
            process.communicate()
