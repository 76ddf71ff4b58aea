"""The analysis of a tiny model: its files, its page, its JSON, and bad input in one line."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.kd.signal import by_projection
from jaxdistill.models.hub import load_model
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.measure import flip_rate
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params
from tests import tiny
from tests.test_cli import fails

SMALL = ["--seq-len", "32", "--batch-size", "2", "--eval-tokens", "128"]
MAPS = {"gradient_ce_float", "gradient_ce_ptq", "gradient_kd_ptq", "inflation_ptq", "sqnr_ptq"}
MAPS |= {"clipped_ptq", "drift"}
TRAINED = {"gradient_ce_trained", "gradient_kd_trained", "inflation_trained", "sqnr_trained"}
TRAINED |= {"sqnr_gain_trained", "flips_trained"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.save_model(folder / "model"), tiny.save_text(folder / "text.jsonl", rows=6)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    args = ["quantize", "--model", inputs[0], "--data", inputs[1], "--out", str(out), *SMALL]
    main([*args, "--steps", "2", "--lr", "1e-2", "--bits", "3", "--freeze", "none"])
    return out


@pytest.fixture(scope="module")
def analysed(inputs, run, tmp_path_factory):
    """Analyses model and run once; returns the directory."""
    out = tmp_path_factory.mktemp("analyses") / "a"
    args = ["analyze", "--model", inputs[0], "--data", inputs[1], "--out", str(out), *SMALL]
    main([*args, "--run", str(run)])
    return out


class Links(HTMLParser):
    """Collects whatever a page would load or lead to, and the tags that stay open."""

    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href", "poster", "data")]
        self.scripts += tag == "script"
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_else(analysed):
    page = (analysed / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.open == [] and links.scripts == 0
    assert len(links.links) == 2 * len(MAPS | TRAINED)  # a light and a dark one each
    assert all(link.startswith("data:image/png;base64,") for link in links.links)
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    for word in ("Recommended: freeze", "2403.18159", "v_proj", "SQNR", "3-bit weights"):
        assert word in page


def test_pictures_are_there_and_no_others(analysed):
    assert {p.stem for p in (analysed / "plots").iterdir()} == MAPS | TRAINED
    for path in (analysed / "plots").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json_labels_every_array(analysed, inputs, run):
    report = json.loads((analysed / "signal.json").read_text())
    assert report["quantization"]["bits"] == 3  # the run's
    assert len(report["projections"]) == 7
    for name, array in report["arrays"].items():
        assert array["unit"] and array["meaning"], name
        shape = (3,) if array["axes"] == ["layers passed"] else (2, 7)
        values = np.asarray(array["values"], float)
        assert values.shape == shape and np.isfinite(values).all(), name
    ratio = np.divide(*(report["arrays"][f"{m}/gradient_ce"]["values"] for m in ("ptq", "float")))
    np.testing.assert_allclose(report["arrays"]["ptq/inflation"]["values"], ratio, rtol=1e-12)

    teacher, trained = load_model(inputs[0]), load_model(run)
    policy = default_policy(QuantSpec(bits=3), tied=True)
    ptq = quantize_params(add_scales(teacher.params, policy), policy)
    flips = by_projection(flip_rate(ptq, trained.params), 2)
    assert flips.max() > 0
    np.testing.assert_allclose(report["arrays"]["trained/flips"]["values"], flips, rtol=1e-6)
    assert [m["name"] for m in report["models"]] == ["float", "ptq", "trained"]
    assert report["models"][0]["nll"] > 0 and report["models"][2]["kl"] > 0


def test_again_without_a_run_and_as_json(analysed, inputs, capsys):
    args = ["analyze", "--model", inputs[0], "--data", inputs[1], "--out", str(analysed), *SMALL]
    main([*args, "--bits", "4", "--group-size", "32", "--ranges", "absmax", "--json"])
    captured = capsys.readouterr()
    (line,) = captured.out.strip().splitlines()
    said = json.loads(line)
    assert said["quantization"]["group_size"] == 32 and said["run"] is None
    assert said["recommendation"]["reasons"] and len(said["recommendation"]["ranking"]) == 7
    assert "inflation" in captured.err and "index.html" in captured.err
    assert {p.stem for p in (analysed / "plots").iterdir()} == MAPS
    kept = json.loads((analysed / "signal.json").read_text())
    assert {k: kept[k] for k in said} == said
    # The page tells how to follow the advice, if there is any.
    page = (analysed / "index.html").read_text()
    patterns = said["recommendation"]["patterns"]
    assert bool(patterns) == bool(re.search("jaxdistill quantize .*--freeze", page))


def test_bad_inputs_are_one_line_and_write_nothing(inputs, run, tmp_path, capsys):
    model, data = inputs
    out = tmp_path / "out"
    base = ["analyze", "--model", model, "--data", data, "--out", str(out), *SMALL]
    assert fails(capsys, *base, "--batch-size", "0") == "--batch-size 0 given; accepted: 1 or more"
    said = fails(capsys, *base, "--run", str(run), "--bits", "4")
    assert said == "--bits given with --run, which has its own; leave out one of the two"
    said = fails(capsys, *base, "--run", str(tmp_path / "none"))
    assert "holds no finished student" in said
    said = fails(capsys, *base, "--group-size", "48")
    assert said.startswith("group size 48 does not divide the 64 inputs of layers/")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n')
    said = fails(capsys, *base[:4], str(short), *base[5:])
    assert said.startswith("the data have no target token: none of 1 texts has one within ")
    other = tiny.save_model(tmp_path / "other", intermediate_size=128)
    said = fails(capsys, "analyze", "--model", other, *base[3:], "--run", str(run))
    assert said == (
        f"the student of {run} has (2, 96, 64) at layers/mlp/down_proj/kernel and {other} has "
        "(2, 128, 64); give the --model that the run was made from"
    )
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("keep")
    said = fails(capsys, *base[:5], "--out", str(tmp_path / "mine"))
    assert said == f"{tmp_path / 'mine'} exists and is no analysis; choose another --out"
    assert (tmp_path / "mine" / "precious").read_text() == "keep"
