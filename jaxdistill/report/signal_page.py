"""The page of a signal analysis: one HTML file that needs nothing else, in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.kd.recommend import LEAST_INFLATION, LEAST_RATIO, MOST_WEIGHTS, Recommendation
from jaxdistill.kd.signal_sums import PROJECTIONS
from jaxdistill.report.html import document, figure, table

_CAPTIONS = {
    "gradient_ce": "How hard the loss pulls at a projection's weights in a layer. 1 on the scale "
    "is a factor of ten. Float and quantized models share the colours.",
    "inflation": "How much quantization alone enlarges that pull. 0 is no change, 1 doubles the "
    "squared norm, 3 makes it eight times as large. A column that is red from top to bottom is a "
    "projection that stands out if its neighbours are paler.",
    "gradient_kd": "The pull of the loss that distillation trains on, the KL to the teacher. The "
    "float model has none: all of it comes from quantization.",
    "sqnr": "How far the output stands above its error. 20 dB is an error of a tenth of the "
    "signal's size, 0 dB one as large as the signal.",
    "sqnr_gain": "Where training brought the output nearer to the float model (red) and where it "
    "moved it away (blue).",
    "clipped": "Weights whose rounded integer is beyond the ends of the range. No gradient reaches "
    "them.",
    "flips": "Weights whose stored integer is another than that of the float model rounded: what "
    "training really changed.",
}
_MODELS = {"float": "Float model", "ptq": "Quantized (PTQ)", "trained": "Trained student"}

_COLUMNS = """
<p class="quiet">The largest inflation comes first. <em>Inflation</em>: what quantization multiplies
the squared gradient by. <em>Added, &times; median</em>: inflation less 1, over that of the median
projection. <em>Layers above median</em>: layers in which it is inflated more than that layer's
median projection. Gradients are squared norms summed over layers; SQNR, RMS (of the output) and
shares of weights are means over layers.</p>
"""

_READING = f"""
<h2>What this page is about</h2>
<p>Quantization replaces every weight of a projection (one linear layer of the decoder) by the
nearest of a few values. Each output is then a little wrong; the next projection reads the wrong
output and adds an error of its own, so that the model drifts from its float original with depth.
Quantization-aware distillation trains the weights, rounded in every forward pass, until the
quantized student answers like the float teacher.</p>
<p>The gradients of that training are not those of the float model. In Llama-like models the paper
&ldquo;Oh! We Freeze&rdquo; (arXiv 2403.18159) found that the value and output projections of
self-attention, <code>v_proj</code> and <code>o_proj</code>, carry the largest gradients, and drift
from the float model as they follow them. Put on their rounded values once and frozen, both stay
near it, and the other projections learn to make up for the error. This page measures the same
things on your model and text, and names what stands out here.</p>
<h2>How the recommendation is made</h2>
<p>For each layer and projection, <em>inflation</em> is the squared norm of the loss's gradient in
the quantized model over that in the float model. Over layers the geometric mean is taken, which
gives each layer one vote: a sum would report the one layer with the largest gradient, and a
projection is frozen in all layers or in none. Projections are compared by what quantization adds,
inflation less 1. One is recommended if</p>
<ul>
<li>its inflation is at least {LEAST_INFLATION:g},</li>
<li>quantization adds at least {LEAST_RATIO:g} times as much as to the median projection,</li>
<li>its inflation exceeds its layer's median in two thirds of the layers,</li>
<li>and its gradient is large for the number of its weights, or its output further from the float
model than the median projection's.</li>
</ul>
<p>At most {MOST_WEIGHTS:.0%} of the weights are frozen: something must be left to repair the rest
by. Where quantization disturbs all projections alike, nothing stands out. This is a reading of
gradients before training; whether freezing helps is seen by training with it and without.</p>
"""

_TERMS = """
<h2>Terms</h2>
<dl>
<dt>gradient</dt><dd>Squared Frobenius norm of dL/dW. L is the mean next-token cross-entropy of the
model itself over the target tokens of a batch, for the distillation gradient the KL divergence from
the teacher; W is the kernel, for the quantized model its float master, straight through the
rounding. Means over batches.</dd>
<dt>SQNR</dt><dd>Signal-to-quantization-noise ratio of a projection's output, 10 log10 of the float
output's energy over that of the difference. Each model reads the text by itself, so errors of
earlier layers count.</dd>
<dt>clipped, flipped</dt><dd>Shares of a projection's weights in a layer: those whose rounded
integer is beyond the ends of the range, and those whose integer differs from the rounded float
model's.</dd>
<dt>drift</dt><dd>Of the residual stream, the vector that every layer adds to: the size of the
difference over that of the float model's vector, and the cosine between the two, each a mean over
places. Padding counts nowhere.</dd>
</dl>
"""


def signal_page(
    title: str,
    facts: Sequence[str],
    models: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    advice: Recommendation,
    pictures: Mapping[str, bytes],
    dark_pictures: Mapping[str, bytes],
    command: str = "",
) -> str:
    """Lay an analysis out as one HTML document.

    Args:
        title: the model's name.
        facts: what was analysed, short phrases.
        models: one row each: ``name``, ``nll``, ``kl`` and ``sqnr`` of the final hidden states.
        arrays: see ``report.signal_plots.draw_signal``.
        advice: what to freeze.
        pictures: PNG by name.
        dark_pictures: the same for dark displays.
        command: how to follow the advice.
    """
    text = html.escape
    parts = [
        f"<h1>Signal analysis: {text(title)}</h1>",
        f'<p class="quiet">{" &middot; ".join(text(fact) for fact in facts)}</p>',
        _verdict(advice, command),
        "<h2>Projections</h2>",
        table(*_projection_rows(arrays, advice)),
        _COLUMNS,
        "<h2>Models</h2>",
        table(*_model_rows(models)),
        _READING,
        "<h2>Layer by layer</h2>",
        '<p class="quiet">Layers from the first (top) to the last, projections in the order in '
        "which a layer uses them.</p>",
        '<div class="maps">',
        *(
            figure(name, pictures[name], dark_pictures[name], _caption(name))
            for name in pictures
            if name != "drift"
        ),
        "</div>",
        "<h2>Drift by depth</h2>",
        figure(
            "drift of the residual stream by depth",
            pictures["drift"],
            dark_pictures["drift"],
            "Each layer adds its own error to what it was given.",
            "wide",
        ),
        _TERMS,
        '<p class="quiet">All numbers, with their units, are in signal.json beside this page; the '
        "pictures are in plots/.</p>",
    ]
    return document(f"Signal analysis: {title}", parts)


def _verdict(advice: Recommendation, command: str) -> str:
    head = " and ".join(advice.projections)
    head = f"Recommended: freeze {head}" if head else "Recommended: freeze nothing"
    items = "".join(f"<li>{html.escape(_sentence(reason))}</li>" for reason in advice.reasons)
    code = f"<pre><code>{html.escape(command)}</code></pre>" if command else ""
    return f'<section class="card verdict"><h2>{head}</h2><ul>{items}</ul>{code}</section>'


def _sentence(reason: str) -> str:
    """Begin with a capital letter, unless with the name of a projection, and end with a stop."""
    named = reason.startswith(PROJECTIONS)
    return (reason if named else reason[:1].upper() + reason[1:]) + "."


def _projection_rows(
    arrays: Mapping[str, np.ndarray], advice: Recommendation
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return heads, rows in the order of the ranking, and which rows are recommended."""
    heads = ["projection", "inflation", "added, × median", "layers above median"]
    heads += ["gradient, float", "gradient, PTQ", "SQNR, dB", "least SQNR (layer)"]
    trained = "trained/sqnr" in arrays
    heads += ["SQNR trained, dB", "flipped"] if trained else []
    heads += ["clipped", "RMS, float", "RMS, PTQ", "share of weights"]
    rows = []
    for s in advice.ranking:
        i = PROJECTIONS.index(s.projection)
        sqnr = arrays["ptq/sqnr"][:, i]
        row = [
            s.projection,
            f"{s.inflation:.2f}",
            f"{s.ratio:.2f}" if math.isfinite(s.ratio) else "",
            f"{s.layers_above} / {s.layers}",
            f"{arrays['float/gradient_ce'][:, i].sum():.3g}",
            f"{arrays['ptq/gradient_ce'][:, i].sum():.3g}",
            f"{s.sqnr:.1f}",
            f"{sqnr.min():.1f} ({int(sqnr.argmin())})",
        ]
        if trained:
            row += [
                f"{arrays['trained/sqnr'][:, i].mean():.1f}",
                f"{arrays['trained/flips'][:, i].mean():.2%}",
            ]
        row += [
            f"{arrays['ptq/clipped'][:, i].mean():.2%}",
            f"{arrays['float/rms'][:, i].mean():.3g}",
            f"{arrays['ptq/rms'][:, i].mean():.3g}",
            f"{s.weights:.1%}",
        ]
        rows.append(row)
    return heads, rows, [s.frozen for s in advice.ranking]


def _model_rows(models: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    def cell(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    heads = [
        "model",
        "NLL, nats a token",
        "KL to float, nats a token",
        "SQNR at the end, dB",
    ]
    rows = [
        [
            _MODELS[m["name"]],
            cell(m["nll"], ".4f"),
            cell(m.get("kl"), ".4f"),
            cell(m.get("sqnr"), ".1f"),
        ]
        for m in models
    ]
    return heads, rows


def _caption(name: str) -> str:
    quantity, _, model = name.rpartition("_")
    return f"{_MODELS[model]}. {_CAPTIONS[quantity]}"
