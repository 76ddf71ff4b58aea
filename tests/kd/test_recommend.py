"""What is recommended, on signals made so that the answer is known."""

import re

import numpy as np
import pytest

from jaxdistill.kd.recommend import recommend_freeze
from jaxdistill.kd.signal import path_of
from jaxdistill.kd.signal_sums import PROJECTIONS
from jaxdistill.paths import OV_PATTERN

WEIGHTS = np.asarray([331776, 110592, 110592, 331776, 884736, 884736, 884736], float)  # SmolLM2
LAYERS = 30


def signal(**inflation: float) -> dict[str, np.ndarray]:
    """Makes a signal whose squared gradients all grow 4-fold, but for the projections given.

    Layers differ in size by a million; each figure wobbles by 10 %.
    """
    rng = np.random.default_rng(0)
    teacher = np.outer(np.geomspace(1e-3, 1e3, LAYERS), np.ones(7))
    factor = np.asarray([inflation.get(p, 4.0) for p in PROJECTIONS])
    wobble = np.exp(0.1 * rng.standard_normal(teacher.shape))
    return {
        "gradient/teacher": teacher,
        "gradient/student": teacher * factor * wobble,
        "sqnr": np.full((LAYERS, 7), 10.0),
        "weights": WEIGHTS,
    }


def test_what_is_inflated_most_is_frozen_with_its_figures():
    advice = recommend_freeze(signal(v_proj=8.0, o_proj=6.0))
    assert advice.projections == ("v_proj", "o_proj")
    assert advice.patterns == (OV_PATTERN,)
    assert advice.reasons[0] == "freeze v_proj and o_proj in all layers, 12% of the weights"
    assert [r.split(":")[0] for r in advice.reasons[1:]] == ["v_proj", "o_proj"]
    figures = re.search(
        r"gradient by ([\d.]+), the median projection's by ([\d.]+)", advice.reasons[1]
    )
    assert float(figures[1]) == pytest.approx(8, rel=0.05)
    assert float(figures[2]) == pytest.approx(4, rel=0.05)
    assert "in 30 of 30 layers by more than" in advice.reasons[1]
    first = advice.ranking[0]
    assert first.projection == "v_proj" and first.ratio == pytest.approx(7 / 3, rel=0.1)
    assert [s.frozen for s in advice.ranking] == [True, True] + [False] * 5


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_no_projection_is_preferred(projection):
    found = signal(**{projection: 8.0})
    found["sqnr"][:, PROJECTIONS.index(projection)] = 5.0
    advice = recommend_freeze(found)
    assert advice.projections == (projection,)
    matched = [p for p in PROJECTIONS if re.search(advice.patterns[0], path_of(p))]
    assert matched == [projection]


@pytest.mark.parametrize("level", [1.0, 1.05, 4.0, 50.0])
def test_nothing_stands_out_where_all_are_alike(level):
    advice = recommend_freeze(signal(**dict.fromkeys(PROJECTIONS, level)))
    assert advice.patterns == () and advice.projections == ()
    (reason,) = advice.reasons
    assert (
        reason.startswith("nothing stands out: ")
        and "comes first, but it is too near the others" in reason
    )
    assert len(advice.ranking) == 7


def test_one_layer_decides_nothing():
    """As in SmolLM2, where one place of one layer makes half of the model's squared gradient."""
    found = signal()
    found["gradient/student"][11, PROJECTIONS.index("down_proj")] *= 1e4
    assert recommend_freeze(found).projections == ()


def test_mild_quantization_is_judged_by_what_it_adds():
    """Of 1.2 and 1.4 the second adds twice as much, though it is but 1.17 times the first."""
    found = signal(**(dict.fromkeys(PROJECTIONS, 1.2) | {"v_proj": 1.5}))
    assert recommend_freeze(found).projections == ("v_proj",)


def test_small_gradients_near_the_float_model_stay_free():
    found = signal(gate_proj=8.0)  # many weights, so little gradient for each
    found["gradient/student"][:, 4] *= 0.01
    found["gradient/teacher"][:, 4] *= 0.01
    assert recommend_freeze(found).projections == ()
    found["sqnr"][:, 4] = 9.0
    advice = recommend_freeze(found)
    assert advice.projections == ("gate_proj",)
    assert "its output's SQNR is 9.0 dB, the median projection's 10.0 dB" in advice.reasons[1]


def test_never_more_than_half_of_the_weights():
    found = signal(gate_proj=20.0, up_proj=16.0, q_proj=12.0)
    found["sqnr"][:, [0, 4, 5]] = 5.0
    advice = recommend_freeze(found)
    assert advice.projections == ("gate_proj", "up_proj")
    assert sum(s.weights for s in advice.ranking if s.frozen) == 0.5
    left = {s.projection: s.reason for s in advice.ranking}
    assert left["q_proj"].startswith("more than half of the weights would be frozen with it: ")


def test_layers_without_gradient_are_left_out():
    found = signal(v_proj=8.0)
    found["gradient/teacher"][3] = 0
    found["gradient/student"][4, 2] = np.nan
    advice = recommend_freeze(found)
    assert advice.projections == ("v_proj",) and advice.ranking[0].layers == LAYERS - 2
    found["gradient/teacher"][:] = 0
    advice = recommend_freeze(found)
    assert advice.patterns == () and "nothing can be compared" in advice.reasons[0]
