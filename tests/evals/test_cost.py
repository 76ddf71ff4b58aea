"""Operations, bytes, time and price, by hand."""

import json

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.cost import (
    Use,
    cascade_use,
    forward_flops,
    matrix_params,
    serving,
    stored_bytes,
    training,
    training_flops,
)
from jaxdistill.evals.devices import Device, device, devices
from tests import tiny

LAYERS, WIDTH, INSIDE, VOCABULARY, HEADS, KV_HEADS, HEAD = 3, 64, 96, 90, 4, 2, 16


@pytest.mark.parametrize("seq_len", [32, 1024])
def test_what_remat_adds(seq_len):
    config = tiny.config(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=INSIDE,
        vocab_size=VOCABULARY,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD,
        sliding_window=None,
    )
    up, down = 2 * WIDTH * INSIDE, WIDTH * INSIDE
    around = 2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KV_HEADS * HEAD
    scores = 2 * LAYERS * HEADS * HEAD * seq_len / 2  # each place sees half of the text
    found = {r: training_flops(config, seq_len, remat=r) for r in ("none", "minimal", "full")}
    linear = 2 * LAYERS * (around + up + down) + 2 * VOCABULARY * WIDTH
    assert found["none"]["model"] == pytest.approx(3 * (linear + 2 * scores))
    added = {remat: f["hardware"] - f["model"] for remat, f in found.items()}
    blocks = scores if seq_len > 512 else 0
    assert added["none"] == pytest.approx(blocks)
    assert added["minimal"] == pytest.approx(scores)
    assert added["full"] == pytest.approx(2 * LAYERS * (around + up) + 2 * scores + blocks)


CONFIG = tiny.config(num_layers=LAYERS, sliding_window=None)
TARGET = Device(
    name="d", peak_flops=1e12, memory=2**30, bandwidth=1e9, watts=100.0, price=3.6
)  # a price of 0.001 a second


def test_what_a_request_takes_by_hand():
    """A prompt of 10 tokens in one pass, then 3 more tokens that each read the weights again."""
    linear = 2 * matrix_params(CONFIG)
    width = CONFIG.num_heads * CONFIG.head_dim
    found = serving(CONFIG, TARGET, weights=8e6, prompt=10, new=4, batch=2, mfu=0.5, mbu=0.25)
    first = 10 * (linear + 4 * LAYERS * width * 5)
    later = 3 * (linear + 4 * LAYERS * width * 12)
    assert found.flops == pytest.approx(first + later)
    kept = 2 * LAYERS * CONFIG.num_kv_heads * CONFIG.head_dim * 2  # bytes of a token, 16 bits
    assert found.bytes == pytest.approx(4 * 4e6 + 3 * 12 * kept)
    slow = (4e6 + (3 * (4e6 + 12 * kept))) / 0.25e9  # reading takes longer than computing
    assert found.seconds == pytest.approx(slow)
    assert found.joules == pytest.approx(100 * slow)
    assert found.price == pytest.approx(0.001 * slow)


def test_computing_may_take_longer_than_reading():
    found = serving(CONFIG, TARGET, weights=1.0, prompt=100, new=0, mfu=0.5)
    assert found.seconds == pytest.approx(100 * forward_flops(CONFIG, 100) / 0.5e12)


def test_bytes_of_stored_weights():
    head = CONFIG.vocab_size * CONFIG.hidden_size
    kernels = matrix_params(CONFIG) - head
    assert stored_bytes(CONFIG, 16) == 2 * (kernels + head)
    assert stored_bytes(CONFIG, 4, 32) == pytest.approx(kernels * 4.5 / 8 + head)


def test_a_cascade_takes_every_tier_up_to_the_one_that_answers():
    small, large = Use(1.0, 2.0, 3.0, None, 1.0), Use(10.0, 20.0, 30.0, 5.0, 10.0)
    assert cascade_use([small, large], [0.75, 0.25]) == (3.5, 7.0, 10.5, None, 3.5)
    with pytest.raises(UserError, match="1 in all"):
        cascade_use([small, large], [0.5, 0.4])


def test_training_is_counted_as_a_step_is():
    flops = training_flops(CONFIG, 64, teacher=CONFIG, frozen="v_proj")["model"]
    found = training(
        CONFIG, TARGET, tokens=1e6, seq_len=64, teacher=CONFIG, frozen="v_proj", mfu=0.5
    )
    assert found.seconds == pytest.approx(1e6 * flops / 0.5e12)


def test_devices_of_a_file_join_the_known_ones(tmp_path):
    path = tmp_path / "devices.json"
    own = {"name": "own", "tflops": 2, "gib": 8, "gb_per_s": 100, "watts": 30, "price": 0.5}
    path.write_text(json.dumps({"own": own, "h100": own | {"name": "ours"}}))
    found = device("own", path)
    assert found == Device(
        name="own", peak_flops=2e12, memory=8 * 2**30, bandwidth=1e11, watts=30.0, price=0.5
    )
    assert device("h100", path).name == "ours" and device("h200", path).watts == 700
    assert all(d.bandwidth > 1e11 and d.price is None for d in devices().values())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 3}',
        '{"a": {"name": "a", "tflops": 1, "gib": 1, "gb_per_s": 0}}',
        '{"a": {"name": "a", "tflops": 1, "gib": 1e400, "gb_per_s": 1}}',
        '{"a": {"name": "a", "tflops": 1, "gib": 1, "gb_per_s": 1, "price": -1}}',
    ],
)
def test_a_damaged_file_of_devices(text, tmp_path):
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read .*; accepted: "):
        devices(path)


def test_impossible_numbers():
    with pytest.raises(UserError, match="prompt of 0"):
        serving(CONFIG, TARGET, weights=1.0, prompt=0, new=1)
    with pytest.raises(UserError, match="mfu 0"):
        serving(CONFIG, TARGET, weights=1.0, prompt=1, new=1, mfu=0.0)
