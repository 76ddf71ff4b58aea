"""The verb cache-teacher: what it writes is what a student's training asks for."""

import json

import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.kd.teacher_cache import CachedRows, open_cache
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.cache_teacher import CacheTeacher, cache_fingerprints, cache_teacher
from jaxdistill.recipes.prepare import pack_rows, split_rows
from jaxdistill.train.data import load_rows
from tests import tiny

SMALL = {"k": 8, "seq_len": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, other = tiny.save_model(folder / "model"), tiny.save_model(folder / "other", seed=1)
    return model, other, tiny.save_text(folder / "text.jsonl")


def test_a_student_opens_it_with_the_same_options(inputs, tmp_path, capsys):
    model, _, data = inputs
    said = ["cache-teacher", "--teacher", model, "--data", data, "--out", str(tmp_path / "c")]
    main([*said, "--k", "8", "--seq-len", "32", "--batch-size", "4", "--json"])
    summary = json.loads(capsys.readouterr().out)
    # As the recipes that train prepare it.
    teacher = load_model(model)
    packed = pack_rows(split_rows(load_rows(data), data)[0], teacher, 32)
    prints = cache_fingerprints(packed, teacher.text_tokenizer(), [teacher])
    assert prints == summary["fingerprints"] and list(prints) == ["model", "tokenizer", "data"]
    cached = CachedRows(packed, open_cache(tmp_path / "c", prints))
    files = list((tmp_path / "c").glob("*.npy"))
    assert summary["bytes"] == sum(f.stat().st_size for f in files)
    assert summary["bytes"] == summary["bytes_per_token"] * packed.tokens.size + 128 * len(files)
    assert summary["rows"] == len(packed) and summary["tokens"] == packed.tokens.size
    mask = packed.loss_mask[:, 1:]
    whole = cached[:]
    kept = np.exp(whole["teacher_log_probs"].astype(np.float32)).sum(-1)[:, :-1][mask].mean()
    tail = np.exp(whole["teacher_log_tail"].astype(np.float32))[:, :-1][mask].mean()
    assert summary["kept"] == pytest.approx(float(kept), rel=1e-4)
    assert kept + tail == pytest.approx(1, abs=1e-3) and 0.05 < tail < 0.95
    # Another row length is other data, and is said to be.
    with pytest.raises(UserError, match="of the data .*--seq-len"):
        open_cache(
            tmp_path / "c",
            cache_fingerprints(
                pack_rows(split_rows(load_rows(data), data)[0], teacher, 16),
                teacher.text_tokenizer(),
            ),
        )


def test_several_teachers_resume_and_one_line(inputs, tmp_path, capsys):
    model, other, data = inputs
    said = ["cache-teacher", "--teacher", f"{model},{other}", "--data", data, "--eval-data", data]
    said += ["--k", "4", "--seq-len", "32", "--out", str(tmp_path / "c")]
    main([*said, "--mixture", "agreement"])
    line = capsys.readouterr().out
    assert "18 bytes a token" in line and line.count("\n") == 1
    files = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    header = json.loads(files["cache.json"])
    assert header["teachers"] == [model, other] and header["mixture"] == "agreement"
    assert len(header["fingerprints"]["model"].split("+")) == 2
    (tmp_path / "c" / "00000.log_tail.npy").write_bytes(b"cut")
    main([*said, "--mixture", "agreement", "--resume"])
    assert {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()} == files
    with pytest.raises(SystemExit):
        main([*said, "--resume"])
    assert "mixture 'agreement', now it is 'mean'" in capsys.readouterr().err


def test_a_padded_vocabulary_is_cut_to_the_one_shared(inputs, tmp_path):
    model, _, data = inputs
    wide = tiny.save_model(tmp_path / "wide", vocab_size=300)  # the same tokenizer
    cache_teacher(CacheTeacher(teacher=f"{model},{wide}", data=data, out=tmp_path / "c", **SMALL))
    assert open_cache(tmp_path / "c").header.vocab_size == 260


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": 0}, "--k 0 given; accepted: 1"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"mixture": "median"}, "no mixture is named 'median'; accepted: agreement"),
        ({"seq_len": 4096}, "--seq-len 4096 exceeds the 128 positions"),
        ({"teacher": ","}, "accepted: one model"),
    ],
)
def test_bad_options_write_nothing(inputs, tmp_path, changes, match):
    model, _, data = inputs
    options = SMALL | {"teacher": model, "data": data, "out": tmp_path / "c"} | changes
    with pytest.raises(UserError, match=match):
        cache_teacher(CacheTeacher(**options))
    assert not (tmp_path / "c").exists()
