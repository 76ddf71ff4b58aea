"""Every bash and python block in docs/ runs, on a tiny model in place of the real one."""

import dataclasses
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.cli import VERBS, main
from jaxdistill.models import hub
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = "fox dog brown quick over lazy jumps river stone house paper light".split()
HELD = (19, 39)  # the rows of forty that are held out
# Sizes for a tiny model; the options themselves are as they stand in the page.
SMALLER = {
    "--steps": "2",
    "--seq-len": "64",
    "--group-size": "32",
    "--max-new-tokens": "4",
}
SHALLOWER = {"cut:layers=15": "cut:layers=1"}  # of the tiny model's two
# What a page's commands take from an earlier page.
NEEDS = {"cascade.md": "quantize.md"}


def blocks(page: Path, kinds: tuple[str, ...] = ("bash", "python")) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [(kind, block) for kind, block in found if kind in kinds]


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def smaller(words: list[str]) -> list[str]:
    made = [SHALLOWER.get(word, word) for word in words]
    for i, word in enumerate(words[:-1]):
        if word in SMALLER and words[1] not in ("plan", "cost"):
            made[i + 1] = SMALLER[word] if words[i + 1] != "channel" else "channel"
    more = {
        "pilot": "--steps 2 --seq-len 64 --eval-tokens 512 --samples 1 --limit 40 --max-drop 0.2",
        "evaluate-set": "--baselines random --architectures linear --seeds 1 --train-steps 4",
    }
    made += more.get(words[1], "").split()
    return made


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the pages name, and the hub's model in it."""
    rng = np.random.default_rng(0)
    tiny.save_model(tmp_path / "hub", max_position_embeddings=512)
    monkeypatch.setattr(
        hub, "_fetch", lambda name, *_: tmp_path / "hub" if name == MODEL else 1 / 0
    )

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS, count).tolist())

    files = {
        "train": [
            {"text": text(400 if i in HELD else 60), "topic": "ab"[i % 2]} for i in range(40)
        ],
        "test": [{"text": text(50)} for _ in range(4)],
        "rare": [{"text": "the court and the plaintiff"}],
        "labelled": [{"text": text(8), "label": "xy"[i % 2]} for i in range(24)],
        "labelled_test": [{"text": text(8), "label": "xy"[i % 2]} for i in range(8)],
        "questions": [
            {"context": f"row {i}", "choices": WORDS[i % 4 : i % 4 + 2], "label": i % 2}
            for i in range(60)
        ],
    }
    for i, word in zip(HELD, ("court", "plaintiff"), strict=True):
        files["train"][i]["text"] += f" the {word}"
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path) -> list[Path]:
    """Runs a page's blocks; returns what its commands promise to write."""
    scope: dict = {}
    promised = []
    for kind, block in blocks(page):
        if kind == "python":
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                exec(block, scope)
            continue
        for words in commands(block):
            if words[0] == "pip":
                assert words[:3] == ["pip", "install", "."]
            else:
                assert words[0] == "jaxdistill"
                main(smaller(words)[1:])
                promised += [Path(w) for flag, w in pairwise(words) if flag == "--out"]
    return promised


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_every_block_runs(page, place, capsys):
    if page.name in NEEDS:
        kept = blocks(ROOT / "docs" / NEEDS[page.name])[:1]
        for words in commands(kept[0][1]):
            main(smaller(words)[1:])
    for path in run(page):
        assert (place / path).is_file() or any((place / path).iterdir()), path


def test_pages_have_blocks_and_a_place_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    assert sum(len(blocks(page)) for page in PAGES) > 20
    for page in PAGES:
        assert f": {page.name}\n" in site, f"{page.name} is not in mkdocs.yml"


def test_every_verb_has_its_options_in_the_reference():
    page = (ROOT / "docs" / "options.md").read_text()
    wanted = [f"## {k}\n\n::: {v.__module__}.{v.__qualname__}\n" for k, v in VERBS.items()]
    places = [page.find(text) for text in wanted]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "launching.md"])
def test_commands_with_placeholders_name_options_that_exist(page):
    found = 0
    for _, block in blocks(page, ("",)):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("jaxdistill ")[2] if "jaxdistill " in line else ""
            if line.split(maxsplit=1)[:1] and line.split()[0] in VERBS:
                fields = dataclasses.fields(VERBS[line.split()[0]])
                known = {"--" + f.name.replace("_", "-") for f in fields}
                assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= known, line
                found += 1
    assert found >= (20 if page.name == "README.md" else 2)


def test_the_command_line_page_lists_every_verb():
    text = (ROOT / "docs" / "cli.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.M) == list(VERBS)
