"""The pictures of a condensed set: what is drawn, read from the figures and from the files."""

import matplotlib.image
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.report import condense_plots
from jaxdistill.report.condense_plots import (
    examples_table,
    plot_comparison,
    plot_condense,
    plot_images,
)

ROWS = [{"step": step, "loss": loss} for step, loss in ((1, 2.0), (2, 1.5), (4, 1.25))]


@pytest.fixture
def figures(monkeypatch):
    """The figures by file name; they are written as well."""
    seen, save = {}, condense_plots.save_figure

    def keep(figure, path):
        seen[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(condense_plots, "save_figure", keep)
    return seen


def test_a_run_is_drawn_as_its_rows_say(tmp_path, figures):
    path = plot_condense(tmp_path / "plots", ROWS)
    assert path.name == "outer_loss.png" and matplotlib.image.imread(path).ndim == 3
    axes = figures["outer_loss.png"].axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 2], [2, 1.5], [4, 1.25]])
    assert axes.get_yscale() == "linear"
    plot_condense(tmp_path, [{"step": i, "loss": 10.0**-i} for i in range(4)])
    assert figures["outer_loss.png"].axes[0].get_yscale() == "log"


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_images_are_shown_in_order_on_one_scale(tmp_path, figures, channels):
    images = np.random.default_rng(0).normal(size=(5, 4, 6, *channels))
    made = plot_images(tmp_path / "a" / "grid.png", images, list("abcde"), columns=2)
    axes = figures[made.name].axes
    assert made.is_file() and len(axes) == 6
    assert [a.get_title() for a in axes] == [*"abcde", ""] and not axes[5].images
    expected = (images - images.min()) / (images.max() - images.min())
    for image, a in zip(expected, axes, strict=False):
        (shown,) = a.images
        assert shown.get_clim() == (0, 1)
        np.testing.assert_allclose(np.reshape(shown.get_array(), image.shape), image, atol=1e-5)


def test_the_file_shows_dark_and_bright_images(tmp_path):
    images = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.full((3, 3), 0.5)])
    picture = matplotlib.image.imread(plot_images(tmp_path / "grid.png", images, columns=3))
    row = picture[picture.shape[0] // 2, :, :3]
    centres = row[[picture.shape[1] * i // 6 for i in (1, 3, 5)]]
    np.testing.assert_allclose(
        centres, np.array([[0.0], [1.0], [0.5]]) @ np.ones((1, 3)), atol=0.02
    )


def test_images_that_cannot_be_shown_are_refused(tmp_path):
    with pytest.raises(UserError, match="accepted: .M, H, W"):
        plot_images(tmp_path / "x.png", np.zeros((2, 4, 4, 2)))
    with pytest.raises(UserError, match="1 titles given for 2 images"):
        plot_images(tmp_path / "x.png", np.zeros((2, 4, 4)), ["a"])


def test_examples_are_a_table_of_one_line_each():
    text = examples_table(
        ["neg", "pos"],
        [1, 0],
        {"nearest tokens": ["good | fine\nfilm", "b" * 50], "nearest text": ["a_b", "<b>"]},
        np.array([[0.25, 0.75], [0.9, 0.1]]),
        top=2,
        width=20,
    )
    assert text.splitlines() == [
        "| # | class | soft label | nearest tokens | nearest text |",
        "| --- | --- | --- | --- | --- |",
        r"| 1 | pos | pos 0.75, neg 0.25 | good \| fine film | a\_b |",
        r"| 2 | neg | neg 0.90, pos 0.10 | " + "b" * 19 + r"… | \<b\> |",
    ]
    soft = examples_table(["neg", "pos"], None, {}, np.array([[0.25, 0.75]]), top=1)
    assert soft.splitlines()[2] == "| 1 | pos | pos 0.75 |"
    with pytest.raises(UserError, match="different lengths"):
        examples_table(["neg"], [0, 0], {"text": ["one"]})
    with pytest.raises(UserError, match="without labels"):
        examples_table(["neg"], None, {"text": ["one"]})


def result(name, architecture, mean, **rest):
    return {"name": name, "architecture": architecture, "mean": mean, **rest}


def test_methods_are_compared_architecture_by_architecture(tmp_path, figures):
    rows = [
        result("random", "mlp", 0.5, std=0.05),
        result("unroll", "mlp", 0.75, std=0.025),
        result("full data", "mlp", 0.9),
        result("unroll", "convnet", 0.8),
        result("full data", "convnet", 0.95),
    ]
    made = plot_comparison(tmp_path / "plots" / "compare.png", rows)
    axes = figures[made.name].axes[0]
    assert made.is_file()
    bars = sorted((p.get_x() + p.get_width() / 2, p.get_height()) for p in axes.patches)
    heights = [height for _, height in bars]
    assert heights == [50, 75, 80]
    places = [place for place, _ in bars]
    assert -0.5 < places[0] < 0 < places[1] < 0.5 < places[2] < 1.5
    assert [t.get_text() for t in axes.get_xticklabels()] == ["mlp", "convnet"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "random",
        "unroll",
        "full data",
    ]
    segments = [s for c in axes.collections for s in c.get_segments()]
    upright = sorted(tuple(s[:, 1]) for s in segments if s[0, 0] == s[1, 0])
    np.testing.assert_allclose(upright, [(45, 55), (72.5, 77.5), (80, 80)])
    level = sorted((s[0, 1], s[0, 0], s[1, 0]) for s in segments if s[0, 0] != s[1, 0])
    np.testing.assert_allclose(level, [(90, -0.45, 0.45), (95, 0.55, 1.45)])


def test_rows_given_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 rows with 1 pairs"):
        plot_comparison(tmp_path / "x.png", [result("a", "mlp", 0.5), result("a", "mlp", 0.6)])
    with pytest.raises(UserError, match="0 rows"):
        plot_comparison(tmp_path / "x.png", [])
