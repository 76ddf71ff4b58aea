"""Judge a set by fresh networks trained on it, beside full data and selections of equal size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from jaxdistill._progress import ItemProgress
from jaxdistill.dd.classification import classification_loss
from jaxdistill.dd.inner import inner_optimizer
from jaxdistill.dd.meta_gradient import inner_rates
from jaxdistill.dd.selection import select
from jaxdistill.dd.stored_set import StoredSet, load_set
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.errors import UserError
from jaxdistill.evals.judge_set import Judged, Trainer, judge_own, make_judge
from jaxdistill.models.classifiers import NAMES, Classifier, make_classifier
from jaxdistill.recipes.condense_data import Real, model_of, read_real
from jaxdistill.report.condense_plots import plot_comparison
from jaxdistill.train.labelled import Labelled, held_out_rows, load_labelled
from jaxdistill.train.run_directory import write_json
from jaxdistill.train.slices import slices_of

_SELECTIONS = ("random", "herding", "k-center")
_BASELINES = ("full", *_SELECTIONS)
_USUAL = {
    "features": "linear,mlp,deep_mlp",
    "images": "linear,mlp,convnet",
    "embeddings": "transformer",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSet:
    """Evaluate a set: train fresh networks on it, on full data and on selections of its size."""

    set: Path
    """The set: the --out of a `jaxdistill condense`, or a directory that holds a set."""
    test: str
    """Labelled test data."""
    data: str | None = None
    """Training data of the baselines; by default what the set was made of."""
    baselines: str = ",".join(_BASELINES)
    """What it stands beside, with commas: full (all the data), random, herding, k-center; or
    none."""
    architectures: str | None = None
    """Networks that are trained, with commas: linear, mlp, deep_mlp, convnet, transformer; by
    default those that fit the data."""
    width: int = 256
    """Width of their hidden layers."""
    seeds: int = 3
    """Fresh networks of each kind."""
    rates: tuple[float, ...] = Trainer().rates
    """Adam's rates that are tried on held-out training data, the same for every set."""
    train_steps: int = Trainer().steps
    """Most steps of training; 3, 10 and 30 % of them are tried too."""
    batch_size: int = Trainer().batch_size
    """Examples a step; a smaller set is taken whole."""
    feature_batch: int = 16
    """Texts that the model reads at once."""
    feature_cache: Path | None = None
    """Where the features of texts are kept; by default the run that holds the set, else --out."""
    seed: int = 0
    """Of the networks, the random selections and the held-out part."""
    out: Path | None = None
    """Directory of results.json and pictures; by default evaluation, in the run."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""

    def __post_init__(self) -> None:
        _ = self.trainer, self.beside
        kinds = (self.architectures or "").split(",")
        if len(set(kinds)) < len(kinds):
            raise UserError(f"--architectures {self.architectures} given; accepted: each once")
        for name, least in (("width", 1), ("feature_batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)} given; accepted: {least} or more")
        for name in (self.architectures or "").split(",") if self.architectures else ():
            if name not in NAMES:
                raise UserError(
                    f"--architectures {self.architectures} given; accepted: {', '.join(NAMES)}, "
                    "with commas"
                )

    @property
    def trainer(self) -> Trainer:
        """Return how every set is trained on."""
        return Trainer(
            rates=self.rates, steps=self.train_steps, batch_size=self.batch_size, seeds=self.seeds
        )

    @property
    def beside(self) -> list[str]:
        """Return the baselines' names."""
        names = [] if self.baselines == "none" else self.baselines.split(",")
        for name in names:
            if name not in _BASELINES:
                raise UserError(
                    f"--baselines {self.baselines} given; accepted: {', '.join(_BASELINES)}, with "
                    "commas, or none"
                )
        return names


def evaluate_set(o: EvaluateSet, console: Console | None = None) -> dict[str, Any]:
    """Run the job.

    Returns:
        ``set`` (its method, level and size) and ``results``, a row for each training set and
        architecture: ``name``, ``architecture``, ``examples``, ``mean`` and ``std`` of the accuracy
        over the seeds, ``accuracies``, ``retention`` (the share of full data's mean; None without),
        ``rate``, ``steps``, and ``slices``, the accuracy on each named slice. Training sets are the
        set; a learned set's texts in its place (``set, as text``); the set with the training it was
        made for (``set, own training``); ``full``; and the selections.

    Raises:
        UserError: any input is wrong; no results are written then.
    """
    console = console or Console(stderr=True)
    run, directory = _where(o.set)
    stored = load_set(directory)
    if not stored.classes:
        raise UserError(
            f"{directory} holds text for language models, without classes; train on it with "
            "`jaxdistill distill --data`, or give a set of labelled data"
        )
    reading = _reading(stored, directory)
    if o.data is None and not {"data", "data_fingerprint"} <= set(stored.settings):
        raise UserError(f"{directory} does not say what it was made of; name the data with --data")
    test_data = load_labelled(o.test, "test", classes=stored.classes)
    train_data = load_labelled(o.data or stored.settings["data"], classes=stored.classes)
    print_ = train_data.fingerprint()
    if o.data is None and print_ != stored.settings["data_fingerprint"]:
        raise UserError(
            f"data {train_data.source!r} has the fingerprint {print_}, the set was made of "
            f"{stored.settings['data_fingerprint']}; put that file back, or name one with --data"
        )
    names = (o.architectures or _USUAL[reading["level"]]).split(",")
    nets = [
        make_classifier(
            name,
            input_shape=tuple(reading["shape"]),
            num_classes=len(stored.classes),
            width=o.width,
        )
        for name in names
    ]
    model = model_of(reading)
    if (model is None) != (test_data.texts is None):
        raise UserError(
            f"--test {o.test} are {'arrays' if model else 'texts'}, the set was made of "
            f"{'texts' if model else 'arrays'}; give data of the same kind"
        )
    out = o.out or run / "evaluation"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"{out} cannot be written ({e.strerror or e}); choose another --out"
        ) from None
    cache = o.feature_cache or (run if (run / "config.json").is_file() else out)

    def read(data: Labelled) -> Real:
        return read_real(
            data,
            level=reading["level"],
            model=model,
            batch_size=o.feature_batch,
            cache=cache,
            reading=reading,
            console=console,
        )

    test, real = read(test_data), read(train_data)
    slices = slices_of(test_data.described, stored.settings.get("slices", ()), required=False)
    sets = dict(_sets(o, stored, real, read))
    rest, held = held_out_rows(train_data.labels)
    held = held if len(held) else rest  # classes too small to hold any out
    held_batch = _batch(real, held)
    test_inputs = test.all_inputs()
    rows: list[dict[str, Any]] = []
    with ItemProgress(console) as progress:
        own = _own_training(stored)
        task = progress.add_task("training", total=len(nets) * (len(sets) + bool(own)))
        for net in nets:
            judge = make_judge(net, o.trainer)
            for name, (data, examples) in sets.items():
                full = name == "full"
                judged = judge(
                    _batch(real, rest) if full else data,
                    held_batch,
                    test_inputs,
                    shared=full,
                    refit=data if full else None,
                    seed=o.seed,
                )
                rows.append(_row(name, net, examples, judged, test_data, slices))
                progress.advance(task)
            if own:
                judged = _judge_own(own, stored, net, o.trainer, test_inputs, o.seed)
                size = stored.synthetic.size
                rows.append(_row("set, own training", net, size, judged, test_data, slices))
                progress.advance(task)
    for row in rows:
        best = {r["architecture"]: r["mean"] for r in rows if r["name"] == "full"}
        full = best.get(row["architecture"])
        row["retention"] = row["mean"] / full if full else None
    about = {"method": stored.method, "level": stored.level, "examples": stored.synthetic.size}
    result = {"set": about, "results": rows}
    write_json(out / "results.json", result)
    drawn = [row | ({"name": "full data"} if row["name"] == "full" else {}) for row in rows]
    plot_comparison(out / "comparison.png", drawn)
    return result


def _where(given: Path) -> tuple[Path, Path]:
    """Return (the directory that holds the set's, the set's own)."""
    inside = given / "set"
    return (given, inside) if inside.is_dir() else (given.absolute().parent, given)


def _reading(stored: StoredSet, directory: Path) -> dict[str, Any]:
    """Return how a set's data were read; raise ``UserError`` where it does not say what it must."""
    if "labels" not in stored.synthetic.batch():
        raise UserError(
            f"{directory} has no labels, and selections of as many a class stand beside it; give "
            "a set that `jaxdistill condense` made of labelled data"
        )
    reading = stored.settings.get("reading")
    reads = {} if not isinstance(reading, dict) else reading
    missing = [f"reading/{k}" for k in ("level", "shape", "model") if k not in reads]
    if missing:
        raise UserError(
            f"{directory} does not say how its data were read (no {', '.join(missing)} among its "
            "settings); give a set that `jaxdistill condense` made"
        )
    return reads


def _batch(real: Real, rows: np.ndarray) -> dict[str, Any]:
    labels = jnp.asarray(real.data.labels[rows])
    return {"inputs": jnp.asarray(real.inputs(rows)), "labels": labels}


def _sets(
    o: EvaluateSet, stored: StoredSet, real: Real, read: Any
) -> Iterator[tuple[str, tuple[dict[str, Any], int]]]:
    """Yield name, batch and size of every training set; all but full have one set a seed."""
    whole = stored.synthetic.batch()
    labels = stored.labels()[0].astype(np.int32)
    as_text = None
    learned = "rows" in stored.settings and _is_learned(stored)
    if stored.texts is not None and (learned or stored.level == "text"):
        in_words = Labelled(labels=labels, classes=stored.classes, texts=list(stored.texts))
        as_text = jnp.asarray(read(in_words).all_inputs())
    if stored.level == "text":
        whole |= {"inputs": as_text}
    own = {k: whole[k] for k in ("inputs", "labels", "label_logits") if k in whole}

    def each(batch: dict[str, Any]) -> dict[str, Any]:
        return {k: jnp.stack([jnp.asarray(x)] * o.seeds) for k, x in batch.items()}

    size = stored.synthetic.size
    yield "set", (each(own), size)
    if as_text is not None and stored.level != "text":
        yield "set, as text", (each(own | {"inputs": as_text}), size)
    counts = {int(c): int(n) for c, n in zip(*np.unique(labels, return_counts=True), strict=True)}
    rest, _ = held_out_rows(real.data.labels)
    for name in o.beside:
        if name == "full":
            yield name, (_batch(real, np.arange(len(real.data))), len(real.data))
            continue
        seeds = range(o.seed, o.seed + o.seeds) if name == "random" else [o.seed]
        picked = [
            rest[
                select(
                    name,
                    real.features[rest],
                    real.data.labels[rest],
                    counts,
                    seed,
                    real.data.classes,
                )
            ]
            for seed in seeds
        ]
        picked = picked if len(picked) == o.seeds else picked * o.seeds
        parts = [_batch(real, rows) for rows in picked]
        yield name, ({k: jnp.stack([part[k] for part in parts]) for k in parts[0]}, size)


def _is_learned(stored: StoredSet) -> bool:
    return stored.method not in (*_SELECTIONS, "el2n", "meta-gradient-score")


def _own_training(stored: StoredSet) -> dict[str, Any] | None:
    """Return the training that a set was made for; None where it was made for any."""
    # The others match what is not a training from the start, and texts are not what was trained on.
    if stored.method != "meta-gradient" or stored.level == "text":
        return None
    return {k: v for k, v in stored.settings.items() if k.startswith("inner_")}


def _judge_own(
    own: dict[str, Any],
    stored: StoredSet,
    net: Classifier,
    trainer: Trainer,
    test_inputs: Any,
    seed: int,
) -> Judged:
    """Train as the set was made to be trained on: its optimizer, steps and rates."""
    steps, rate = own["inner_steps"], own["inner_rate"]
    run = make_unroll(
        classification_loss(net.apply),
        inner_optimizer(own["inner_optimizer"]),
        Unroll(steps=steps, levels=0),
        inner_batch=own["inner_batch"] or None,
    )
    rates = inner_rates(stored.synthetic, rate, steps)
    batch = stored.synthetic.batch()
    predictions = judge_own(
        net, lambda params, key: run(params, batch, rates, key), trainer, test_inputs, seed
    )
    return Judged(predictions=predictions, rate=float(jnp.mean(rates)), steps=steps)


def _row(
    name: str,
    net: Classifier,
    examples: int,
    judged: Judged,
    test: Labelled,
    slices: dict[str, np.ndarray],
) -> dict[str, Any]:
    report = judged.report(test.labels, slices)
    return {"name": name, "architecture": net.name, "examples": examples, **report}
