"""A real trained model, stories260K, against the golden values that came with its data pack.

The values were computed with NumPy from the original llama2.c files, by code that is not ours:
greedy ids, a logit, the ids of a sentence, and the mean NLL of 100 stories.
"""

import gzip

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.stories260k import load_stories
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling, generate
from jaxdistill.models.hf import save_hf
from jaxdistill.recipes.evaluate import Evaluate, evaluate

GREEDY = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401]
SENTENCE = "Once upon a time, there was a little dog."
SENTENCE_IDS = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 400, 428, 426]


@pytest.fixture(scope="module")
def stories(shared_data):
    model = load_stories(shared_data / "models" / "stories260K")
    return model.config, model.params, model.tokenizer


def test_greedy_ids_and_a_logit(stories):
    config, params, _ = stories
    how = Sampling(max_new_tokens=len(GREEDY))
    assert generate(make_apply(config), params, config, [[1]], how=how)[0] == GREEDY
    logits = make_apply(config)(params, jnp.asarray([SENTENCE_IDS], jnp.int32)).logits()[0, -1]
    assert np.argsort(logits)[::-1][:5].tolist() == [291, 346, 392, 410, 274]
    assert float(logits[291]) == pytest.approx(15.4211, abs=2e-4)


def test_sentence_has_the_original_ids(stories):
    assert stories[2](SENTENCE)["input_ids"] == SENTENCE_IDS


def test_evaluation_of_a_hundred_stories_is_the_known_nll(stories, shared_data, tmp_path):
    save_hf(tmp_path / "model", *stories)
    with gzip.open(shared_data / "text" / "tinystories_cased.jsonl.gz", "rt") as f:
        rows = [next(f) for _ in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    result = evaluate(
        Evaluate(
            model=str(tmp_path / "model"),
            data=str(tmp_path / "rows.jsonl"),
            seq_len=256,
            packing="none",
        )
    )
    assert result["tokens"] == 24983
    assert result["nll"] == pytest.approx(1.4847, abs=1e-4)
