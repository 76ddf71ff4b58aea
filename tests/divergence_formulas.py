"""Every registered divergence as a formula of float64 numpy, and its slope by differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from jaxdistill.losses.registry import REGISTRY

NAMES = sorted(name for name, entry in REGISTRY.items() if entry.kind == "divergence")
N, V = 5, 7


def log_softmax(z, temperature=1.0):
    z = z / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(a, b):
    """KL of the distributions whose logs are a and b, row by row; scipy knows 0 log 0."""
    return special.rel_entr(np.exp(a), np.exp(b)).sum(-1)


def mix(a, b, share):
    return np.log(share * np.exp(a) + (1 - share) * np.exp(b))


def times(weight, values):
    """The product, 0 at weight 0 whatever the value."""
    return np.where(weight > 0, weight, 0) * np.where(weight > 0, values, 0)


def at(rows, y):
    return np.array([row[i] for row, i in zip(rows, y, strict=True)])


def akl(p, q, held, head):
    """The weights from the held student, the divergences from the moving one."""
    shares = []
    for log_p, log_q in zip(p, held, strict=True):
        gaps, so_far = [0.0, 0.0], 0.0
        for place, v in enumerate(sorted(range(len(log_p)), key=lambda v: -log_p[v])):
            so_far += np.exp(log_p[v])
            part = 0 if place == 0 or so_far <= head else 1
            gaps[part] += abs(np.exp(log_p[v]) - np.exp(log_q[v]))
        shares.append(gaps[0] / sum(gaps))
    shares = np.array(shares)
    return times(shares, kl(p, q)) + times(1 - shares, kl(q, p))


def taid(z, held, z_t, t, temperature=1.0):
    goal = log_softmax(z_t if t == 1 else (1 - t) * held + t * z_t, temperature)
    return kl(goal, log_softmax(z, temperature))


def policy(log_q, held, log_p):
    """0 for a token that neither can say."""
    possible = np.maximum(log_q, log_p) > -np.inf
    return np.where(possible, -(log_p - held) * log_q, 0)


# By name and arguments: (student logits, the same held where no gradient passes, log q, log p at
# the temperature, teacher logits, targets) -> values before the factor temperature^2.
FORMULAS = {
    "forward_kl": [({}, lambda z, held, q, p, z_t, y: kl(p, q))],
    "reverse_kl": [({}, lambda z, held, q, p, z_t, y: kl(q, p))],
    "jeffreys": [({}, lambda z, held, q, p, z_t, y: kl(p, q) + kl(q, p))],
    "jsd": [
        (
            {"beta": b},
            lambda z, held, q, p, z_t, y, b=b: (
                b * kl(p, mix(p, q, b)) + (1 - b) * kl(q, mix(p, q, b))
            ),
        )
        for b in (0.1, 0.5, 0.9)
    ]
    + [
        ({"beta": 0.0}, lambda z, held, q, p, z_t, y: kl(p, q)),
        ({"beta": 1.0}, lambda z, held, q, p, z_t, y: kl(q, p)),
    ],
    "skew_forward_kl": [
        ({"alpha": a}, lambda z, held, q, p, z_t, y, a=a: kl(p, mix(p, q, a))) for a in (0.1, 0.6)
    ],
    "skew_reverse_kl": [
        ({"alpha": a}, lambda z, held, q, p, z_t, y, a=a: kl(q, mix(q, p, a))) for a in (0.1, 0.6)
    ],
    "total_variation": [
        ({}, lambda z, held, q, p, z_t, y: 0.5 * abs(np.exp(p) - np.exp(q)).sum(-1))
    ],
    "adaptive_kl": [
        ({"head": h}, lambda z, held, q, p, z_t, y, h=h: akl(p, q, held, h)) for h in (0.5, 0.8)
    ],
    "cakld": [
        (
            {"confidence": c},
            lambda z, held, q, p, z_t, y, c=c: times(c, kl(q, p)) + times(1 - c, kl(p, q)),
        )
        for c in (0.7, 1.0)
    ],
    "taid": [({"t": t}, None) for t in (0.3, 1.0)],  # its goal mixes logits, see below
    "ce": [({}, lambda z, held, q, p, z_t, y: -at(q, y))],
    "policy_gradient": [
        ({}, lambda z, held, q, p, z_t, y: policy(at(q, y), at(held, y), at(p, y))),
    ],
}
CASES = [
    (name, case, temperature)
    for name in NAMES
    for case in range(len(FORMULAS.get(name, [None])))
    for temperature in ((1.0, 2.5) if "temperature" in REGISTRY[name].arguments else (1.0,))
]


def wanted(name, case, temperature, z, z_t, y, held=None):
    """The values in float64; gradients of them hold what ``held`` holds."""
    assert name in FORMULAS, f"{name} is a new divergence: write its formula down here"
    held = z if held is None else held
    arguments, formula = FORMULAS[name][case]
    if name == "taid":
        return temperature**2 * taid(z, held, z_t, arguments["t"], temperature)
    logs = [log_softmax(x, temperature) for x in (held, z, z_t)]
    return temperature**2 * formula(z, *logs, z_t, y)


def slope(name, case, temperature, z, z_t, y, step=1e-5):
    """Central differences of each row's value, by each of its student logits."""
    found = np.zeros_like(z)
    for v in range(z.shape[1]):
        up, down = z.copy(), z.copy()
        up[:, v] += step
        down[:, v] -= step
        up, down = (wanted(name, case, temperature, m, z_t, y, held=z) for m in (up, down))
        found[:, v] = (up - down) / (2 * step)
    return found


def ours(name, case, temperature):
    """Our function of (student logits, teacher logits, targets)."""
    entry = REGISTRY[name]
    assert name in FORMULAS, f"{name} is a new divergence: write its formula down here"
    given = dict(FORMULAS[name][case][0])
    if "temperature" in entry.arguments:
        given["temperature"] = temperature

    def function(z, z_t, y):
        inputs = {"student_logits": z, "teacher_logits": z_t, "targets": y}
        return entry.function(*(inputs[i] for i in entry.inputs), **given)

    return function


@functools.cache  # a compilation serves several tests
def values_and_gradient(name, case, temperature):
    """The values, and the gradient of their sum by the student's logits, compiled."""
    f = ours(name, case, temperature)

    @jax.jit
    def both(z, z_t, y):
        gradient, values = jax.grad(lambda x: (jnp.sum(v := f(x, z_t, y)), v), has_aux=True)(z)
        return values, gradient

    return both
