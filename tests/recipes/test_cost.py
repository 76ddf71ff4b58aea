"""`cost`: the three tiers in one table, each figure from the formulas of ``evals.cost``."""

import json
import shutil

import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.cost import matrix_params, serving, stored_bytes, training_flops
from jaxdistill.evals.devices import device
from jaxdistill.models.hub import load_config
from jaxdistill.models.quantized import save_quantized
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.measure import weight_bytes
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params
from jaxdistill.recipes.cost import Cost, cost
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    small = tiny.save_model(folder / "small")
    return small, tiny.save_model(folder / "large", num_layers=6, intermediate_size=256)


def test_the_cascade_is_the_student_and_a_share_of_the_teacher(models, capsys):
    small, large = models
    given = ["--student", small, "--teacher", large, "--requests", "1000", "--coverage", "0.6"]
    more = ["--person", "0.1", "--person-price", "2", "--price", "3.6", "--json"]
    main(["cost", *given, *more])
    report = json.loads(capsys.readouterr().out)
    answers = report["answers"]
    for name in ("flops", "bytes", "device_hours", "kwh"):
        both = answers["student"][name] + 0.4 * answers["teacher"][name]
        assert answers["cascade"][name] == pytest.approx(both)
    paid = answers["student"]["price"] + 0.4 * answers["teacher"]["price"]
    assert answers["cascade"]["price"] == pytest.approx(paid)
    assert report["people"] == pytest.approx(1000 * 0.1 * 2)
    assert report["fits"] == {"student": True, "teacher": True}
    config = load_config(large)
    held = stored_bytes(config, 16)
    one = serving(config, device("h100"), weights=held, prompt=512, new=128)
    assert answers["teacher"]["device_hours"] == pytest.approx(1000 * one.seconds / 3600)
    saved = answers["teacher"]["device_hours"] - answers["cascade"]["device_hours"]
    assert report["saved"] == pytest.approx(saved / answers["teacher"]["device_hours"])
    after = report["training"]["device_hours"] / (saved / 1000)
    assert report["pays_after"] == pytest.approx(after)
    assert set(report["formulas"]) >= {"flops", "bytes", "device_hours", "kwh", "price", "cascade"}


def test_what_is_shown(models, capsys):
    small, large = models
    main(["cost", "--student", small, "--teacher", large, "--device", "v5e"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1,000,000 requests on TPU v5e" in shown and "fewer device hours" in shown
    main(["cost", "--student", small, "--coverage", "0"])
    assert "its student answers too little" in " ".join(capsys.readouterr().out.split())


def test_a_run_directory_is_its_student(models, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"options": {}}')
    shutil.copytree(models[1], run / "student")
    assert cost(Cost(student=str(run))) == cost(Cost(student=models[1]))


def test_a_float_student_has_16_bits_and_trains_all(models):
    found = cost(Cost(student=models[0], tokens=1e6, seq_len=64))
    config = load_config(models[0])
    assert found["student"] == {"weights": "16 bits", "freeze": "none"}
    assert found["weights"]["student"] == found["weights"]["teacher"] == stored_bytes(config, 16)
    free = training_flops(config, 64, teacher=config)["model"]
    assert found["training"]["flops"] == pytest.approx(1e6 * free)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, None, False)])
def test_a_run_is_priced_at_its_own_bits(bits, group, symmetric, tmp_path):
    """Against the bytes of its arrays, less norms and biases."""
    config = tiny.config(tie_embeddings=False)
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric, ranges="absmax")
    policy = default_policy(spec, tied=False)
    params = quantize_params(add_scales(tiny.params(config), policy), policy)
    save_quantized(tmp_path / "run" / "student", config, params, None, policy)
    (tmp_path / "run" / "config.json").write_text('{"options": {"freeze": "v_proj"}}')
    found = cost(Cost(student=str(tmp_path / "run"), seq_len=64, tokens=1e6))
    others = sum(
        2 * leaf.size
        for path, leaf in walk(params)
        if not path.removesuffix("_q")
        .removesuffix("_scale")
        .removesuffix("_zero")
        .endswith(("kernel", "embedding"))
    )
    held = found["weights"]["student"] + found["tables"]["student"]
    assert held + others == weight_bytes(params, policy)
    assert found["student"]["freeze"] == "v_proj" and f"{bits} bits" in found["student"]["weights"]
    frozen = training_flops(config, 64, teacher=config, frozen="v_proj")["model"]
    assert found["training"]["flops"] == pytest.approx(1e6 * frozen)
    (tmp_path / "run" / "config.json").write_text('{"options": {"student_init": "lora:rank=4"}}')
    adapters = cost(Cost(student=str(tmp_path / "run"), seq_len=64, tokens=1e6))
    less = 2e6 * matrix_params(config)  # no kernel has a gradient
    assert adapters["training"]["flops"] == pytest.approx(
        1e6 * training_flops(config, 64, teacher=config)["model"] - less
    )


def test_an_untied_table_needs_memory_too(tmp_path):
    weights = stored_bytes(load_config("llama-3.1-8b"), 16)
    table = 128256 * 4096 * 2
    gib = (weights + table / 2) / 2**30
    small = {"name": "s", "tflops": 1, "gib": gib, "gb_per_s": 1}
    (tmp_path / "devices.json").write_text(json.dumps({"small": small}))
    job = Cost(student="llama-3.1-8b", device="small", devices=tmp_path / "devices.json")
    found = cost(job)
    assert found["tables"] == {"student": table, "teacher": table}
    assert found["fits"] == {"student": True, "teacher": False}


@pytest.mark.parametrize("coverage", [0.9, 0.8, 0.7, 1.0])
def test_shares_that_are_all_the_requests(coverage, models):
    found = cost(Cost(student=models[0], coverage=coverage, person=round(1 - coverage, 2)))
    assert found["answers"]["cascade"]["flops"] > 0


def test_a_model_that_does_not_fit(models, tmp_path):
    path = tmp_path / "devices.json"
    path.write_text('{"small": {"name": "s", "tflops": 1, "gib": 0.0001, "gb_per_s": 1}}')
    found = cost(Cost(student=models[0], teacher=models[1], device="small", devices=path))
    assert found["fits"] == {"student": False, "teacher": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' given; accepted: a100, h100"),
        ({"coverage": 0.9, "person": 0.2}, "1 in all at most"),
        ({"requests": -1.0}, "--requests -1.0 given"),
        ({"student_bits": 0}, "--student-bits 0 given"),
        ({"group_size": 32}, "--group-size 32 needs --student-bits"),
        ({"mfu": 2.0}, "mfu 2.0"),
        ({"freeze": "("}, "--freeze '(' is not a regular expression"),
        ({"freeze": "auto"}, "accepted here: ov, none, or a regex"),
        ({"price": -1.0}, "--price -1.0"),
        ({"student": "nowhere/at/all"}, "nowhere"),
    ],
)
def test_bad_options(changes, message, models):
    with pytest.raises(UserError) as e:
        cost(Cost(**({"student": models[0]} | changes)))
    assert message in str(e.value) and "\n" not in str(e.value)
