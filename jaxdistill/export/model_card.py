"""Model cards: the README.md that an exported directory carries, made from what its run says.

A card states what the model is, how it was made, how it was measured, how it is loaded, and what
the format does to its values. Its front matter is what the Hugging Face Hub reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from jaxdistill.errors import UserError
from jaxdistill.export.leaves import flat_leaves
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.hf_directory import CARD_MARK
from jaxdistill.models.hub import cached_hub_name
from jaxdistill.models.json_text import read_object
from jaxdistill.report.table import markdown_table

Directory = Literal["hf", "compressed-tensors", "mlx"]
_LIBRARY = {"hf": "transformers", "compressed-tensors": "transformers", "mlx": "mlx"}
# Options that may name files of whoever made the model.
_PATHS = ("model", "teacher", "student", "cache", "data", "eval_data")
_LOAD = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{at}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{at}")
```
""",
    "compressed-tensors": """\
transformers, with `pip install compressed-tensors`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{at}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{at}")
```

vLLM, in float16, for bfloat16 would round the scales: `vllm serve {at} --dtype float16`.
""",
    "mlx": """\
```sh
pip install mlx-lm
mlx_lm.generate --model {at} --prompt "Hello"
```
""",
}
_STORED = {
    "hf": "Every weight is written as the value of its quantization lattice, scale times integer. "
    "The directory is a float model, of a float model's size, whose weights are the quantized ones",
    "compressed-tensors": "Linear layers hold the integers and float16 scales that were trained "
    "and measured, neither derived anew. The embedding table, which readers do not unpack, is "
    "written as the float values of its lattice",
    "mlx": "Every quantized weight holds the integers and scales that were trained and measured, "
    "neither derived anew; a scale of more weights than a group of MLX's is repeated",
}
_ROUNDED = {
    "hf": "rounds them",
    "compressed-tensors": "rounds the table, the norms and the biases",
    "mlx": "holds the same lattice, but MLX rounds each weight to float16 as it unpacks it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run directory says of its student.

    Attributes:
        name: the run's own.
        options: every option it was started with.
        packages: the versions it ran on.
        results: evaluations of teacher, PTQ and student; empty where there are none.
        bits: width of each quantized weight by path.
        activations: whether activations were quantized too.
    """

    name: str
    options: Mapping[str, Any]
    packages: Mapping[str, str]
    results: Mapping[str, Mapping[str, float | int]]
    bits: Mapping[str, int]
    activations: bool

    @property
    def source(self) -> str | None:
        """Return the model it was made from: the one quantized, or a distilled student's."""
        return next(
            (x for k in ("model", "student", "teacher") if (x := self.options.get(k))), None
        )

    @property
    def base_model(self) -> str | None:
        """Return the hub name of the model it was made from; None if it came from elsewhere."""
        return cached_hub_name(self.source or "")

    @property
    def learnt_from(self) -> str:
        """Return what taught it, in words."""
        taught = self.options.get("teacher") or self.options.get("cache")
        if taught in (None, self.source):
            return "it"
        names = str(taught).split(",")
        return ", ".join(_shown("teacher", name) for name in names)


def read_run(run: Path) -> RunFacts:
    """Read a finished run's config.json, results.json and quantization.json.

    Raises:
        UserError: one of them is missing or damaged.
    """
    read: dict[str, Any] = {}
    for name in ("config.json", "results.json", "student/quantization.json"):
        try:
            read[name] = read_object(run / name)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(
                f"cannot read {run / name} ({type(e).__name__}); give the --out of a finished "
                "`jaxdistill quantize`"
            ) from None
    config, results, specs = read.values()
    try:
        return RunFacts(
            name=run.resolve().name,
            options=dict(config.get("options", {})),
            packages=dict(config.get("environment", {}).get("packages", {})),
            results={k: v for k, v in results.items() if isinstance(v, dict) and "nll" in v},
            bits={path: int(spec["bits"]) for path, spec in specs.get("weights", {}).items()},
            activations=bool(specs.get("activations")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{run} is damaged ({type(e).__name__} in its config.json or quantization.json); give "
            "the --out of a finished `jaxdistill quantize`"
        ) from None


def model_card(
    facts: RunFacts,
    config: ModelConfig,
    params: Mapping[str, Any],
    format: Directory,
    *,
    dtype: str = "float32",
    float_head: bool = False,
    at: str = "path/to/this/directory",
) -> str:
    """Return the text of an exported directory's README.md.

    Args:
        facts: what its run says.
        config: the model's shape.
        params: the stored form.
        format: the directory's.
        dtype: the type of its float tensors.
        float_head: whether a quantized head was written in float.
        at: the path that the loading commands give.
    """
    kinds = _kinds(facts, params)
    packed_head = "kernel_q" in params.get("lm_head", {}) and not float_head
    exact = "exactly" if dtype == "float32" else f"in {dtype}, which {_ROUNDED[format]}"
    parts = [
        _front_matter(facts, format, kinds),
        f"# {facts.name}\n",
        CARD_MARK + "\n",
        _what(facts, config, params) + "\n",
        _weights_table(facts, kinds),
        "## How it was measured\n" if facts.results else "",
        markdown_table(facts.results) if facts.results else "",
        _measured(facts),
        "## How it is loaded\n",
        _LOAD[format].format(at=at),
        "## What is stored\n",
        f"{_STORED[format]}. Float tensors are {dtype}: values are held {exact}.\n",
        *_caveats(facts, kinds, config, format, packed_head),
        "## How it was made\n",
        _options_table(facts),
    ]
    return "\n".join(part for part in parts if part)


def description(facts: RunFacts, config: ModelConfig, params: Mapping[str, Any]) -> str:
    """Return the card in short, on one line: what the model is, and its numbers."""
    kinds = _kinds(facts, params)
    how = "; ".join(f"{', '.join(paths)}: {_said(*kind)}" for kind, paths in kinds.items())
    text = f"{_what(facts, config, params)} {how}."
    student, teacher = facts.results.get("student"), facts.results.get("teacher")
    if student and teacher:
        text += (
            f" On {student.get('tokens', 0):,} held-out tokens: perplexity "
            f"{student['perplexity']:.3f} (float model {teacher['perplexity']:.3f})"
        )
        if "kl" in student and "agreement" in student:
            text += f", KL {student['kl']:.4f} nats, equal argmax {student['agreement']:.2%}"
        text += "."
    return text


Kind = tuple[int, int | None, bool]


def _kinds(facts: RunFacts, params: Mapping[str, Any]) -> dict[Kind, list[str]]:
    """Return bits, group size (None for a channel) and symmetry, each with the weights so made."""
    leaves = flat_leaves(params)
    kinds: dict[Kind, list[str]] = {}
    for path, q in leaves.items():
        if not path.endswith("_q"):
            continue
        stem = path.removesuffix("_q")
        axis = -1 if stem.endswith("embedding") else -2
        groups = leaves[f"{stem}_scale"].shape[axis]
        bits = facts.bits.get(stem, 4 if q.dtype.name.endswith("int4") else 8)
        size = None if groups == 1 else q.shape[axis] // groups
        name = stem.rsplit("/", 1)[0].rsplit("/", 1)[-1]
        kinds.setdefault((bits, size, f"{stem}_zero" not in leaves), []).append(name)
    return kinds


def _said(bits: int, size: int | None, symmetric: bool) -> str:
    shared = "output channel" if size is None else f"{size} weights"
    return f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'}, one scale per {shared}"


def _front_matter(facts: RunFacts, format: Directory, kinds: Mapping[Kind, Any]) -> str:
    """Return the YAML that the hub reads; strings are quoted as JSON, which YAML includes."""
    tags = ["jaxdistill", *(f"{bits}-bit" for bits in sorted({bits for bits, _, _ in kinds}))]
    tags += ["knowledge-distillation"] if facts.options.get("steps") else []
    tags += {"hf": [], "compressed-tensors": ["compressed-tensors", "vllm"], "mlx": ["mlx"]}[format]
    lines = ["---", f"library_name: {_LIBRARY[format]}", "pipeline_tag: text-generation"]
    if facts.base_model is not None:
        lines += [f"base_model: {json.dumps(facts.base_model)}", "base_model_relation: quantized"]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    return "\n".join(lines)


def _what(facts: RunFacts, config: ModelConfig, params: Mapping[str, Any]) -> str:
    count = sum(
        leaf.size
        for path, leaf in flat_leaves(params).items()
        if not path.endswith(("_scale", "_zero"))
    )
    steps = facts.options.get("steps")
    how = (
        f"and repaired by {steps} steps of distillation from {facts.learnt_from} (KD-QAT)"
        if steps
        else "post-training, without distillation"
    )
    source = _shown("model", facts.source or "a float model")
    cut = facts.options.get("student_init")
    source += f", made smaller by {', '.join(cut)}" if cut else ""
    return (
        f"A {config.model_type} model of {count / 1e6:,.1f} million parameters: {source}, "
        f"quantized {how}, with jaxdistill."
    )


def _weights_table(facts: RunFacts, kinds: Mapping[Kind, list[str]]) -> str:
    lines = ["| weights | quantization |", "| --- | --- |"]
    lines += [f"| {', '.join(paths)} | {_said(*kind)} |" for kind, paths in kinds.items()]
    return "\n".join([*lines, "| all others | float |", ""])


def _measured(facts: RunFacts) -> str:
    if not facts.results:
        return ""
    tokens = max(int(r.get("tokens", 0)) for r in facts.results.values())
    return (
        f"By jaxdistill's own forward pass, on {tokens:,} held-out tokens. The teacher is the "
        "float model, ptq the model before any training. KL is in nats a token, agreement the "
        "share of equal argmax, MB the weights to serve with float tensors in 16 bits.\n"
    )


def _caveats(
    facts: RunFacts,
    kinds: Mapping[Kind, Any],
    config: ModelConfig,
    format: Directory,
    packed_head: bool,
) -> list[str]:
    """Return what a user of this model in this format would otherwise find out alone."""
    said = []
    if facts.activations:
        said.append(
            "It was trained and measured with quantized activations; this directory holds weights "
            "alone, and programs that load it keep activations in float.\n"
        )
    if format == "compressed-tensors" and packed_head:
        said.append(
            "The head (`lm_head`) is packed as well. Older versions of vLLM, some other programs, "
            "and transformers with `dequantize=True` do not read a packed head; `jaxdistill export "
            "--float-head` writes it in float.\n"
        )
    if format == "compressed-tensors" and not all(symmetric for _, _, symmetric in kinds):
        said.append(
            "Releases 0.18 to 0.20 of the package compressed-tensors cannot load asymmetric layers "
            'into transformers; `pip install "compressed-tensors<0.18"` can.\n'
        )
    if format == "mlx" and config.sliding_window is not None:
        said.append("mlx-lm attends over the whole context, without the sliding window.\n")
    return said


def _options_table(facts: RunFacts) -> str:
    rows = [f"| {k} | {_shown(k, v)} |" for k, v in facts.options.items() if v is not None]
    made = ", ".join(f"{k} {v}" for k, v in facts.packages.items() if v and v[0].isdigit())
    lines = ["| option of the run | value |", "| --- | --- |", *rows]
    return "\n".join([*lines, "", f"Packages: {made}.\n" if made else ""])


def _shown(key: str, value: Any) -> str:
    """Return an option's value; of a file's path its name alone, which is all that others need."""
    text = str(value)
    if key in _PATHS and cached_hub_name(text) is None:
        text = ",".join(PurePath(part).name or part for part in text.split(","))
    return text.replace("|", "\\|").replace("\n", " ")
