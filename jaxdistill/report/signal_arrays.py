"""The arrays of a signal analysis by name, and with unit, meaning and axes for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Quantity to (unit, meaning); arrays of the analysis are named model/quantity.
QUANTITIES = {
    "gradient_ce": ("nats^2", "squared Frobenius norm of d(cross-entropy)/dW, mean over batches"),
    "gradient_kd": ("nats^2", "squared Frobenius norm of d(KL to teacher)/dW, mean over batches"),
    "inflation": ("ratio", "gradient_ce over the float model's"),
    "mean": ("1", "mean of the projection's output"),
    "rms": ("1", "root mean square of the projection's output"),
    "sqnr": ("dB", "10 log10(|y_float|^2 / |y_float - y|^2) of the projection's output"),
    "sqnr_gain": ("dB", "sqnr less that of PTQ"),
    "clipped": ("share", "weights whose rounded integer is beyond the range"),
    "flips": ("share", "weights whose integer is another than PTQ's"),
    "drift_relative_error": ("ratio", "|x_float - x| / |x_float| of the residual stream, by depth"),
    "drift_cosine": ("1", "cosine of the residual stream to the float model's, by depth"),
}


def arrays_of(
    signals: Mapping[str, Mapping[str, np.ndarray]],
    clipped: np.ndarray,
    flips: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Name every array ``model/quantity``, models ``float``, ``ptq`` and ``trained``.

    Args:
        signals: of ``kd.signal.make_signal``, ``"ptq"`` with the teacher's gradients, and
            ``"trained"`` where there is a trained student.
        clipped: PTQ's share of clipped weights, [L, 7].
        flips: the trained student's share of flipped integers, [L, 7].
    """
    ptq = signals["ptq"]
    arrays = {
        "float/gradient_ce": ptq["gradient/teacher"],
        "float/mean": ptq["mean/teacher"],
        "float/rms": ptq["rms/teacher"],
    }
    for name, signal in signals.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            inflation = signal["gradient/student"] / ptq["gradient/teacher"]
        arrays |= {
            f"{name}/gradient_ce": signal["gradient/student"],
            f"{name}/inflation": inflation,
            f"{name}/gradient_kd": signal["gradient/student_kd"],
            f"{name}/mean": signal["mean/student"],
            f"{name}/rms": signal["rms/student"],
            f"{name}/sqnr": signal["sqnr"],
            f"{name}/drift_relative_error": signal["drift/relative_error"],
            f"{name}/drift_cosine": signal["drift/cosine"],
        }
    arrays["ptq/clipped"] = clipped
    if flips is not None:
        arrays["trained/sqnr_gain"] = signals["trained"]["sqnr"] - ptq["sqnr"]
        arrays["trained/flips"] = flips
    return arrays


def labelled(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return each array with its unit, meaning and axes, in the types of JSON (null: no number)."""

    def one(name: str, values: np.ndarray) -> dict[str, Any]:
        unit, meaning = QUANTITIES[name.partition("/")[2]]
        axes = ["layer", "projection"] if values.ndim == 2 else ["layers passed"]
        numbers = np.asarray([number_of(x) for x in values.reshape(-1)], object)
        rows = numbers.reshape(values.shape).tolist()
        return {"unit": unit, "meaning": meaning, "axes": axes, "values": rows}

    return {name: one(name, values) for name, values in arrays.items()}


def number_of(value: Any) -> float | None:
    """Return a float, None where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None
