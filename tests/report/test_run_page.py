"""A run's page: whole, self-contained, escaped, and without sections that have nothing to show."""

import base64
import html.parser
import re

import pytest

from jaxdistill.evals.cost import Use
from jaxdistill.report.run_page import RunPage, run_page
from jaxdistill.report.slice_plots import draw_slices

RESULTS = {
    "teacher": {"nll": 2.0, "perplexity": 7.389, "kl": 0.0, "agreement": 1.0, "bytes": 1000000},
    "ptq": {"nll": 3.0, "perplexity": 20.09, "kl": 0.9, "agreement": 0.5, "bytes": 300000},
    "student": {"nll": 2.25, "perplexity": 9.488, "kl": 0.3, "agreement": 0.8, "bytes": 300000},
}
ROWS = [{"step": i, "loss": 1.0 / i, "kl": 1.0 / i} for i in range(1, 5)]
SLICES = {
    "all": {
        "items": 40,
        "metrics": {"teacher": {"nll": [2.0, 1.9, 2.1]}, "student": {"nll": [2.2, 2.1, 2.3]}},
        "derived": {"lost": [0.2, 0.15, 0.25]},
    },
    "a<b": {
        "items": 1,
        "metrics": {"teacher": {"nll": [3.0, 2.5, 3.5]}, "student": {"nll": [None, None, None]}},
        "derived": {"lost": [None, None, None]},
    },
}
TIER = {"accuracy": 0.8, "interval": [0.6, 0.9], "cost": 2.0}
CASCADE = {
    "unit": "GB read",
    "questions": {"calibration": 30, "test": 31},
    "target_accuracy": 0.7,
    "max_drop": None,
    "confidence": 0.9,
    "thresholds": [0.61],
    "alone": {"student": TIER, "teacher": TIER | {"accuracy": 0.85}},
    "test": {"accuracy": 0.82, "cost": 2.5, "shares": [0.7, 0.3], "interval": [0.7, 0.9]},
    "curve": {
        "coverage": [0.0, 0.5, 1.0],
        "accuracy": [0.85, 0.84, 0.8],
        "answered": [1.0, 0.9, 0.8],
        "cost": [4.0, 3.0, 2.0],
    },
}
USE = dict(zip(Use._fields, (1e15, 1e12, 3600.0, None, 7.5), strict=True)) | {
    "device_hours": 1.0,
    "kwh": None,
    "seconds_a_request": 0.004,
}
COST = {
    "requests": 1000.0,
    "device": "Chip <1>",
    "training": USE,
    "answers": {"teacher": USE, "student": USE, "cascade": USE},
    "fits": {"student": True, "teacher": True},
    "saved": 0.25,
    "pays_after": 4321.0,
    "formulas": {"flops": "2 N & more"},
}


class Checked(html.parser.HTMLParser):
    """Collects headings and sources; fails on a tag that is closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.sources, self.alts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found[k] for k in ("src", "srcset", "href") if k in found]
        if tag == "img":
            self.alts.append(found["alt"])
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parsed(page):
    reader = Checked()
    reader.feed(page)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page():
    return run_page(
        RunPage(
            title="R <i>",
            facts=["4-bit & more"],
            advice=["Do <this>."],
            warnings=["Mind <that>."],
            results=RESULTS,
            metrics={"student": ROWS},
            slices=SLICES,
            samples=[{"prompt": "Q <1>", "answers": {"teacher": "A & B", "student": "C"}}],
            cascade=CASCADE,
            cost=COST,
            notes={"Cascade": "made of <text>"},
            links={"more": "run/index.html"},
            command=["jaxdistill", "pilot", "--slice", "a b"],
            options={"bits": 4},
            environment={"python": "3", "packages": {"jax": "1"}},
        )
    )


def test_all_sections_in_order_and_nothing_from_elsewhere(page):
    found = parsed(page)
    assert found.headings == [
        "What to do",
        "Before and after",
        "Training",
        "Slices",
        "Side by side",
        "Cascade",
        "Cost",
        "How to do it again",
    ]
    pictures = [s for s in found.sources if s.startswith("data:image/png;base64,")]
    assert found.sources == [*pictures, "run/index.html"]  # no script, style or font to fetch
    assert len(pictures) == 2 * len(found.alts) == 2 * 6  # light and dark
    for source in pictures:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"<script|@import|url\(", page)


def test_text_is_escaped(page):
    for text in ("R &lt;i&gt;", "Do &lt;this&gt;.", "Mind &lt;that&gt;.", "a&lt;b", "Q &lt;1&gt;"):
        assert text in page
    for text in ("Chip &lt;1&gt;", "2 N &amp; more", "made of &lt;text&gt;", "A &amp; B"):
        assert text in page
    assert "jaxdistill pilot --slice &#x27;a b&#x27;" in page


def test_numbers_are_those_given(page):
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert ["teacher", "2.0000", "7.389", "0.0000", "100.00%", "1.0"] == cells[:6]
    assert "2.200 (2.100 to 2.300)" in cells  # a slice
    assert "82.0% (70.0% to 90.0%)" in cells and "student 70.0%, teacher 30.0%" in cells
    assert "25.0% fewer device hours" in page and "4,321 requests" in page


def test_what_is_not_there_has_no_section():
    page = run_page(RunPage(title="bare", results={"start": {"nll": 1.0}, "student": {"nll": 2.0}}))
    assert parsed(page).headings == ["Before and after"]
    alone = run_page(RunPage(title="t", metrics={"student": ROWS}, results=RESULTS))
    assert parsed(alone).alts == ["loss", "kl", "recovered"]


def test_many_slices_with_odd_names_are_drawn():
    of = SLICES["all"]
    many = {
        f"s{i} costs $5 to $\\bad": of | {"derived": {"lost": [float(i), 0.0, 1.0]}}
        for i in range(600)
    }
    (few,) = draw_slices({name: many[name] for name in list(many)[-30:]}, "nll").values()
    (all_,) = draw_slices(many | {"unknown": SLICES["a<b"]}, "nll").values()
    assert few == all_  # those that lost most


def test_a_slice_of_one_item_is_drawn_without_an_interval():
    def drawn(*interval):
        slices = {
            "one": {"items": 1, "metrics": {"student": {"nll": list(interval)}}, "derived": {}}
        }
        return draw_slices(slices, "nll")["slices"]

    assert drawn(2.0, None, None) not in (drawn(None, None, None), drawn(2.0, 1.0, 3.0))


def test_a_cascade_without_a_threshold_says_so():
    none = CASCADE | {"thresholds": None, "test": None}
    page = run_page(RunPage(title="t", cascade=none))
    assert "No threshold was found that keeps 70.0% with confidence 90%" in page
