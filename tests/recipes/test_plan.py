"""Plans: bytes against real arrays, FLOPs against XLA's count, and what a 7B step gathers."""

import json
import math
import os
import subprocess
import sys

import jax
import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.communication import sent_bytes
from jaxdistill.evals.cost import count_params, forward_flops, matrix_params, training_flops
from jaxdistill.evals.devices import device
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.step import adamw, init_state
from jaxdistill.mesh import MeshShape, make_mesh, on_mesh
from jaxdistill.models.config import config_to_hf
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.hub import load_config, shipped_configs
from jaxdistill.models.sharding import make_sharded, place
from jaxdistill.paths import OV_PATTERN
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy
from jaxdistill.recipes.plan import Plan, plan
from tests import tiny

CONFIG = tiny.config()
SMALL = {"batch_size": 8, "seq_len": 16, "chunk": 32, "mesh": "data=2,fsdp=2,tensor=2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.json"
    path.write_text(json.dumps(config_to_hf(CONFIG)))
    return str(path)


@pytest.fixture(scope="module")
def report(model):
    return plan(Plan(model=model, price=3.0, tokens=1e6, **SMALL))


def on_first_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_bytes_are_those_of_the_arrays(report):
    policy = default_policy(QuantSpec(bits=4, ranges="absmax"), tied=True)
    tx = ov_freeze(adamw(1e-3, 10))
    with on_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        teacher = place(tiny.params(CONFIG))
        state = make_sharded(lambda p: init_state(p, tx), place(add_scales(teacher, policy)))
    assert report["bytes"]["teacher"] == on_first_device(teacher)
    assert report["bytes"]["student"] == on_first_device(state.params)
    assert report["bytes"]["optimizer"] == on_first_device((state.opt_state, state.step))
    parts = [value for name, value in report["bytes"].items() if name != "total"]
    assert report["bytes"]["total"] == sum(parts) and min(parts) > 0


def test_speed_hours_and_cost_follow_from_the_flops(report):
    tokens = SMALL["batch_size"] * SMALL["seq_len"]
    per_token = report["flops"]["model"] / tokens
    seconds = report["seconds"]
    assert seconds["compute"] == pytest.approx(tokens * per_token / (0.4 * 989.4e12 * 8))
    step = max(seconds["compute"], seconds["overlapped"]) + seconds["waiting"]
    assert report["tokens_per_second"] == pytest.approx(tokens / step)
    assert report["hours"] == pytest.approx(1e6 / report["tokens_per_second"] / 3600)
    assert report["cost"] == pytest.approx(report["hours"] * 8 * 3.0)
    assert report["flops"]["hardware"] > report["flops"]["model"]  # remat is on
    assert report["fits"] and report["memory"] == 80 * 2**30


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "none", "cache_k": 8},
        {"bits": "none", "objective": "0.9*forward_kl:temperature=4..1+0.1*hidden:layers=last"},
    ],
    ids=str,
)
def test_other_steps_are_planned_too(model, report, options):
    found = plan(Plan(model=model, **SMALL | options))
    cached = options.get("teacher") == "none"
    assert (found["bytes"]["teacher"] == 0) == cached
    assert (found["bytes"]["batch"] > report["bytes"]["batch"]) == cached
    # A float student freezes nothing, a cached teacher computes nothing.
    assert (found["flops"]["model"] > report["flops"]["model"]) == (not cached)


def test_what_does_not_fit_is_said(model, monkeypatch):
    small = device("h100")
    object.__setattr__(small, "memory", 10_000)
    monkeypatch.setattr("jaxdistill.recipes.plan.device", lambda name: small)
    found = plan(Plan(model=model, price=3.0, **SMALL))
    assert not found["fits"]
    assert [found[k] for k in ("tokens_per_second", "hours", "device_hours", "cost")] == [None] * 4


def test_forward_flops_are_xlas_count():
    # One layer, for XLA counts a scan's body once; norms and softmax are the rest.
    config = tiny.config(num_layers=1, hidden_size=128, intermediate_size=384, num_heads=8)
    tokens = jax.ShapeDtypeStruct((2, 64), "int32")
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    compiled = (
        jax.jit(lambda p, t: make_apply(config)(p, t).logits()).lower(params, tokens).compile()
    )
    # XLA computes all of the scores, the masked half too.
    masked = 4 * config.num_heads * config.head_dim * 32
    expected = (forward_flops(config, 64) + masked) * 128
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.05)


def test_training_flops_leave_out_what_is_frozen():
    config = load_config("llama-2-7b")
    assert matrix_params(config) == pytest.approx(6.607e9, rel=1e-3)  # 6.74e9 less the table
    free = training_flops(config, 2048)["model"]
    frozen = training_flops(config, 2048, frozen=OV_PATTERN)["model"]
    assert free - frozen == 2 * 32 * 2 * 4096 * 4096
    with_teacher = training_flops(config, 2048, teacher=config)["model"]
    assert with_teacher - free == forward_flops(config, 2048)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_have_the_published_size(name):
    published = {"llama-2-7b": 6.738e9, "llama-3.1-8b": 8.030e9, "llama-3.1-70b": 70.554e9}
    shapes = jax.eval_shape(lambda: init_params(load_config(name), jax.random.key(0)))
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert size == pytest.approx(published[name], rel=1e-3)


def test_what_is_sent_follows_the_layout_by_hand():
    """Llama 3.1 8B, 8 x 512 tokens in bfloat16, on eight devices: 7/8 of each ring."""
    config = load_config("llama-3.1-8b")
    assert count_params(config) == pytest.approx(8.030e9, rel=1e-3)
    size, width, layers, tokens = count_params(config), 4096, 32, 8 * 512
    found = {
        axis: sent_bytes(config, MeshShape(**{axis: 8}), tokens=tokens, teacher=config)
        for axis in ("data", "fsdp", "tensor")
    }
    # Weights forward, backward and the teacher's; float32 gradients.
    assert found["fsdp"]["fsdp"] == pytest.approx(7 / 8 * (3 * 2 + 4) * size)
    assert found["data"]["data"] == pytest.approx(2 * 7 / 8 * 4 * size)
    activations = 2 * tokens * width
    assert found["tensor"]["tensor"] == pytest.approx(2 * 7 / 8 * activations * layers * (6 + 2))
    assert all(v == 0 for axis, by in found.items() for other, v in by.items() if other != axis)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"link_share": 0.0}, r"--link-share 0.0 given"),
        ({"model": "nowhere"}, r"nowhere does not exist; accepted: llama-2-7b"),
        ({"device": "tpu"}, r"device 'tpu' given; accepted: a100"),
        ({"mesh": "rows=2"}, r"mesh 'rows=2' given"),
        ({"mfu": 1.5}, r"--mfu 1.5"),
        ({"freeze": "auto"}, r"--freeze auto given"),
        ({"freeze": "("}, r"is not a regular expression"),
        ({"batch_size": 6}, r"--batch-size 6 .* accepted: a multiple of 4 rows"),
        ({"mesh": "fsdp=512", "batch_size": 512}, r"JAX has started with 8"),
    ],
)
def test_what_cannot_be_planned_is_refused(model, options, said):
    with pytest.raises(UserError, match=said):
        plan(Plan(**({"model": model} | SMALL | options)))


def test_the_verb_prints_a_table(model, capsys):
    main(["plan", "--model", model, "--mesh", "data=1", "--batch-size", "2", "--seq-len", "16"])
    shown = capsys.readouterr().out
    assert "tokens/s at 40% MFU" in shown and "fits" in shown and "yes" in shown


# Run by itself: it needs 64 devices.
_GATHERED = """
import json, re, sys
from jaxdistill.mesh import make_mesh, on_mesh, parse_mesh
from jaxdistill.models.hub import load_config
from jaxdistill.recipes.plan import Plan, _simulated, planned_step
config = load_config("llama-2-7b")
shape = parse_mesh(sys.argv[1])
o = Plan(model="llama-2-7b", mesh=str(shape), batch_size=64, seq_len=1024, chunk=8192)
mesh = make_mesh(shape, _simulated(64))
with on_mesh(mesh):
    step, arguments, _ = planned_step(o, config, config, mesh)
    text = step.lower(*arguments).compile().as_text()
found = set()
for line in text.splitlines():
    if match := re.search(r"= (.+?) all-gather(-start)?\\(", line):
        for dims in re.findall(r"\\w+\\[([\\d,]*)\\]", match[1]):
            found.add(tuple(int(n) for n in dims.split(",") if n))
print(json.dumps(sorted(found)))
"""


def test_a_7b_step_gathers_neither_the_vocabulary_nor_all_layers():
    done = subprocess.run(
        [sys.executable, "-c", _GATHERED, "fsdp=64"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = json.loads(done.stdout)
    vocabulary, layers = 32000, 32
    assert [4096, 4096] in shapes  # one layer's kernel is gathered
    for dims in shapes:
        big = math.prod(dims) > 10**6
        assert not (big and vocabulary in dims), f"{dims} is a whole table or its logits"
        assert not (big and len(dims) > 2 and layers in dims), f"{dims} is a stack of layers"
