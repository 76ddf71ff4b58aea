"""The data of the study: texts as SmolLM2's features, and scikit-learn's digits, as .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill._progress import ItemProgress
from jaxdistill.evals.features import text_features
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.train.labelled import load_labelled
from jaxdistill.train.slices import slices_of

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "cls"
WORK = ROOT / "runs" / "dataset_distillation"
SEQ_LEN, LAYERS = 48, 8


class Problem(NamedTuple):
    """Say where a problem's arrays and texts are.

    Attributes:
        train: an .npz file of inputs, labels, and whatever slices there are.
        test: the same.
        per_class: numbers of examples a class that are studied.
        networks: that are trained on each set.
    """

    train: Path
    test: Path
    per_class: tuple[int, ...]
    networks: tuple[str, ...]


# Named rare cases, as regular expressions over the text.
SLICES = {"ag_news": {"oil": r"\boil\b"}}
FILES = {"ag_news": ("ag_news_train", "ag_news_dev"), "sst2": ("sst2_train", "sst2_dev")}


def texts_of(name: str) -> tuple[Any, Any]:
    """Return the labelled texts of a problem: (training, test)."""
    train, test = (load_labelled(str(DATA / f"{file}.jsonl.gz")) for file in FILES[name])
    return train, test


def problem(name: str) -> Problem:
    """Return a problem; its arrays are made where they are not there yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    files = [WORK / f"{name}_{part}.npz" for part in ("train", "test")]
    if not all(file.is_file() for file in files):
        (_digits if name == "digits" else _features)(name, files)
    if name == "digits":
        return Problem(*files, (1, 10), ("mlp", "convnet"))
    return Problem(*files, (5, 1, 20), ("mlp", "linear"))


def _digits(name: str, files: list[Path]) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    for file, rows in zip(files, (order[360:], order[:360]), strict=True):
        np.savez(file, images=images[rows], labels=labels[rows])


def _features(name: str, files: list[Path]) -> None:
    model = load_model(embedded_model()).floats()
    for file, data in zip(files, texts_of(name), strict=True):
        with ItemProgress() as progress:
            task = progress.add_task(f"features of {file.stem}", total=len(data))
            inputs = text_features(
                model,
                data.texts,
                seq_len=SEQ_LEN,
                layers=LAYERS,
                progress=lambda n, task=task, bar=progress: bar.advance(task, n),
            )
        masks = slices_of(data.described, [f"{k}={v}" for k, v in SLICES.get(name, {}).items()])
        np.savez(file, inputs=inputs, labels=data.labels, **masks)
