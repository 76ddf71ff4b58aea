"""From learned embeddings to text: what is lost on the way, and what text by itself is worth.

AG News, five examples a class. A small transformer reads SmolLM2's input embeddings of the first 24
tokens. Sets: random real texts; embeddings learned by meta-gradients; the nearest tokens of these;
their projection onto likely text (beam search under SmolLM2, a prompt naming the class before it);
texts that SmolLM2 wrote for each class, filtered by a classifier. Every set trains fresh networks,
rate and steps chosen on held-out training data. Results go to ``results/text_level.json``.

    python -m benchmarks.dataset_distillation.text_level
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.dataset_distillation.problems import DATA, LAYERS, SEQ_LEN, WORK, texts_of
from jaxdistill.dd.perplexity_projection import perplexity_projected
from jaxdistill.dd.stored_set import load_set
from jaxdistill.dd.text import filter_generated, generate_texts, nearest_tokens
from jaxdistill.evals.features import embed, embedding_table, moments, text_features, token_ids
from jaxdistill.evals.judge_set import Trainer, make_judge
from jaxdistill.models.classifiers import make_classifier
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.train.labelled import held_out_rows

OUT = Path(__file__).parent / "results" / "text_level.json"
LENGTH, PER_CLASS, WIDTH, SEEDS, WRITTEN = 24, 5, 64, (0, 1), 32
TOPICS = ("world politics", "sports", "business and the economy", "science and technology")
TRAINER = Trainer(rates=(1e-3, 3e-3, 1e-2), steps=200, seeds=3)


def main() -> None:
    """Make all sets and judge them."""
    train, test = texts_of("ag_news")
    model = load_model(embedded_model()).floats()
    table = embedding_table(model)
    scale = np.float32(1 / np.sqrt(np.mean(np.square(table), dtype=np.float64)))
    shape = (LENGTH, table.shape[1])
    net = make_classifier("transformer", input_shape=shape, num_classes=4, width=WIDTH)
    judge = make_judge(net, TRAINER)
    train_ids, train_lengths = token_ids(model, train.texts, LENGTH)
    test_ids, test_lengths = token_ids(model, test.texts, LENGTH)
    seen = embed(table * scale, test_ids, test_lengths)
    rest, held = held_out_rows(train.labels)

    def inputs_of(ids: Any, lengths: Any) -> jax.Array:
        return jnp.asarray(embed(table * scale, np.asarray(ids), np.asarray(lengths)))

    held_batch = {
        "inputs": inputs_of(train_ids[held], train_lengths[held]),
        "labels": jnp.asarray(train.labels[held]),
    }
    results: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}

    def judged(name: str, batch: dict[str, Any], **more: Any) -> None:
        found = judge(batch, held_batch, seen, shared=True).report(test.labels, {})
        results[name] = {"accuracies": found["accuracies"], **more}
        OUT.write_text(json.dumps(results, indent=1) + "\n")
        print(name, round(found["mean"], 4), flush=True)

    if "full" not in results:
        rows = rest
        whole = {
            "inputs": inputs_of(train_ids[rows], train_lengths[rows]),
            "labels": jnp.asarray(train.labels[rows]),
        }
        judged("full", whole)
    written = _written(model, train, test)
    for seed in SEEDS:
        if f"generated, filtered-{seed}" in results:
            continue
        began = time.perf_counter()
        out = WORK / f"text_level-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        condense(
            Condense(
                data=str(DATA / "ag_news_train.jsonl.gz"),
                out=out,
                per_class=PER_CLASS,
                model=embedded_model(),
                level="embeddings",
                seq_len=LENGTH,
                width=WIDTH,
                soft_labels=True,
                learn_rates=True,
                inner_steps=20,
                steps=300,
                batch_size=128,
                checkpoint_every=-1,
                seed=seed,
            ),
            Console(quiet=True),
        )
        stored = load_set(out / "set")
        batch = stored.synthetic.batch()
        labels = np.asarray(batch["labels"])
        first = np.asarray(stored.settings["rows"])
        judged(
            f"random-{seed}",
            {
                "inputs": inputs_of(train_ids[first], train_lengths[first]),
                "labels": jnp.asarray(labels),
            },
        )
        judged(f"meta-gradient embeddings-{seed}", batch, seconds=time.perf_counter() - began)
        learned = jnp.asarray(batch["inputs"]) / scale
        whole = np.full(len(labels), LENGTH)
        nearest = nearest_tokens(learned, jnp.asarray(table))
        tokenizer = model.text_tokenizer()
        judged(
            f"nearest tokens-{seed}",
            batch | {"inputs": inputs_of(nearest, whole)},
            texts=[tokenizer.decode(ids) for ids in np.asarray(nearest).tolist()],
        )
        began = time.perf_counter()
        prompts = [tokenizer(f"News about {topic}:")["input_ids"] for topic in TOPICS]
        longest = max(map(len, prompts))
        rows_of = [[prompts[i][0]] * (longest - len(prompts[i])) + prompts[i] for i in labels]
        likely = perplexity_projected(
            learned,
            jnp.asarray(table),
            model.apply_fn(),
            model.params,
            weight=0.05,
            rho=float(1 / np.mean(np.sum(np.square(table), axis=1))),
            candidates=32,
            beam=2,
            prefix=jnp.asarray(rows_of, jnp.int32),
            batch_size=20,
        )
        judged(
            f"perplexity-projected-{seed}",
            batch | {"inputs": inputs_of(likely, whole)},
            texts=[tokenizer.decode(ids) for ids in np.asarray(likely).tolist()],
            seconds=time.perf_counter() - began,
        )
        texts, written_labels = written(seed)
        ids, lengths = token_ids(model, texts, LENGTH)
        judged(
            f"generated, filtered-{seed}",
            {"inputs": inputs_of(ids, lengths), "labels": jnp.asarray(written_labels)},
            texts=texts,
        )


def _written(model: Any, train: Any, test: Any) -> Any:
    """Return ``seed -> (texts, labels)``: SmolLM2's own texts, chosen by a classifier of features.

    The classifier is trained on all the training texts.
    """
    here = WORK / "written.json"
    if not here.is_file():
        prompts = [
            f"Write the first two sentences of a newspaper article about {topic}."
            for topic in TOPICS
            for _ in range(WRITTEN)
        ]
        how = Sampling(max_new_tokens=40, temperature=1.0)
        here.write_text(json.dumps(generate_texts(model, prompts, how)))
    texts = json.loads(here.read_text())
    wanted = np.repeat(np.arange(len(TOPICS)), WRITTEN)
    features = text_features(model, texts, seq_len=SEQ_LEN, layers=LAYERS)
    known = np.load(WORK / "ag_news_train.npz")
    mean, deviation = moments(known["inputs"])
    own, real = ((x - mean) / deviation for x in (features, known["inputs"]))
    # A linear classifier by ridge regression; its scores as probabilities.
    targets = np.eye(len(TOPICS))[known["labels"]]
    gram = real.T @ real + len(real) * 0.1 * np.eye(real.shape[1])
    scores = 8 * own @ np.linalg.solve(gram, real.T @ (targets - targets.mean(0)))
    probs = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    def chosen(seed: int) -> tuple[list[str], np.ndarray]:
        some = np.random.default_rng(seed).permutation(len(texts))[: len(texts) * 3 // 4]
        some = np.sort(some)
        rows = some[filter_generated(own[some], wanted[some], probs[some], per_class=PER_CLASS)]
        return [texts[i] for i in rows], wanted[rows].astype(np.int32)

    return chosen


if __name__ == "__main__":
    main()
