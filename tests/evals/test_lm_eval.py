"""The harness's model without the harness: a stand-in for its base class, and no class at all."""

import sys
import types

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.likelihood import Pair, encode_pair, log_likelihoods
from jaxdistill.evals.lm_eval import harness_model, rolling_windows
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.generate import answer
from tests import tiny


class Hook:
    """Remembers what the harness is asked to put into its cache."""

    def __init__(self):
        self.kept = []

    def add_partial(self, kind, arguments, result):
        self.kept.append((kind, arguments, result))


class LM:
    """What of the harness's base class the model relies on."""

    def __init__(self):
        self.cache_hook = Hook()


def asked(*arguments):
    return [types.SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_model(tmp_path_factory.mktemp("harness") / "model"))


@pytest.fixture
def lm(model, monkeypatch):
    module = types.ModuleType("lm_eval.api.model")
    module.LM = LM  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    return harness_model(model, batch_size=2)


def test_without_the_harness_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
    with pytest.raises(UserError, match="pip install 'jaxdistill\\[lm-eval\\]'") as e:
        harness_model(model)
    assert "\n" not in str(e.value)


def test_long_text_is_cut_into_windows_that_predict_each_token_once():
    # The example in the harness's description of the request: ten tokens, four can be read.
    windows = list(rolling_windows(range(10), 99, 4))
    assert windows == [
        Pair([99], [0, 1, 2, 3]),
        Pair([3], [4, 5, 6, 7]),
        Pair([5, 6, 7], [8, 9]),
    ]
    assert list(rolling_windows([], 99, 4)) == []


def test_requests_are_answered_and_kept(lm, model):
    pairs = (("the sky is", " blue"), ("", "whole"), ("the sky is", " green"))
    got = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    want = log_likelihoods(
        model.apply_fn(),
        model.params,
        [encode_pair(model.tokenizer, *pair) for pair in pairs],
        max_length=128,
    )
    assert [x for x, _ in got] == pytest.approx(want.log_likelihood.tolist(), rel=1e-6)
    assert [greedy for _, greedy in got] == want.greedy.tolist()
    assert all(type(x) is float and type(greedy) is bool for x, greedy in got)

    # A text is as likely as its first half times its second half after the first.
    halves = lm.loglikelihood(asked(("", "sky is"), ("<s>sky is", " blue")), disable_tqdm=True)
    (rolling,) = lm.loglikelihood_rolling(asked(("sky is blue",)), disable_tqdm=True)
    assert rolling == pytest.approx(halves[0][0] + halves[1][0], rel=1e-5)

    kinds = [kind for kind, _, _ in lm.cache_hook.kept]
    assert kinds == ["loglikelihood"] * 5 + ["loglikelihood_rolling"]
    assert lm.cache_hook.kept[0][1:] == (pairs[0], got[0])


def test_generation_ends_at_the_first_stop_string(lm, model):
    prompts = ("the sky is", "once upon a", "one")
    whole = [answer(model, text, Sampling(max_new_tokens=10), raw=True) for text in prompts]
    options = {"max_gen_toks": 10, "until": None, "temperature": 0.0}
    got = lm.generate_until(asked(*((text, options) for text in prompts)), disable_tqdm=True)
    assert got == whole
    stops = [text[3:4] for text in whole]
    cut = [options | {"until": stop} for stop in stops]
    got = lm.generate_until(asked(*zip(prompts, cut, strict=True)), disable_tqdm=True)
    assert got == [text.split(stop)[0] for text, stop in zip(whole, stops, strict=True)]
    (new,) = lm.generate_until(asked(("x" * 400, options | {"until": []})), disable_tqdm=True)
    assert len(new) > 0  # the beginning of what is too long is lost
    with pytest.raises(UserError, match="128 new tokens asked for; accepted: fewer than the 128"):
        lm.generate_until(asked(("a", {"max_gen_toks": 128})), disable_tqdm=True)


def test_chats_are_written_by_the_model_s_template(lm):
    said = [{"role": "user", "content": "hi"}]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.apply_chat_template(said) == prompt
    assert lm.chat_template(True) == tiny.CHATML and lm.chat_template() is None
    assert lm.tokenizer_name.startswith("jaxdistill-")
