"""The list of objectives: complete, in three forms, and the page in docs is the generated one."""

import json
import re
from pathlib import Path

import pytest

from jaxdistill.cli import main
from jaxdistill.losses.loss import parse_term
from jaxdistill.recipes.objectives import objectives, objectives_markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "objectives.md"


def names_in_the_source():
    """Every function behind a @register, read from the files themselves."""
    pattern = re.compile(r"^@register\(.*?^def (\w+)", re.MULTILINE | re.DOTALL)
    files = [p for part in ("losses", "kd") for p in (ROOT / "jaxdistill" / part).glob("*.py")]
    return sorted(name for file in files for name in pattern.findall(file.read_text("utf-8")))


def test_json_lists_every_registered_function(capsys):
    main(["objectives", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(entry["name"] for entry in found) == names_in_the_source()
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["jsd"]["arguments"] == {"beta": 0.5, "temperature": 1.0}
    assert by_name["taid"]["arguments"]["t"] == "adaptive"
    for entry in found:
        texts = ("kind", "summary", "formula", "source", "when", "cost")
        assert all(entry[key].strip() for key in texts), entry["name"]


@pytest.mark.parametrize("entry", objectives(), ids=lambda entry: entry["name"])
def test_the_listed_defaults_can_be_written(entry):
    pairs = ",".join(f"{k}={v}" for k, v in entry["arguments"].items() if v is not None)
    term = parse_term(f"{entry['name']}:{pairs}" if pairs else entry["name"])
    assert term.entry.kind == entry["kind"]


def test_the_table_names_them_all(capsys):
    main(["objectives"])
    said = capsys.readouterr().out
    assert [entry["name"] for entry in objectives() if entry["name"] not in said] == []
    assert "--token-weight" in said


def test_the_page_in_docs_is_the_generated_one(capsys):
    main(["objectives", "--markdown"])
    page = capsys.readouterr().out
    assert page == objectives_markdown()
    assert PAGE.read_text("utf-8") == page, "jaxdistill objectives --markdown > docs/objectives.md"
