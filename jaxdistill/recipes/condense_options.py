"""The options of ``condense``, checked."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from jaxdistill.dd.unroll import Unroll
from jaxdistill.errors import UserError
from jaxdistill.recipes.parallel import Parallel
from jaxdistill.train.guard import Guard, OnSpike

Learned = Literal[
    "meta-gradient",
    "gradient-matching",
    "distribution-matching",
    "trajectory-matching",
    "kernel-ridge",
]
Selected = Literal["random", "herding", "k-center", "el2n", "meta-gradient-score"]
Written = Literal["generated"]
Architecture = Literal["linear", "mlp", "deep_mlp", "convnet", "transformer"]
# Need no labels; the last one learns rows of embeddings, the others select texts.
_PLAIN = ("random", "herding", "k-center", "meta-gradient-score", "meta-gradient")
# Of no use to rows that are learned for one language model's student.
_NOT_FOR_ROWS = (
    "feature_batch",
    "feature_cache",
    "architecture",
    "width",
    "start",
    "networks",
    "slice",
    "per_slice",
)

_UNROLLED = ("meta-gradient", "trajectory-matching", "meta-gradient-score")
# Options that only some methods have a use for.
_USED_BY: dict[str, tuple[str, ...]] = {
    "start": get_args(Learned),
    "soft_labels": get_args(Learned),
    "steps": get_args(Learned),
    "lr": get_args(Learned),
    "networks": get_args(Learned),
    "on_spike": get_args(Learned),
    "spike_sigma": get_args(Learned),
    "learn_rates": ("meta-gradient", "trajectory-matching"),
    "inner_steps": (*_UNROLLED, "gradient-matching"),
    "inner_rate": (*_UNROLLED, "gradient-matching"),
    **dict.fromkeys(
        ("inner_optimizer", "inner_batch", "window", "random_window", "levels", "memory_budget"),
        _UNROLLED,
    ),
    "experts": ("trajectory-matching", "el2n", "meta-gradient-score"),
    "expert_steps": ("trajectory-matching", "el2n", "generated"),
    "expert_span": ("trajectory-matching",),
    "hardness": ("el2n",),
    "as_text": get_args(Learned),
    "prompt": (*get_args(Learned), "generated"),
    "written": ("generated",),
    "slice": tuple(
        method
        for method in (*get_args(Learned), *get_args(Selected))
        if method != "trajectory-matching"  # experts see the data as they are
    ),
}

_LEAST = {
    "per_class": 1,
    "examples": 1,
    "per_slice": 0,
    "seq_len": 1,
    "feature_batch": 1,
    "width": 1,
    "inner_steps": 1,
    "inner_batch": 0,
    "window": 1,
    "levels": 0,
    "steps": 1,
    "networks": 1,
    "batch_size": 1,
    "experts": 1,
    "expert_steps": 2,
    "expert_span": 1,
    "written": 1,
    "seed": 0,
    "checkpoint_every": -1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condense(Parallel):
    """Condense a data set into a few synthetic or selected examples."""

    data: str
    """Labelled data: rows of {"text", "label"} (.jsonl[.gz], .parquet, a directory, a hub data
    set), or an .npz file of images or inputs, and labels. With --examples, plain text."""
    out: Path
    """Run directory: config, metrics, plots, checkpoints, and the set in set/."""
    per_class: int | None = None
    """Examples of each class."""
    examples: int | None = None
    """Examples in all, of plain text for language models: texts selected or, by meta-gradient,
    rows of input embeddings with the teacher's answers, learned."""
    method: Learned | Selected | Written = "meta-gradient"
    """How: learned (the first five), real examples selected, or texts that --model writes for each
    class, confirmed by a classifier of the real data (generated)."""
    model: str | None = None
    """Model that reads the texts: an HF directory, a .gguf file, a run directory or a hub name."""
    level: Literal["features", "embeddings"] = "features"
    """What an example of text is: the model's mean-pooled hidden states, or its input
    embeddings."""
    as_text: Literal["nearest", "perplexity"] | None = None
    """Store learned embeddings as texts: of the nearest tokens, or of near ones that --model finds
    likely."""
    prompt: str | None = None
    """What --model is asked for a text of a class, {label} being its name; with --as-text
    perplexity, what stands before the text."""
    written: int = 32
    """Texts written for each class, of which --per-class are kept."""
    student_init: tuple[str, ...] = ()
    """Of learned rows: what is made of --model for the student that trains on them, as in
    `jaxdistill distill`: cut:layers=N, cut:intermediate=N,heads=N."""
    bits: Literal["none", 2, 3, 4, 8] = "none"
    """Of learned rows: bits of a weight of that student's linear layers; none for float."""
    seq_len: int = 64
    """Tokens of a text that are read; of a learned row, its places."""
    feature_batch: int = 16
    """Texts that the model reads at once."""
    feature_cache: Path | None = None
    """Where the features of texts are kept for later runs; by default --out."""
    architecture: Architecture | None = None
    """Network that is trained on the set; by default mlp, convnet for images, transformer for
    embeddings."""
    width: int = 256
    """Width of its hidden layers."""
    start: Literal["real", "noise"] = "real"
    """What learned examples start from."""
    soft_labels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Learn the labels too, as probabilities; of learned rows, the teacher's answers."""
    learn_rates: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Learn the inner learning rates: one a step (trajectory-matching: one)."""
    inner_steps: int = 20
    """Steps that a network is trained on the set (gradient-matching: at most)."""
    inner_optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """How it is trained."""
    inner_rate: float = 0.05
    """Its learning rate, or the first one with --learn-rates."""
    inner_batch: int = 0
    """Examples of the set a step; 0 for all."""
    window: int | None = None
    """Steps that are differentiated; by default all."""
    random_window: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Put the window at a random place (RaT-BPTT) instead of the end."""
    levels: int = 2
    """Levels of checkpoints through the inner steps: more need less memory and more time."""
    memory_budget: int | None = None
    """Mebibytes (2**20 bytes) for those checkpoints; chooses the levels itself."""
    steps: int = 400
    """Updates of the set."""
    lr: float = 0.02
    """Learning rate of those updates, Adam with a cosine decay."""
    networks: int = 1
    """Fresh networks that an update is the mean of."""
    batch_size: int = 256
    """Real examples (rows of text) an update."""
    experts: int = 4
    """Networks trained on the real data, whose trajectories are matched or who score examples."""
    expert_steps: int = 100
    """Steps that they are trained."""
    expert_span: int | None = None
    """Trajectory-matching: steps of an expert that --inner-steps on the set must reproduce; by
    default half of --expert-steps."""
    hardness: Literal["auto", "easiest", "hardest"] = "auto"
    """El2n: which examples to keep. auto: the easiest where --per-class is less than half of the
    class, else the hardest."""
    per_slice: int = 0
    """Examples of each slice at least, within the whole."""
    slice: tuple[str, ...] = ()
    """Named rare slices: a column of the data, NAME=REGEX over the text, longest:SHARE,
    rare_words:SHARE or rare_labels:SHARE."""
    mix: tuple[str, ...] = ()
    """Where rows of embeddings are learned: curated rare texts mixed into the data, FILE:RATE, the
    share that they shall be of all texts. In what is selected --slice and --per-slice keep rare
    examples."""
    seed: int = 0
    """Of everything random."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0 for four in a run, -1 for none."""
    on_spike: OnSpike = "stop"
    """What a NaN or infinite loss or gradient does, or a spike: stop, or rollback to the last
    checkpoint and on without the batches since, at most three times."""
    spike_sigma: float = 0.0
    """A loss this many robust standard deviations above the median of the last 128 is a spike;
    0 for none."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in --out from its last checkpoint."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if isinstance(given, np.generic):  # which JSON does not know
                object.__setattr__(self, name, given.item())
        for name, least in _LEAST.items():
            given = getattr(self, name)
            if given is not None and given < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {given} given; accepted: {least} or more")
        for name in ("lr", "inner_rate"):
            given = getattr(self, name)
            if not 0 < given < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {given} given; accepted: above 0, and finite")
        if (self.per_class is None) == (self.examples is None):
            raise UserError(
                "give either --per-class N, of labelled data, or --examples N, of plain text"
            )
        if self.examples is not None and self.method not in _PLAIN:
            raise UserError(
                f"--method {self.method} given for plain text; accepted: {', '.join(_PLAIN)}; "
                "choose one, or give labelled data and --per-class"
            )
        self._check_rows()
        self._check_words()
        if self.mix and (self.examples is None or not self.learns):
            raise UserError(
                "--mix given; accepted with --examples and --method meta-gradient; elsewhere "
                "--slice and --per-slice keep rare examples"
            )
        if bool(self.slice) != bool(self.per_slice):
            raise UserError("--slice and --per-slice belong together; give both, or neither")
        self._check_effects()
        if self.random_window and self.window is None:
            raise UserError("--random-window given without --window; give its length")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise UserError(f"--memory-budget {self.memory_budget} given; accepted: 1 or more")
        if self.expert_span is not None and self.expert_span > self.expert_steps:
            raise UserError(
                f"--expert-span must be at most --expert-steps ({self.expert_steps}), got "
                f"{self.expert_span}"
            )
        _ = self.unroll, self.guard

    def _check_effects(self) -> None:
        """Raise ``UserError`` on an option that the method has no use for."""
        own = {f.name: f.default for f in dataclasses.fields(self)}
        for name, methods in _USED_BY.items():
            if getattr(self, name) != own[name] and self.method not in methods:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} given with --method {self.method}, which has no use for it; "
                    f"accepted with {', '.join(methods)}; leave it out"
                )
        if self.slice and self.start == "noise":
            raise UserError("--slice given with --start noise, which belongs to no slice; drop one")

    def _check_words(self) -> None:
        """Raise ``UserError`` on what texts cannot be made with."""
        if self.as_text and (self.level != "embeddings" or self.examples is not None):
            raise UserError(
                f"--as-text {self.as_text} given; accepted with --level embeddings and --per-class"
            )
        if self.method == "generated" and (self.prompt is None or self.level != "features"):
            raise UserError(
                "--method generated writes texts by --prompt and reads their features; give "
                '--prompt "Write a short news item about {label}.", and leave out --level'
            )
        if self.method == "generated" and self.model is None:
            raise UserError("--method generated has no model that writes; give --model")
        if self.prompt is None:
            return
        if self.method != "generated" and self.as_text != "perplexity":
            raise UserError(
                "--prompt given; accepted with --method generated and --as-text perplexity"
            )
        if "{label}" not in self.prompt:
            raise UserError(
                f"--prompt {self.prompt!r} given; accepted: a text with {{label}} in it, where the "
                "name of the class goes"
            )

    def _check_rows(self) -> None:
        """Raise ``UserError`` on what rows for a language model are not learned with."""
        student = self.student_init or self.bits != "none"
        if self.examples is None or not self.learns:
            if student:
                flag = "student-init" if self.student_init else "bits"
                raise UserError(
                    f"--{flag} given, which is of the student that learns from learned rows; "
                    "accepted with --examples and --method meta-gradient; leave it out"
                )
            return
        if self.model is None:
            raise UserError(
                "no teacher for rows that are learned for language models; give --model, an HF "
                "directory, a .gguf file or a hub name, or select texts: --method random"
            )
        if not student:
            raise UserError(
                "the student that trains on the rows is its teacher, which has nothing to learn; "
                "give --student-init or --bits, or select texts: --method random"
            )
        own = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _NOT_FOR_ROWS:
            if getattr(self, name) != own[name]:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} given with rows that are learned for language models, which have "
                    "no use for it; leave it out, or select texts: --method random"
                )

    @property
    def learns(self) -> bool:
        """Return whether the method learns examples; else it selects real ones."""
        return self.method in get_args(Learned)

    @property
    def guard(self) -> Guard:
        """Return what is done about bad losses."""
        return Guard(on_spike=self.on_spike, spike_sigma=self.spike_sigma)

    @property
    def unroll(self) -> Unroll:
        """Return how the inner training is differentiated."""
        budget = self.memory_budget
        return Unroll(
            steps=self.inner_steps,
            window=self.window,
            placement="random" if self.random_window else "end",
            levels=self.levels,
            memory_budget=None if budget is None else budget * 2**20,
        )


def condense_identity(o: Condense) -> dict[str, Any]:
    """Return the options that make a run what it is; a resumed run must have the same."""
    free = (
        *("out", "resume", "json", "feature_cache", "checkpoint_every", "on_spike", "spike_sigma"),
        *("mesh", "hosts"),
    )
    kept = {k: v for k, v in dataclasses.asdict(o).items() if k not in free}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
