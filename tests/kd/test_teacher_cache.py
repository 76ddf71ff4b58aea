"""The teacher on disk: it says what the live one says, knows what it is of, and survives kills."""

import dataclasses
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill._disk import DirectoryLock
from jaxdistill.errors import UserError
from jaxdistill.kd.cache_writer import bytes_per_token, write_cache
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.kd.teacher_cache import CachedRows, check_loss, open_cache
from jaxdistill.models.decoder import Output, make_apply
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from jaxdistill.train.packing import Packed, batches, eval_batches
from tests import tiny

PRINTS = {"model": "m1", "tokenizer": "t1", "data": "d1"}
ROWS, T, K = 10, 16, 8
CONFIG = tiny.config()


def APPLY(params, tokens, positions=None, segment_ids=None):  # noqa: N802
    """A bigram model, quick to compile: the cache sees hidden states and a head alone."""
    return Output(jnp.take(params["h"], tokens, axis=0), params["e"])


def bigram(seed):
    h, e = jax.random.normal(jax.random.key(seed), (2, CONFIG.vocab_size, 16))
    return {"h": h * 0.7, "e": e}


def packed_rows(rows=ROWS):
    return Packed(**{name: np.array(a) for name, a in tiny.batch(CONFIG, rows, T).items()})


@pytest.fixture(scope="module")
def problem():
    """Rows, a teacher and another model of its shape."""
    return packed_rows(), bigram(0), bigram(1)


def written(directory, problem, **options):
    rows, teacher, _ = problem
    options = {"k": K, "rows_per_shard": 4, "batch_size": 2, "fingerprints": PRINTS} | options
    return write_cache(directory, APPLY, teacher, rows, **options)


@pytest.fixture(scope="module")
def caches(problem, tmp_path_factory):
    """Caches of both precisions."""
    folder = tmp_path_factory.mktemp("caches")
    return {p: written(folder / p, problem, precision=p) for p in ("float16", "float32")}


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def losses(problem, loss, cache, top_k=K, **options):
    """Return the loss from the cache and that of the live teacher, each with its gradient."""
    rows, teacher, student = problem
    found = []
    for guide, data in ((None, CachedRows(rows, cache)), (APPLY, rows)):
        objective = kd_objective(
            APPLY, guide, loss, top_k=top_k if guide else 0, chunk=32, **options
        )
        params, batch = teacher if guide else None, on_device(data[:])

        def mean(p, params=params, objective=objective, batch=batch):
            total, count, _ = objective(p, params, batch)
            return total / count

        value, gradient = jax.jit(jax.value_and_grad(mean))(student)
        found.append((float(value), gradient))
    return found


@pytest.mark.parametrize(
    "loss", ["forward_kl", "reverse_kl", "0.7*jsd:beta=0.3+0.3*ce", "total_variation", "taid:t=0.5"]
)
def test_the_cache_says_what_the_live_teacher_says(problem, caches, loss):
    for precision, rtol in (("float32", 1e-5), ("float16", 2e-3)):
        (got, d_got), (want, d_want) = losses(problem, loss, caches[precision])
        assert want > 0.05
        assert got == pytest.approx(want, rel=rtol), precision
        for a, b in zip(jax.tree.leaves(d_got), jax.tree.leaves(d_want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=10 * rtol * float(jnp.abs(b).max()))


def test_another_temperature_is_cached_as_it_is_seen(problem, tmp_path):
    cache = written(tmp_path, problem, temperature=2.0, precision="float32")
    (got, _), (want, _) = losses(problem, "forward_kl:temperature=2", cache)
    assert got == pytest.approx(want, rel=1e-5)
    rows, teacher, student = problem
    batch = on_device(CachedRows(rows, cache)[:])
    objective = jax.jit(kd_objective(APPLY, None, "forward_kl:temperature=2"))
    for params, kl in ((teacher, 0.0), (student, want / 4)):  # the metric has no T^2
        _, count, metrics = objective(params, None, batch)
        assert float(metrics["kl"][0] / count) == pytest.approx(kl, rel=1e-5, abs=1e-5)


def test_the_teacher_itself_is_at_zero_and_none_below(problem, caches):
    """Rounded probabilities do not add up to 1; a divergence of them is still at least 0."""
    rows, teacher, _ = problem
    batch = CachedRows(rows, caches["float16"])[:]
    sums = np.exp(batch["teacher_log_probs"].astype(np.float64)).sum(-1)
    sums += np.exp(batch["teacher_log_tail"].astype(np.float64))
    assert np.abs(sums - 1).max() > 1e-5  # else there would be nothing to test
    objective = jax.jit(kd_objective(APPLY, None, "forward_kl"))
    for row in range(ROWS):
        one = on_device({name: a[row : row + 1] for name, a in batch.items()})
        total, count, _ = objective(teacher, None, one)
        assert -1e-6 < float(total / count) < 1e-5


def test_a_cache_of_the_whole_vocabulary_is_the_whole_teacher(problem, tmp_path):
    """Nothing is left for the tail, and what is nothing stays finite in every precision."""
    for precision, rtol in (("float32", 1e-5), ("float16", 2e-3)):
        cache = written(tmp_path / precision, problem, k=1000, precision=precision)
        assert cache.header.k == CONFIG.vocab_size
        for loss in ("forward_kl", "jeffreys"):
            (got, gradient), (want, _) = losses(problem, loss, cache, top_k=0)
            assert got == pytest.approx(want, rel=rtol)
            assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_several_teachers_are_mixed_as_the_objective_mixes_them(problem, tmp_path):
    rows, teacher, student = problem
    pair = (teacher, bigram(2))
    objective = kd_objective(APPLY, (APPLY, APPLY), "forward_kl", mixture="confidence", top_k=K)
    want = objective(student, pair, on_device(rows[:]))[0]
    cache = write_cache(
        tmp_path, (APPLY, APPLY), pair, rows, k=K, mixture="confidence", precision="float32",
        chunk=24, fingerprints=PRINTS, teachers=("a", "b"),
    )  # fmt: skip
    batch = on_device(CachedRows(rows, cache)[:])
    got = kd_objective(APPLY, None, "forward_kl")(student, None, batch)[0]
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert cache.header.mixture == "confidence" and cache.header.teachers == ("a", "b")


def test_bytes_on_disk_are_those_stated(caches, problem, tmp_path):
    assert bytes_per_token(64, 49152) == 64 * 4 + 2 == 258
    assert bytes_per_token(64, 128256) == 64 * 6 + 2
    assert bytes_per_token(64, 49152, "float32") == 64 * 6 + 4
    for cache in caches.values():
        files = list(cache.path.glob("*.npy"))
        assert len(files) == 9
        size = sum(f.stat().st_size for f in files) - 128 * len(files)
        assert size == cache.header.bytes_per_token * ROWS * T
    assert caches["float16"].header.bytes_per_token == K * 4 + 2


def test_rows_slices_and_single_rows_agree(caches, problem):
    cached = CachedRows(problem[0], caches["float16"])
    whole = cached[:]
    assert whole["teacher_indices"].dtype == np.uint16
    assert whole["teacher_log_probs"].dtype == np.float16
    for i in (0, 3, 4, ROWS - 1, -1):
        for name, row in cached[i].items():
            np.testing.assert_array_equal(row, whole[name][i])
    for part in (slice(3, 9), slice(2, 2), slice(8, 100), slice(0, 9, 3)):
        for name, rows in cached[part].items():
            np.testing.assert_array_equal(rows, whole[name][part])
    with pytest.raises(IndexError):
        cached.cache[ROWS]


def test_a_rewritten_shard_is_the_same(problem, caches, tmp_path):
    """A cut-off file, a missing one and a half-written one: resumed, each byte is as before."""
    cache = written(tmp_path / "c", problem)
    files = {f.name: f.read_bytes() for f in cache.path.iterdir()}
    cut, gone = cache.path / "00001.log_probs.npy", cache.path / "00002.log_tail.npy"
    cut.write_bytes(files[cut.name][:-7])
    with pytest.raises(UserError, match=r"damaged \(00001.log_probs.npy.*6 of 10 rows.*--resume"):
        open_cache(cache.path, PRINTS)
    (cache.path / "00001.indices.npy.part").write_bytes(b"half")
    gone.unlink()
    kept = (cache.path / "00000.indices.npy").stat().st_mtime_ns
    done = []
    written(cache.path, problem, resume=True, progress=lambda *a: done.append(a))
    assert {f.name: f.read_bytes() for f in cache.path.iterdir()} == files
    assert (cache.path / "00000.indices.npy").stat().st_mtime_ns == kept
    assert done == [(4, False), (2, True), (2, True), (2, True)]
    for f in cache.path.glob("00002*"):
        f.unlink()
    with pytest.raises(UserError, match="not finished: 8 of 10 rows are whole"):
        open_cache(cache.path)


def test_a_killed_writer_resumes_bit_for_bit(tmp_path):
    """Kill -9 between shards, resume: every file as of a run left alone, whole shards untouched."""
    code = """
        import sys, time
        from pathlib import Path
        from tests.kd import test_teacher_cache as t
        problem = t.packed_rows(40), t.bigram(0), None
        t.written(Path(sys.argv[1]), problem, progress=lambda *_: time.sleep(0.05))
    """
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(cut)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while not (cut / "00002.log_tail.npy").exists():
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="not finished"):
        open_cache(cut)
    first = (cut / "00001.log_probs.npy").stat().st_mtime_ns
    problem = packed_rows(40), bigram(0), None
    written(cut, problem, resume=True)
    written(whole, problem)
    assert (cut / "00001.log_probs.npy").stat().st_mtime_ns == first
    assert {f.name: f.read_bytes() for f in cut.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }


def test_one_writer_at_a_time(caches, problem):
    path = caches["float16"].path
    with DirectoryLock(path), pytest.raises(UserError, match="float16 is being written by proc"):
        written(path, problem, resume=True)
    written(path, problem, resume=True)


@pytest.mark.parametrize("name", ["model", "tokenizer", "data"])
def test_a_cache_of_something_else_is_refused(caches, name):
    with pytest.raises(UserError, match=rf"of the {name} {PRINTS[name]}, and the {name} here is x"):
        open_cache(caches["float16"].path, PRINTS | {name: "x"})


def test_what_is_no_cache_of_these_rows_is_refused(caches, problem, tmp_path):
    with pytest.raises(UserError, match="holds no teacher cache; give"):
        open_cache(tmp_path / "nothing")
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_cache(tmp_path)
    (tmp_path / "cache.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99; accepted: 1"):
        open_cache(tmp_path)
    with pytest.raises(UserError, match="10 rows of 16 tokens, and here are 9 of 16"):
        CachedRows(packed_rows(9), caches["float16"])
    with pytest.raises(UserError, match="already holds"):
        written(caches["float16"].path, problem)
    with pytest.raises(UserError, match="started with k 8, now it is 4; resume with the same"):
        written(caches["float16"].path, problem, k=4, resume=True)
    with pytest.raises(UserError, match="no teacher cache to resume"):
        written(tmp_path / "new", problem, resume=True)
    (tmp_path / "cache.json").unlink()
    (tmp_path / "other").write_text("mine")
    with pytest.raises(UserError, match="is not a teacher cache"):
        written(tmp_path, problem)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ("forward_kl:temperature=2", "temperature 2.0 and .* made at 1; accepted: forward_kl:temp"),
        ("jsd:temperature=4..1", r"temperature 4\.\.1 and"),
        ("policy_gradient", "policy_gradient needs a live teacher"),
    ],
)
def test_losses_that_a_cache_cannot_serve_are_refused(caches, loss, match):
    with pytest.raises(UserError, match=match):
        check_loss(caches["float16"], loss)


def test_losses_that_a_cache_serves_pass(caches):
    check_loss(caches["float16"], "0.5*jsd:beta=0.1+0.5*ce")
    with pytest.raises(UserError, match="correction by labels"):
        check_loss(caches["float16"], "forward_kl", correction="label_mix")


def test_confidence_is_the_teachers(caches, problem):
    rows, teacher, _ = problem
    out = APPLY(teacher, *(on_device(rows[:])[n] for n in ("tokens", "positions", "segment_ids")))
    top = np.asarray(jax.nn.softmax(out.logits())).max(-1)
    want = top[:, :-1][rows.loss_mask[:, 1:]].mean()
    got = CachedRows(rows, caches["float32"]).confidence()
    assert got == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_training_from_the_cache_needs_no_teacher(caches, problem, quantized):
    """The loss falls; a fake-quantized student is a student like any other."""
    rows, _, params = problem
    apply = APPLY
    if quantized:
        policy = default_policy(QuantSpec(group_size=32), tied=True)
        apply = make_apply(CONFIG, transform=fake_quant_params(policy))
        params = add_scales(tiny.params(CONFIG, 1), policy)
    tx = adamw(3e-2, 30)
    step = make_step(kd_objective(apply, None, "forward_kl"), tx)
    data = batches(CachedRows(rows, caches["float16"]), batch_size=4, seed=0)
    state, seen = init_state(params, tx), []
    for i in range(30):
        state, metrics = step(state, None, data[i])
        seen.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.mean(seen[-5:]) < 0.6 * np.mean(seen[:5])


def test_evaluation_batches_hold_the_cache_too(caches, problem):
    last = eval_batches(CachedRows(problem[0], caches["float16"]), 4)[-1]
    assert last["teacher_log_probs"].shape == (4, T, K) and not last["teacher_log_tail"][2:].any()


def test_a_models_fingerprint_tells_models_apart(problem):
    teacher, student = problem[1:]
    first = model_fingerprint(CONFIG, teacher)
    assert len(first) == 16 and first == model_fingerprint(CONFIG, jax.tree.map(np.array, teacher))
    others = [
        model_fingerprint(CONFIG, student),
        model_fingerprint(dataclasses.replace(CONFIG, rope_theta=1.0), teacher),
        model_fingerprint(CONFIG, teacher | {"x": np.zeros(1, np.float32)}),
        model_fingerprint(CONFIG, jax.tree.map(lambda x: x.astype(jnp.bfloat16), teacher)),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("name", ["00001.indices.npy", "cache.json", "checksums.jsonl"])
def test_a_flipped_bit_is_named_and_made_again(name, problem, tmp_path):
    cache = written(tmp_path / "c", problem)
    file = cache.path / name
    good = file.read_bytes()
    file.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(UserError, match="is damaged"):
        open_cache(cache.path, PRINTS)
    if name.endswith("npy"):
        written(cache.path, problem, resume=True)
        assert file.read_bytes() == good
    file.write_bytes(good)
    (cache.path / "checksums.jsonl").unlink()
    assert len(open_cache(cache.path, PRINTS)) == ROWS


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_never_cached(value, problem, tmp_path):
    rows, teacher, other = problem
    sick = {"h": teacher["h"].at[int(rows.tokens[5, 3])].set(value), "e": teacher["e"]}
    with pytest.raises(UserError, match="in rows . to . are not finite"):
        written(tmp_path / "c", (rows, sick, other))
    for shard in tmp_path.rglob("*.npy"):
        assert np.isfinite(np.load(shard)).all()
