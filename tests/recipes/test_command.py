"""The command that a page shows parses back to the options that it was made of."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from jaxdistill.cli import VERBS
from jaxdistill.recipes.command import command_of
from jaxdistill.recipes.options import Distill, Quantize
from jaxdistill.recipes.pilot import Pilot


def parse(words):
    assert words[0] == "jaxdistill"
    return tyro.extras.subcommand_cli_from_dict(VERBS, args=words[1:])


JOBS = [
    Quantize(model="m", data="d", out=Path("o")),
    Quantize(
        model="a b",
        data="d",
        out=Path("o"),
        bits=3,
        group_size=32,
        asymmetric=True,
        mix=("rare.jsonl:0.1", "more.jsonl:0.2"),
        slice=("legal=court|plaintiff",),
        lr=3e-5,
        freeze=".*",
    ),
    Distill(teacher="t", student_init=("cut:layers=1", "lora:rank=2"), data="d", out=Path("o")),
    Pilot(model="m", data="d", slice=(), max_drop=0.1),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_a_command_parses_back(job):
    assert parse(command_of(type(job), dataclasses.asdict(job))) == job
    plain = json.loads(json.dumps(dataclasses.asdict(job), default=str))  # as config.json holds it
    assert parse(command_of(type(job), plain)) == job


def test_defaults_are_left_out():
    words = command_of(Quantize, {"model": "m", "data": "d", "out": "o", "steps": 200})
    assert words == "jaxdistill quantize --model m --data d --out o".split()
