"""Damaged files are read or refused in one line: a few of each reader, and every bomb.

``python -m benchmarks.fuzz.campaign`` reads many more, each reader in a process of its own under
limits of memory and time.
"""

import pytest

from jaxdistill.errors import UserError
from tests.fuzz.inputs import Inputs
from tests.fuzz.readers import READERS

COUNT = {"config": 80, "safetensors": 80, "choices": 40, "stored_set": 30, "run_directory": 20}
QUICK = sorted(name for name, reader in READERS.items() if not reader.slow)


@pytest.fixture(scope="module", params=QUICK)
def inputs(request, tmp_path_factory):
    """A reader's valid files."""
    return Inputs(request.param, tmp_path_factory.mktemp(request.param))


def refusal(inputs, folder):
    """The message with which a reader refuses what lies in a folder; None where it is read."""
    try:
        inputs.reader.read(folder)
    except UserError as e:
        assert str(e).isprintable() and len(str(e)) <= 1000
        return str(e)
    return None


def test_valid_files_are_read(inputs):
    for number in range(len(inputs.valid)):
        assert refusal(inputs, inputs.copy(number)) is None


def test_damaged_files_are_read_or_refused_in_one_line(inputs):
    said = []
    for number in range(1000, 1000 + COUNT.get(inputs.name, 12)):
        said.append(refusal(inputs, inputs.damaged(0, number)[0]))
    assert any(said)


READ = {  # bombs that harm nobody: limited by the library, or odd but sound
    "65 thousand fields",
    "array of 4 million bytes",
    "a key of its own in every row",
    "a key of its own in every object",
    "a key of its own in every message",
    "paths of pictures in Parquet",
    "rows that are none",
    "a deep row",
    "a shard with a long name",
}


def test_bombs_are_refused(inputs, monkeypatch):
    for module in ("jaxdistill._memory", "jaxdistill.train.data"):
        monkeypatch.setattr(f"{module}.available_memory", lambda: 2**30)
    for number, (what, _) in enumerate(inputs.bombs):
        said = refusal(inputs, inputs.bomb(number)[0])
        assert said or what in READ, what
