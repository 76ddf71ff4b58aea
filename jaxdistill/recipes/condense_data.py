"""Real data as a network reads it: features of texts, input embeddings, images; and its batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from rich.console import Console

from jaxdistill._disk import write_whole
from jaxdistill._progress import ItemProgress
from jaxdistill.dd.stored_set import Level
from jaxdistill.errors import UserError
from jaxdistill.evals.features import (
    check_readable,
    embed,
    embedding_table,
    moments,
    text_features,
    token_ids,
)
from jaxdistill.mesh import on_every_host, on_primary
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.hub import Model, load_model
from jaxdistill.train.labelled import Labelled


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Real:
    """Hold real data at one level.

    Attributes:
        data: labels, texts, slices.
        level: what the inputs are.
        inputs: ``rows -> [n, ...]``, standardised.
        features: of all rows, what selection compares: the inputs, flattened; of embeddings their
            mean over the tokens.
        reading: JSON: what other data must be read with to be alike.
        model: that read the texts; None for arrays.
    """

    data: Labelled
    level: Level
    inputs: Callable[[Any], Float32[np.ndarray, "n ..."]]
    features: Float32[np.ndarray, "N F"]
    reading: dict[str, Any]
    model: Model | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example."""
        return self.inputs(np.zeros(1, np.int64)).shape[1:]

    def take(self, rows: Int[np.ndarray, "n"]) -> Real:
        """Return some of the examples."""
        return dataclasses.replace(
            self,
            data=self.data.take(rows),
            inputs=lambda some: self.inputs(rows[some]),
            features=self.features[rows],
        )

    def all_inputs(self) -> Float32[np.ndarray, "N ..."]:
        """Return every example."""
        return self.inputs(np.arange(len(self.data)))


def check_real(data: Labelled, model: str | None, level: Level) -> None:
    """Raise ``UserError`` where texts have no model to read them, or arrays have one."""
    if data.texts is not None and model is None:
        raise UserError(
            f"data {data.source!r} are texts, and no model reads them; give --model, an HF "
            "directory, a .gguf file or a hub name"
        )
    if data.texts is None and (model is not None or level == "embeddings"):
        flag = "--model" if model is not None else "--level embeddings"
        raise UserError(f"{flag} given for data {data.source!r}, which are arrays; leave it out")


def shape_of(
    data: Labelled, level: Level, model: Model | None, seq_len: int
) -> tuple[Level, tuple[int, ...]]:
    """Return the level and the shape that an example will have, before any text is read.

    Raises:
        UserError: the model has no tokenizer, or cannot read texts so long.
    """
    if data.texts is None:
        assert data.inputs is not None  # load_labelled gives one of the two
        return ("features" if data.inputs.ndim == 2 else "images"), data.inputs.shape[1:]
    assert model is not None  # checked by check_real
    check_readable(model, seq_len)
    width = model.config.hidden_size
    return level, ((seq_len, width) if level == "embeddings" else (width,))


def read_real(
    data: Labelled,
    *,
    level: Level,
    model: Model | None = None,
    seq_len: int = 64,
    batch_size: int = 16,
    cache: Path | None = None,
    reading: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Real:
    """Read data as a network will.

    Args:
        data: texts or arrays.
        level: of texts, ``features`` or ``embeddings``; arrays are images or features by their
            shape.
        model: that reads the texts.
        seq_len: tokens of a text.
        batch_size: texts read at once.
        cache: directory where features are kept.
        reading: of the data that these shall be alike; by default their own moments.
        console: where progress is shown.
    """
    known = dict(reading or {})
    if data.texts is None:
        assert data.inputs is not None  # load_labelled gives one of the two
        raw, level = data.inputs, shape_of(data, level, model, seq_len)[0]
        known |= {} if reading else {"seq_len": None, "model": None, "model_fingerprint": None}
    else:
        assert model is not None  # checked by check_real
        if not reading:
            prints = model_fingerprint(model.config, model.params)
            known |= {"seq_len": seq_len, "model": model.source, "model_fingerprint": prints}
        seq_len = known["seq_len"]
        if level == "embeddings":
            return _embeddings(data, model, seq_len, known)
        raw = cached_features(
            model, data.texts, seq_len, known["model_fingerprint"], batch_size, cache, console
        )
    if not reading:
        mean, deviation = moments(raw)
        known |= {"level": level, "mean": mean.tolist(), "deviation": deviation.tolist()}
        known["shape"] = list(raw.shape[1:])
    if list(raw.shape[1:]) != known["shape"]:
        raise UserError(
            f"data {data.source!r} has examples of shape {raw.shape[1:]}, the set's are of "
            f"{tuple(known['shape'])}; give data of the same shape"
        )
    mean, deviation = (np.asarray(known[name], np.float32) for name in ("mean", "deviation"))
    scaled = (raw - mean) / deviation
    return Real(
        data=data,
        level=level,
        inputs=lambda rows: scaled[rows],
        features=scaled.reshape(len(scaled), -1),
        reading=known,
        model=model,
    )


def _embeddings(data: Labelled, model: Model, seq_len: int, known: dict[str, Any]) -> Real:
    """Read texts as their input embeddings, looked up when they are asked for."""
    assert data.texts is not None
    ids, lengths = token_ids(model, data.texts, seq_len)
    table = embedding_table(model)
    known.setdefault("level", "embeddings")
    known.setdefault("scale", float(1 / np.sqrt(np.mean(np.square(table), dtype=np.float64))))
    known.setdefault("shape", [seq_len, table.shape[1]])
    table = table * np.float32(known["scale"])
    features = np.zeros((len(ids), table.shape[1]), np.float32)
    for i, (row, n) in enumerate(zip(ids, lengths, strict=True)):
        features[i] = table[row[:n]].mean(0) if n else 0
    mean, deviation = moments(features)
    return Real(
        data=data,
        level="embeddings",
        inputs=lambda rows: embed(table, ids[rows], lengths[rows]),
        features=(features - mean) / deviation,
        reading=known,
        model=model,
    )


def model_of(reading: Mapping[str, Any]) -> Model | None:
    """Load the model that a set was read with; raise ``UserError`` where it is another one now."""
    if reading.get("model") is None:
        return None
    model = load_model(reading["model"]).floats()
    found = model_fingerprint(model.config, model.params)
    if found != reading["model_fingerprint"]:
        raise UserError(
            f"the model {model.source} has the fingerprint {found}, the set was made with "
            f"{reading['model_fingerprint']}; put that model back, or condense again"
        )
    return model


def cached_features(
    model: Model,
    texts: Sequence[str],
    seq_len: int,
    fingerprint: str,
    batch_size: int = 16,
    cache: Path | None = None,
    console: Console | None = None,
) -> Float32[np.ndarray, "N D"]:
    """Return ``text_features``, from the cache's directory where they were kept there before."""
    digest = hashlib.sha256(f"{fingerprint} {seq_len}".encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    path = None if cache is None else cache / f"features-{digest.hexdigest()[:16]}.npy"
    found = None if path is None else _kept(path, (len(texts), model.config.hidden_size))
    if on_every_host(found is not None):  # else all read the texts together
        assert found is not None
        return found
    with ItemProgress(console) as bar:
        task = bar.add_task("features", total=len(texts))
        made = text_features(
            model,
            texts,
            seq_len=seq_len,
            batch_size=batch_size,
            progress=lambda done: bar.advance(task, done),
        )
    if path is not None:
        on_primary(functools.partial(_keep, path, made), f"write {path}")
    return made


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return an array of a shape that was kept in a file; None where there is none, or damaged."""
    if not path.is_file():
        return None
    try:
        found = np.load(path, allow_pickle=False)
    except Exception:  # numpy raises a dozen kinds for a damaged file
        return None
    return found if isinstance(found, np.ndarray) and found.shape == shape else None


def _keep(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.save(file, array)
    write_whole(path, file.getvalue())


class RealBatches:
    """Serve real examples: ``batches[i]``, of step i, depends on the seed and i alone.

    Args of the constructor: the data; rows a batch; the seed; ``weights`` ``[N]``, how much more
    often than others an example is drawn; ``grouped``, whether a batch has the same number of each
    class, ``[C, n, ...]``.
    """

    def __init__(
        self,
        real: Real,
        batch_size: int,
        seed: int,
        *,
        weights: np.ndarray | None = None,
        grouped: bool = False,
    ) -> None:
        self._real, self._size, self._seed = real, batch_size, seed
        labels = real.data.labels
        share = np.ones(len(labels)) if weights is None else weights.astype(np.float64)
        self._rows = [np.arange(len(labels))]
        if grouped:
            self._rows = [np.flatnonzero(labels == c) for c in range(len(real.data.classes))]
        self._shares = [share[rows] / share[rows].sum() for rows in self._rows]
        self._grouped = grouped
        self._even = weights is None

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Return the batch of step i."""
        rng = np.random.default_rng((self._seed, i))
        each = max(1, self._size // len(self._rows))
        picked = []
        for rows, share in zip(self._rows, self._shares, strict=True):
            if each >= len(rows) and self._even and not self._grouped:
                picked.append(rows)
            else:
                repeat = each > len(rows) or not self._even
                picked.append(rng.choice(rows, each, replace=repeat, p=share))
        rows = np.stack(picked) if self._grouped else picked[0]
        inputs = self._real.inputs(rows.reshape(-1))
        return {
            "inputs": inputs.reshape(*rows.shape, *inputs.shape[1:]),
            "labels": self._real.data.labels[rows],
        }
