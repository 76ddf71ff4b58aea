"""How often intervals of 95 % cover: the percentile bootstrap against `jaxdistill.evals.intervals`.

Run ``python -m benchmarks.intervals``; it writes ``results/intervals.md`` in some minutes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxdistill.evals.intervals import (
    mean_interval,
    paired_difference,
    share_interval,
)

ITEMS = (5, 10, 30, 100, 1000)
NATS = {
    "normal": lambda r, n: r.normal(0.1, 0.2, n),
    "Student t, 3 degrees": lambda r, n: 0.1 + 0.1 * r.standard_t(3, n),
    "exponential": lambda r, n: r.exponential(0.1, n),
    "lognormal, sigma 1": lambda r, n: r.lognormal(np.log(0.1) - 0.5, 1, n),
    "a tenth loses 10 times": lambda r, n: (
        r.normal(0.05, 0.05, n) + (r.random(n) < 0.1) * r.gamma(2, 0.25, n)
    ),
}


def bootstrap(sums, counts, random):
    """Return the percentile interval."""
    n = sums.size
    drawn = random.multinomial(n, np.full(n, 1 / n), 1000).astype(float)
    return np.quantile(drawn @ sums / (drawn @ counts), [0.025, 0.975])


def covered(draw, truth, new, times):
    """Return the shares of draws whose bootstrap and whose new interval hold the truth."""
    random, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(times):
        data, sums, counts = draw(random)
        for i, (low, high) in enumerate((bootstrap(sums, counts, random), new(*data)[1:])):
            hits[i] += low - 1e-12 <= truth <= high + 1e-12
    return hits / times


def shares(p, n):
    def draw(r):
        x = (r.random(n) < p).astype(float)
        return (float(x.sum()), n), x, np.ones(n)

    return covered(draw, p, share_interval, 400 if n < 1000 else 100)


def pairs(n, accuracy, first, second):
    cells = [accuracy - first, first, second, 1 - accuracy - second]

    def draw(r):
        cell = r.choice(4, n, p=cells)
        pair = cell <= 1, (cell == 0) | (cell == 2)
        return pair, pair[0].astype(float) - pair[1], np.ones(n)

    return covered(draw, first - second, paired_difference, 400 if n < 1000 else 100)


def nats(kind, lengths, n):
    def draw(r):
        counts = np.ones(n) if lengths == "equal" else 1 + np.round(r.lognormal(4, 0.6, n))
        sums = NATS[kind](r, n) * counts
        return (sums, counts), sums, counts

    return covered(draw, 0.1, mean_interval, 400 if n < 1000 else 100)


def main() -> None:
    rows = {f"accuracy, p = {p}": [shares(p, n) for n in ITEMS] for p in (0.5, 0.9, 0.99)}
    for cells in ((0.5, 0.1, 0.1), (0.9, 0.08, 0.02), (0.6, 0.3, 0.05)):
        name = "difference of accuracies, {:.0%}; only one right {:.0%}, {:.0%}".format(*cells)
        rows[name] = [pairs(n, *cells) for n in ITEMS]
    for lengths in ("equal", "unequal"):
        for kind in NATS:
            name = f"nats, {kind}, texts of {lengths} length"
            rows[name] = [nats(kind, lengths, n) for n in ITEMS]
    text = "# How often intervals of 95 % hold the true value\n\n"
    text += "`python -m benchmarks.intervals`: 400 draws a cell, 100 of 1,000 items; each cell is "
    text += "the percentile "
    text += "bootstrap, then `jaxdistill.evals.intervals`, in percent. A unit is one item (a "
    text += "question, a text). Unequal lengths are lognormal (sigma 0.6), and weigh. Where one "
    text += "text in ten loses ten times as much, few texts often hold none such: no method can "
    text += "know of what was not drawn.\n\n"
    text += "| items | " + " | ".join(f"{n:,}" for n in ITEMS) + " |\n"
    text += "| --- |" + " ---: |" * len(ITEMS) + "\n"
    for name, found in rows.items():
        cells = (f"{100 * old:.0f} → {100 * new:.0f}" for old, new in found)
        text += f"| {name} | " + " | ".join(cells) + " |\n"
    (Path(__file__).parent / "results" / "intervals.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
