"""What a condensing run says of itself: what was learned, README, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console

from jaxdistill._disk import write_whole
from jaxdistill.dd.stored_set import StoredSet, save_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.text import nearest_examples, nearest_tokens
from jaxdistill.evals.features import embedding_table
from jaxdistill.mesh import on_primary
from jaxdistill.models.hub import Model
from jaxdistill.recipes.condense_data import Real
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.report.condense_plots import examples_table, plot_condense, plot_images
from jaxdistill.train.run_directory import RunDirectory, read_metrics, write_json


def nearest_texts(
    o: Condense, real: Real, synthetic: Synthetic, rows: np.ndarray
) -> tuple[str, ...] | None:
    """Return a text for each example: itself, or the nearest real one, or its nearest tokens."""
    texts, model = real.data.texts, real.model
    if texts is None or model is None:
        return None
    if not o.learns:
        return tuple(texts[i] for i in rows)
    inputs = np.asarray(synthetic.learned["inputs"])
    if real.level == "features":
        labels = np.asarray(synthetic.fixed["labels"])
        near = nearest_examples(inputs, real.features, real.data.labels, labels)
        return tuple(texts[i] for i in near)
    return nearest_words(model, inputs, np.abs(inputs).max(axis=-1) > 0)  # zeros are padding


def nearest_words(
    model: Model, embeddings: Float[np.ndarray, "M T D"], shown: Bool[np.ndarray, "M T"]
) -> tuple[str, ...]:
    """Return the nearest tokens of each row of embeddings as a text, of the places shown."""
    table = jnp.asarray(embedding_table(model))
    ids = np.asarray(nearest_tokens(jnp.asarray(embeddings), table))
    decode = model.text_tokenizer().decode
    return tuple(
        str(decode(row[mask].tolist(), skip_special_tokens=True))
        for row, mask in zip(ids, shown, strict=True)
    )


def report_set(
    run: RunDirectory, stored: StoredSet, real: Real | None, seconds: float, console: Console
) -> dict[str, Any]:
    """Write the set, ``results.json``, pictures and the run's README; return the results."""
    rows = read_metrics(run.path)
    result: dict[str, Any] = {
        "method": stored.method,
        "level": stored.level,
        "examples": stored.synthetic.size,
        "classes": len(stored.classes),
        "slices": {name: len(members) for name, members in stored.slices.items()},
        "set": str(run.path / "set"),
        "seconds": seconds,
    }
    if rows:
        part = max(1, len(rows) // 10)
        losses = [row["loss"] for row in rows]
        result["first_loss"] = float(np.mean(losses[:part]))
        result["last_loss"] = float(np.mean(losses[-part:]))
    on_primary(lambda: _write(run, stored, real, result, rows), f"write {run.path}")
    run.close()
    console.print(
        f"{result['examples']} examples by {stored.method} in {seconds:,.0f} s: {result['set']}"
    )
    return result


def _write(
    run: RunDirectory,
    stored: StoredSet,
    real: Real | None,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """Write what ``report_set`` says."""
    save_set(run.path / "set", stored)
    if rows:
        plot_condense(run.path / "plots", rows)
    write_json(run.path / "results.json", result)
    if stored.level == "images" and real is not None and (*real.shape, 1)[2] in (1, 3):
        plots = run.path / "plots"
        plots.mkdir(exist_ok=True)
        titles = [stored.classes[label] for label in stored.labels()[0]]
        plot_images(plots / "set.png", _pixels(stored, real), titles)
    table = _table(stored)
    write_whole(run.path / "README.md", _readme(run, stored, result, table))


def _pixels(stored: StoredSet, real: Real) -> np.ndarray:
    """Return a set's images with the mean and deviation they were read with put back."""
    mean, deviation = (np.asarray(real.reading[name]) for name in ("mean", "deviation"))
    return np.asarray(stored.synthetic.learned["inputs"]) * deviation + mean


def _table(stored: StoredSet) -> str:
    """Return the examples as Markdown: class, soft label, slices, the nearest or the real text."""
    if not stored.classes:
        return "\n".join(f"- {' '.join(text.split())[:200]}" for text in stored.texts or ()) + "\n"
    labels, probs = stored.labels()
    soft = probs if "label_logits" in stored.synthetic.batch() else None
    columns: dict[str, list[str]] = {}
    if stored.slices:
        members = stored.slices.items()
        columns["slices"] = [
            ", ".join(name for name, rows in members if i in rows) for i in range(len(labels))
        ]
    if stored.texts is not None:
        columns["text"] = list(stored.texts)
    return examples_table(stored.classes, labels.tolist(), columns, soft)


_WHAT = {
    "features": "the nearest real text of each learned example stands beside it",
    "embeddings": "the tokens nearest to each learned embedding stand beside it",
    "text": "learned as embeddings, and stored as what stands for them in words",
}


def _readme(run: RunDirectory, stored: StoredSet, result: dict[str, Any], table: str) -> str:
    learned = "last_loss" in result
    lines = [
        f"# A jaxdistill run: {stored.synthetic.size} examples by {stored.method}\n",
        f"Level: {stored.level}"
        + (f"; {_WHAT[stored.level]}.\n" if learned and stored.texts is not None else ".\n"),
        table,
        "| file | what it is |\n| --- | --- |\n"
        "| set/ | the set: arrays (safetensors), and a data file for other programs |\n"
        "| config.json | every option, and the versions it ran on |\n"
        "| results.json | numbers of the run |\n"
        + (
            "| metrics.jsonl, tensorboard/ | every update's loss |\n"
            "| plots/ | the loss, and images where the set has them |\n"
            "| checkpoints/ | states, for `--resume` |\n"
            if learned
            else ""
        ),
    ]
    if stored.classes:
        lines.append(f"Judge it: `jaxdistill evaluate-set --set {run.path} --test DATA`.\n")
    else:
        lines.append(_use(run, stored))
    return "\n".join(lines)


def _use(run: RunDirectory, stored: StoredSet) -> str:
    """Say how language models train on the set."""
    if stored.level == "text":
        return "Use it: `--data DIR/set` of `jaxdistill distill` and `quantize`.\n"
    made = stored.settings
    student = "".join(f" --student-init {spec}" for spec in made["student_init"])
    student += "" if made["bits"] == "none" else f" --bits {made['bits']}"
    return (
        f"Use it: `jaxdistill distill --teacher {made['reading']['model']}{student} --data "
        f"{run.path}/set --eval-data TEXT --batch-size {stored.synthetic.size} --steps "
        f"{made['inner_steps']} --lr {made['inner_rate']} --out DIR`, the same of `jaxdistill "
        "quantize --model`.\n"
    )


def settings_of(
    o: Condense, reading: dict[str, Any], fingerprint: str, rows: np.ndarray
) -> dict[str, Any]:
    """Return what must be known to train with the set, and where it came from."""
    inner = {
        "inner_steps": o.inner_steps,
        "inner_optimizer": o.inner_optimizer,
        "inner_rate": o.inner_rate,
        "inner_batch": o.inner_batch,
    }
    return {
        "reading": reading,
        "data": str(Path(o.data).absolute()) if Path(o.data).exists() else o.data,
        "data_fingerprint": fingerprint,
        "rows": rows.tolist(),
        "slices": list(o.slice),
        "seed": o.seed,
        **(inner if o.method in ("meta-gradient", "trajectory-matching") else {}),
    }
