"""One way in: a model from a directory, a GGUF file or the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig, config_from_hf, with_stop_ids
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.finite import check_finite
from jaxdistill.models.gguf import read_gguf, read_gguf_config
from jaxdistill.models.gguf_layout import one_line
from jaxdistill.models.hf import load_hf, read_hf_config, read_json
from jaxdistill.models.quantized import is_quantized, load_activations, load_quantized
from jaxdistill.models.sharding import Layout, place
from jaxdistill.models.tokenizer import Tokenizer, fingerprint, load_tokenizer
from jaxdistill.quant.policy import (
    ActivationRules,
    dequantize_params,
    fake_quant_activations,
)

ACCEPTED = (
    "a run directory, a Hugging Face model directory, a .gguf file, or a hub name such as org/name"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_TEMPLATES = "additional_chat_templates/*.jinja"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Hold a model as it was read.

    Attributes:
        config: the decoder's shape. Its stop ids are those of config.json, generation_config.json
            and the tokenizer together.
        params: float32 arrays, layers stacked on axis 0, kernels ``[in, out]``; a quantized model's
            kernels in the stored form, see ``models.quantized``.
        tokenizer: None where the source has no tokenizer.
        source: what the user gave, for messages and reports.
        activations: how a quantized model's activations are quantized; empty for float.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str
    activations: ActivationRules = ()

    def text_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raise ``UserError`` where the source has none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source} has no tokenizer; give a model directory with tokenizer.json"
            )
        return self.tokenizer

    def floats(self) -> Model:
        """Return the model with float weights: a quantized one may teach too."""
        return dataclasses.replace(self, params=jax.jit(dequantize_params)(self.params))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text."""
        return self.config.eos_token_ids

    def apply_fn(self, **options: Any) -> Callable[..., Any]:
        """Return ``make_apply`` of this model; stored integers are dequantized inside the scan."""
        activation = fake_quant_activations(self.activations)
        return make_apply(
            self.config, transform=dequantize_params, activation=activation, **options
        )


def load_model(source: str | Path, layout: Layout = "sharded") -> Model:
    """Read a model and its tokenizer.

    Args:
        source: a run directory (its student), an HF directory (config.json and safetensors), a
            ``.gguf`` file, or the name of a model on the Hugging Face Hub, which is fetched into
            the user's hub cache.
        layout: how the params lie on the present mesh, see ``models.sharding``. A directory's
            float weights and a run's are read straight into their places; a ``.gguf`` file's go
            through the host as a whole.

    Raises:
        UserError: the source is none of these, cannot be fetched or read, or has a tokenizer with
            ids beyond the model's vocabulary; or a weight is NaN or infinite.
    """
    text = str(source)
    path = _path_of(text)
    if path.is_dir():
        stored = next((d for d in (path, path / "student") if is_quantized(d)), None)
        if stored is not None:
            config, params, tokenizer = load_quantized(stored, layout)
            model = Model(
                config=config,
                params=params,
                tokenizer=tokenizer,
                source=text,
                activations=load_activations(stored),
            )
        elif (path / "student" / "config.json").is_file():
            model = _from_directory(path / "student", text, layout)
        elif (path / "metrics.jsonl").is_file():
            raise UserError(f"{text} is a run without a finished student; finish it with --resume")
        elif not (path / "config.json").is_file():
            raise UserError(f"{text} is a directory without config.json; accepted: {ACCEPTED}")
        else:
            model = _from_directory(path, text, layout)
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{text} is a file, but not a .gguf file; accepted: {ACCEPTED}")
        model = _from_gguf(path, text)
    elif isinstance(source, str) and path.suffix.lower() != ".gguf" and _is_hub_name(text):
        model = _from_directory(_fetch(text), text, layout)
    else:
        raise UserError(f"{text} does not exist; accepted: {ACCEPTED}; check the path")
    _check_tokenizer(model)
    check_finite(model.params, text)
    eos: Any = None if model.tokenizer is None else model.tokenizer.eos_token_id
    return dataclasses.replace(
        model,
        config=model.config if eos is None else with_stop_ids(model.config, [int(eos)]),
        params=place(model.params, layout),
    )


def _path_of(text: str) -> Path:
    """Return a source as a path; raise ``UserError`` if the file system cannot have such a name."""
    path = Path(text).expanduser()
    try:
        path.exists()
    except (OSError, ValueError) as e:  # a name that is too long, or has a zero in it
        raise UserError(
            f"{text[:100]}... is no path and no hub name ({one_line(e)}); accepted: {ACCEPTED}"
        ) from None
    return path


def _is_hub_name(text: str) -> bool:
    """Tell whether a text can name a model on the Hub, by the Hub's own rules."""
    if not _HUB_NAME.fullmatch(text):
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def shipped_configs() -> tuple[str, ...]:
    """Return the names of the configs that come with the package."""
    files = importlib.resources.files("jaxdistill.models") / "configs"
    return tuple(sorted(f.name.removesuffix(".json") for f in files.iterdir()))


def load_config(source: str | Path) -> ModelConfig:
    """Read a model's shape alone: no weights are read.

    Args:
        source: the name of a config that comes with the package, a config.json, an HF directory, a
            run directory (its student), a ``.gguf`` file, or the name of a model on the Hugging
            Face Hub, of which config.json alone is fetched.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    path, names = _path_of(str(source)), shipped_configs()
    if str(source) in names:
        file = importlib.resources.files("jaxdistill.models") / "configs" / f"{source}.json"
        return config_from_hf(json.loads(file.read_text()))
    if path.suffix.lower() == ".gguf":
        return read_gguf_config(path)
    if path.is_dir():
        student = path / "student"  # of a run
        path = student if (student / "config.json").is_file() else path
        if (path / "config.json").is_file():
            return read_hf_config(path)
    elif not path.exists() and isinstance(source, str) and _is_hub_name(source):
        path = _fetch(source, ["config.json"]) / "config.json"
    if not path.is_file():
        what = "is a directory without config.json" if path.is_dir() else "does not exist"
        raise UserError(f"{source} {what}; accepted: {', '.join(names)}, a config.json, {ACCEPTED}")
    return config_from_hf(read_json(path, "a model's config.json"))


def check_same_vocabulary(teacher: Model, student: Model) -> int:
    """Return the size of the vocabulary that two models share; raise unless they do.

    Logits are compared entry by entry, so token ids must mean the same text in both: the
    fingerprints of the two tokenizers must be equal. The two embedding tables may then be padded to
    different sizes, the smaller one is returned. Two models without any tokenizer are compared by
    size alone.

    Raises:
        UserError: they do not share one; both are named.
    """
    t, s = teacher, student
    sizes = t.config.vocab_size, s.config.vocab_size
    prints = [None if m.tokenizer is None else fingerprint(m.tokenizer) for m in (t, s)]
    if sizes[0] != sizes[1] and (None in prints or prints[0] != prints[1]):
        raise UserError(
            f"the teacher {t.source} has a vocabulary of {sizes[0]} and the student {s.source} one "
            f"of {sizes[1]}; accepted: equal ones; give a student of the teacher's family, or use "
            "a cross-tokenizer objective (uld, span_likelihood)"
        )
    if prints[0] != prints[1]:
        what = [f"tokenizer {p}" if p else "no tokenizer" for p in prints]
        raise UserError(
            f"the teacher {t.source} has {what[0]} and the student {s.source} has {what[1]}; "
            "accepted: the same tokenizer in both; give a student of the teacher's family, or use "
            "a cross-tokenizer objective (uld, span_likelihood)"
        )
    return min(sizes)


def _from_directory(path: Path, source: str, layout: Layout) -> Model:
    config, params = load_hf(path, layout)
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = load_tokenizer(path) if has_tokenizer else None
    return Model(config=config, params=params, tokenizer=tokenizer, source=source)


def _from_gguf(path: Path, source: str) -> Model:
    config, params, tokenizer = read_gguf(path)
    return Model(config=config, params=params, tokenizer=tokenizer, source=source)


def cached_hub_name(source: str) -> str | None:
    """Return ``source`` if it names a hub model that was fetched to here, else None.

    A path such as ``runs/mine`` may look like a hub name; only the cache can tell.
    """
    if not _is_hub_name(source) or Path(source).exists():
        return None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return source if isinstance(found, str) else None


def _fetch(name: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """Return the local copy of a hub model's files, downloading what it lacks."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # "*" matches "/" too: keep to the files at the top.
        path = huggingface_hub.snapshot_download(
            name, allow_patterns=list(files), ignore_patterns=["*/*"]
        )
        if files is _HUB_FILES:
            huggingface_hub.snapshot_download(name, allow_patterns=[_HUB_TEMPLATES])
    except GatedRepoError:
        raise UserError(
            f"{name} is a gated model on the Hugging Face Hub; accept its terms on its page, log "
            "in with `hf auth login`, and run again"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a path here nor a model on the Hugging Face Hub; accepted: "
            f"{ACCEPTED}; check the name, or log in with `hf auth login` if the model is private"
        ) from None
    except Exception as e:  # Whatever fails here (network, cache, disk) is outside this program.
        reason = (str(e).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{name} is no path here and could not be fetched from the Hugging Face Hub "
            f"({type(e).__name__}: {reason}); accepted: {ACCEPTED}; check the name and the "
            "network, or give a directory"
        ) from e
    return Path(path)


def _check_tokenizer(model: Model) -> None:
    """Raise ``UserError`` if the tokenizer can give an id that the embedding table lacks."""
    if model.tokenizer is None:
        return
    ids = max(model.tokenizer.get_vocab().values(), default=-1) + 1
    if ids > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {model.source} has {ids} ids and the model a vocabulary of "
            f"{model.config.vocab_size}; accepted: at most as many; give the tokenizer that "
            "belongs to the model"
        )
