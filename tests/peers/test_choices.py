"""Multiple choice against transformers' own log-likelihoods, and inside the lm-evaluation-harness.

The harness runs on tasks written here, over files of our form, without a network.
"""

import importlib.util
import json

import numpy as np
import pytest
import yaml

from jaxdistill.evals.choices import load_choices, score_choices
from jaxdistill.evals.lm_eval import harness_model, rolling_windows
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.evaluate import Evaluate, evaluate
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (make test-peers)"
)


@pytest.mark.slow
def test_smollm2_chooses_as_transformers_does(smollm2_path, shared_data):
    """60 real questions of four sets: the same choices, log-likelihoods equal but for rounding."""
    here = load_model(smollm2_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    tokenizer, apply = here.text_tokenizer(), here.apply_fn()
    largest, same, hits = 0.0, 0, [0, 0]
    for name in ("openbookqa_dev", "piqa_valid_a", "winogrande_val_a", "blimp_a"):
        asked = load_choices(shared_data / "mc" / f"{name}.jsonl.gz", limit=15)
        ours = score_choices(apply, here.params, tokenizer, asked, max_length=8192)
        theirs = _transformers_scores(there, tokenizer, asked)
        for question, got, want in zip(asked, ours.log_likelihoods, theirs, strict=True):
            largest = max(largest, np.abs(got - want).max())
            same += got.argmax() == want.argmax()
            hits[0] += got.argmax() == question.label
            hits[1] += want.argmax() == question.label
    print(f"SmolLM2, 60 questions: {same} equal choices, {hits[0]} and {hits[1]} right, ", end="")
    print(f"max |difference of log-likelihood| {largest:.1e}")
    assert same == 60 and hits[0] == hits[1]
    assert largest < 2e-3


def _transformers_scores(model, tokenizer, questions):
    """Log-likelihoods of each question's choices, tokens as transformers' tokenizer splits them."""
    texts = []  # tokens, and how many of them are context
    for question in questions:
        before = tokenizer(question.context)["input_ids"] if question.context else []
        for choice in question.choices:
            whole = tokenizer(f"{question.context} {choice}" if before else choice)["input_ids"]
            assert whole[: len(before)] == before
            texts.append((whole, len(before)) if before else ([tokenizer.bos_token_id, *whole], 1))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    scores = np.zeros(len(texts))
    for rows in (order[start : start + 16] for start in range(0, len(order), 16)):
        batch = torch.zeros(len(rows), len(texts[rows[-1]][0]), dtype=torch.long)
        for row, i in zip(batch, rows, strict=True):
            row[: len(texts[i][0])] = torch.tensor(texts[i][0])
        with torch.no_grad():
            logits = model(batch).logits
        for row, i in zip(logits, rows, strict=True):
            tokens, first = texts[i]
            log_p = row[first - 1 : len(tokens) - 1].log_softmax(-1)
            picked = log_p.gather(-1, torch.tensor(tokens[first:])[:, None])
            scores[i] = picked.double().sum()
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    return np.split(scores, ends)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A tiny model, and two files: with contexts (one ends in a space), and without."""
    folder, rng = tmp_path_factory.mktemp("harness"), np.random.default_rng(0)
    words = "sky sea green blue über fish Zürich two-part a the of ,".split()

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    files = {}
    for name in ("with_context", "whole"):
        rows = []
        for i in range(40):
            context = f"{text(1, 12)}{' ' * (i % 5 == 0)}" if name == "with_context" else ""
            choices = [text(1, 6) for _ in range(4)]
            rows.append({"context": context, "choices": choices, "label": int(rng.integers(4))})
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny.save_model(folder / "model"), files


def _tasks(folder, files):
    """Writes a task a file in the harness's own form, and returns its task manager."""
    from lm_eval.tasks import TaskManager

    for name, path in files.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": " " if name == "with_context" else "",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


@needs_harness
def test_the_harness_counts_what_evaluate_counts(questions, tmp_path):
    import lm_eval

    model, files = questions
    ours = evaluate(Evaluate(model=model, choices=tuple(str(path) for path in files.values())))
    loaded = load_model(model)
    found = lm_eval.simple_evaluate(
        harness_model(loaded, batch_tokens=500),
        tasks=list(files),
        task_manager=_tasks(tmp_path, files),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    for name, path in files.items():
        got, want = found["results"][name], ours["choices"][name]
        assert got["acc,none"] == want["acc"]
        assert got["acc_bytes,none"] == want["acc_norm"]
        alone = score_choices(
            loaded.apply_fn(),
            loaded.params,
            loaded.text_tokenizer(),
            load_choices(path),
            max_length=128,
        )
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        for sample, scores in zip(samples, alone.log_likelihoods, strict=True):
            inside = [float(answer[0]) for answer in sample["filtered_resps"]]
            np.testing.assert_allclose(inside, scores, rtol=1e-5, atol=1e-4)
    assert 0 < ours["choices_mean"]["acc"] < 1


TEXTS = ("sky", "green as", "the über fish, ", "two-part \n", "<s>sea of", " ", "a" * 150)


@needs_harness
def test_requests_are_answered_as_the_harness_own_model_does(questions):
    """Beside the harness's model class for transformers, on the same weights and tokenizer."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path, _ = questions
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = harness_model(load_model(path), batch_size=3)
    peer = HFLM(pretrained=model.eval(), tokenizer=ours.tokenizer, batch_size=2, max_length=128)

    def both(kind, arguments):
        asked = [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
        return [getattr(lm, kind)(asked, disable_tqdm=True) for lm in (ours, peer)]

    pairs = [(a, b) for a in ("", *TEXTS) for b in TEXTS[:-1] if a.strip() or a == ""]
    got, want = both("loglikelihood", pairs)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5, atol=1e-4)

    got, want = both("loglikelihood_rolling", [(text,) for text in (*TEXTS, "sky sea " * 40)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)

    options = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    longer = options | {"until": [], "max_gen_toks": 30}
    prompts = [(text, how) for text in (*TEXTS[:4], TEXTS[-1]) for how in (options, longer)]
    got, want = both("generate_until", prompts)
    assert got == want and len(set(got)) > 3


@needs_harness
@pytest.mark.parametrize("max_length", [1, 2, 5, 8])
def test_long_texts_are_cut_as_the_harness_cuts_them(max_length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in range(20):
        tokens = list(range(10, 10 + length))
        want = get_rolling_token_windows(tokens, 1, max_length, context_len=1)
        want = [make_disjoint_window(pair) for pair in want]
        assert [tuple(pair) for pair in rolling_windows(tokens, 1, max_length)] == want
