"""The README's Python example runs as it stands, on a tiny model in place of the real one."""

import re
from pathlib import Path

import numpy as np

from jaxdistill.paths import walk
from tests import tiny

README = Path(__file__).resolve().parents[1] / "README.md"


def test_example_runs_and_freezes(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    model = tiny.save_model(tmp_path / "model")
    text = tiny.save_text(tmp_path / "train.jsonl")
    for name, real in (("HuggingFaceTB/SmolLM2-135M-Instruct", model), ("train.jsonl", text)):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(real))
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    scope: dict = {}
    exec(code.replace("range(80)", "range(2)"), scope)
    assert int(scope["state"].step) == 2
    before, after = dict(walk(scope["student"])), dict(walk(scope["state"].params))
    path = "layers/self_attn/{}_proj/kernel"
    assert np.array_equal(before[path.format("o")], after[path.format("o")])
    assert not np.array_equal(before[path.format("q")], after[path.format("q")])
    assert scope["stored"]["layers"]["mlp"]["up_proj"]["kernel_q"].dtype == "int4"
