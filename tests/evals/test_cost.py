"""FLOPs of a step, by hand."""

import pytest

from jaxdistill.evals.cost import training_flops
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
