"""The grammar of objectives: what is read, and one line for what is not."""

import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd import objective as _objective  # noqa: F401  fills the registry
from jaxdistill.losses.loss import Ramp, parse_loss, parse_term


def read(text, *kinds):
    return [(t.weight, t.entry.name, dict(t.arguments)) for t in parse_loss(text, *kinds).terms]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("forward_kl", [(1.0, "forward_kl", {})]),
        (
            "0.9*jsd:beta=0.1,temperature=2+0.1*ce",
            [(0.9, "jsd", {"beta": 0.1, "temperature": 2.0}), (0.1, "ce", {})],
        ),
        (
            " 1e+3 * forward_kl:temperature=2.e+0 + 1E-1*ce ",
            [(1000.0, "forward_kl", {"temperature": 2.0}), (0.1, "ce", {})],
        ),
        (
            "jsd: beta = 0.1 , temperature=4..1",
            [(1.0, "jsd", {"beta": 0.1, "temperature": Ramp(4, 1)})],
        ),
        ("taid", [(1.0, "taid", {"t": "adaptive"})]),
        ("taid:t=0..1", [(1.0, "taid", {"t": Ramp(0, 1)})]),
        ("taid:t=0.4..1", [(1.0, "taid", {"t": Ramp(0.4, 1)})]),
        ("cakld:confidence=0.5", [(1.0, "cakld", {"confidence": 0.5})]),
        ("cakld:temperature=2", [(1.0, "cakld", {"confidence": "measured", "temperature": 2.0})]),
        ("hidden:layers=last+ce", [(1.0, "hidden", {"layers": "last"}), (1.0, "ce", {})]),
        (
            "forward_kl:temperature=1+forward_kl:temperature=4",
            [(1.0, "forward_kl", {"temperature": 1.0}), (1.0, "forward_kl", {"temperature": 4.0})],
        ),
    ],
)
def test_what_is_read(text, terms):
    assert read(text) == terms


def test_what_moves_and_how_it_is_set():
    loss = parse_loss("forward_kl:temperature=4..1+0.2*taid+cakld+jsd:temperature=3")
    assert loss.moving() == {
        "forward_kl.temperature": Ramp(4, 1),
        "taid.t": "adaptive",
        "cakld.confidence": "measured",
    }
    assert loss.with_argument("cakld.confidence", 0.6).terms[2].arguments == {"confidence": 0.6}
    assert "cakld.confidence" not in loss.with_argument("cakld.confidence", 0.6).moving()


def test_which_losses_need_a_teacher():
    assert not parse_loss("ce").needs_teacher
    for text in ("0.1*ce+jsd", "policy_gradient", "relations"):
        assert parse_loss(text).needs_teacher


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not an objective; accepted: NAME[:ARGUMENT=VALUE,...], or a sum"),
        ("ce+", "'' is not an objective"),
        ("0.5*", "'0.5*' is not an objective"),
        ("jsd:", "'jsd:' is not an objective"),
        ("JSD", "'JSD' is not an objective"),
        ("kl", "no objective is named 'kl'; accepted: "),
        ("jsd:gamma=1", "jsd has no argument 'gamma'; accepted: beta, temperature"),
        ("ce:temperature=2", "ce has no argument 'temperature'; accepted: no argument"),
        ("jsd:beta", "'beta' in 'jsd:beta' is no argument"),
        ("jsd:beta=.1,beta=.2", "'beta' stands twice in"),
        ("jsd:beta=", "jsd:beta is ''; accepted: a number"),
        ("jsd:beta=1/2", "jsd:beta is '1/2'; accepted: a number, a ramp such as 4..1"),
        ("jsd:beta=nan", "jsd:beta is 'nan'; accepted: a finite number"),
        ("jsd:beta=0..1..2", "jsd:beta is '0..1..2'; accepted: a finite number"),
        ("jsd:beta=half", "jsd:beta is half; accepted: a number, a ramp such as 4..1"),
        ("jsd:beta=1.5", "jsd:beta is 1.5; accepted: from 0 to 1"),
        ("jsd:beta=adaptive", "jsd:beta is adaptive; accepted: a number"),
        ("taid:t=soon", "taid:t is soon; accepted: a number, a ramp such as 4..1, or adaptive"),
        ("taid:t=0.4..2", "taid:t is 2.0; accepted: from 0 to 1"),
        ("forward_kl:temperature=0", "forward_kl:temperature is 0.0; accepted: above 0"),
        ("forward_kl:temperature=4..0", "forward_kl:temperature is 0.0; accepted: above 0"),
        ("forward_kl:temperature=hot", "forward_kl:temperature is hot; accepted: a number"),
        ("hidden:layers=3", "hidden:layers is 3.0; accepted: a word such as uniform"),
        ("hidden:layers=first", "hidden:layers is first; accepted: uniform or last"),
        ("relations:heads=0", "relations:heads is 0.0; accepted: a whole number from 1"),
        ("half*ce", "the weight of ce is 'half'; accepted: a number"),
        ("1..2*ce", "the weight of ce is '1..2'; accepted: a number"),
        ("inf*ce", "the weight of ce is 'inf'; accepted: a finite number"),
        ("2\n3*ce", r"the weight of ce is '2\n3'; accepted: a number"),
        ("0*forward_kl", "the weight of forward_kl is 0; accepted: a number above 0"),
        ("0*ce+0*forward_kl", "the weight of ce is 0; accepted: a number above 0"),
        ("forward_kl+0.0*hidden", "the weight of hidden is 0; accepted: a number above 0"),
        ("-1*jsd", "the weight of jsd is -1; accepted: a number above 0"),
        ("1e-60*ce", "the weight of ce is 1e-60; accepted: a number above 0 that float32 holds"),
        ("1e60*ce", "the weight of ce is 1e+60; accepted: a number above 0 that float32 holds"),
        ("0.5*mean", "mean is a mixture, which takes no weight"),
        ("skew_forward_kl:alpha=1", "skew_forward_kl:alpha is 1.0, where"),
        ("skew_reverse_kl:alpha=1..1", "skew_reverse_kl:alpha is 1.0, where"),
        ("taid:t=0", "taid:t is 0.0, where taid does nothing"),
        ("certainty:power=0", "certainty:power is 0.0, where"),
        ("label_mix:share=0", "label_mix:share is 0.0, where"),
        ("hidden:layers=last+hidden", "hidden stands twice in"),
        ("jsd:beta=0..1+jsd", "jsd stands twice in"),
    ],
)
def test_one_line_for_what_is_not_read(text, said):
    with pytest.raises(UserError) as e:
        parse_loss(text)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_kinds_are_kept_apart():
    with pytest.raises(
        UserError, match="no mixture is named 'ce'; accepted: agreement, confidence"
    ):
        parse_term("ce", "mixture")
    with pytest.raises(UserError, match="no divergence is named 'hidden'"):
        parse_loss("hidden", "divergence")
    with pytest.raises(UserError, match="label_mix:share is 1.0; accepted: from 0 to below 1"):
        parse_term("label_mix:share=1", "correction")
