"""`prune` end to end: a smaller dense network that every other verb takes, finished to the same bytes after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dfcompress.cli import run
from dfcompress.data.real import open_images
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.pruning import ImportanceName
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.verbs._prune_step import AUTO, CLEARLY, _divergence
from dfcompress.verbs.merge import merge
from dfcompress.verbs.prune import prune
from dfcompress.verbs.quantize import quantize

pytest.importorskip("torch_pruning")
DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off", seed=0)
FEW = Synthesis(images=64, settings={"steps": 2, "batch_size": 16})
SHORT = {"steps": 4, "batch_size": 16}


def line_of(output, *more):
    made = "--images 64 --steps 2 --batch-size 16 --set student_steps=2 --probe-images 0 --seed 0"
    trained = "--train-steps 12 --train-batch-size 16 --compile off --precision fp32 -q"
    return ["prune", str(DEMO), "--flops", "0.5", *made.split(), *trained.split(), *more, "-o", str(output)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run in two rounds, whose last has images that compete with the pruned network."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run(line_of(folder, "--rounds", "2")) == 0
    return folder


def test_half_of_the_operations_are_left_and_the_report_says_whose(whole):
    teacher, pruned = load(DEMO), load(whole)
    share = multiply_accumulates(pruned) / multiply_accumulates(teacher)
    assert 0.495 <= share <= 0.5
    report = json.loads((whole / "prune.json").read_text())
    assert [each["after"] / each["before"] for each in report["rounds"]] == pytest.approx([0.5**0.5, 0.5], rel=0.01)
    rows = {row["layer"]: row for row in report["layers"]}
    assert {name: tuple(zip(*(row["in"], row["out"]), strict=True))[1] for name, row in rows.items()} == {
        name: pruned.card.widths.get(name, (row["in"][0], row["out"][0])) for name, row in rows.items()
    }
    assert rows["fc3"]["out"] == [10, 10]
    assert report["refused"] == {"fc3": "fc3 keeps its channels: the network answers with its channels."}
    assert (whole / "widths.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "synthetic" / "dataset.json").exists()
    assert json.loads((whole / "synthetic" / "dataset.json").read_text())["recipe"]["name"] == "adaptive-deepinversion"


@pytest.mark.parametrize(
    ("state", "saves"), [("pruned-*.partial", 1), ("training.partial", 2), ("training.partial", 12)]
)
def test_a_killed_run_resumes_to_the_same_bytes(state, saves, whole, killed_at_save, tmp_path):
    """After the first round's pruning, in the first round's training, and in the last one's."""
    with killed_at_save(state, saves):
        run(line_of(tmp_path / "ended", "--rounds", "2"))
    assert not (tmp_path / "ended" / "model.safetensors").exists()
    assert run(line_of(tmp_path / "ended", "--rounds", "2", "--resume")) == 0
    assert (tmp_path / "ended" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list((tmp_path / "ended").rglob("*.partial"))
    measured = json.loads((tmp_path / "ended" / "run.json").read_text())["measurements"]
    assert measured["seconds"]["training"] > measured["training"]["seconds"]  # Of both rounds, and of the last.
    assert measured["seconds"]["pruning"] > 0
    assert run(line_of(tmp_path / "ended", "--rounds", "2", "--resume")) == 0


def test_a_pruned_network_is_quantized_merged_pruned_again_and_a_student(whole, tmp_path):
    options = {"data": whole, "compute": EAGER}
    packed = quantize(whole, bits="8w8a", finetune="none", output=tmp_path / "int8", **options)
    assert packed.agreement > 0.9
    assert packed.load().card.widths == load(whole).card.widths
    again = prune(whole, parameters=0.7, repair="refit", probe_images=0, output=tmp_path / "again", **options)
    pruned = sum(each.numel() for each in load(whole).network.parameters())
    assert 0.69 * pruned <= again.parameters <= 0.7 * pruned
    merged = merge(
        [whole, DEMO], student_init=whole, synthesis=FEW, training=SHORT, compute=EAGER, output=tmp_path / "merged"
    )
    assert [teacher.checkpoint for teacher in merged.teachers] == ["out", "demo_files"]


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """300 of the demo's own images, as the user of --data has them."""
    images, labels = next(open_images(DEMO, load(DEMO).card).batches(300))
    path = tmp_path_factory.mktemp("garments") / "some.npz"
    np.savez(path, images=(255 * images).byte().numpy(), labels=labels.numpy())
    return path


@pytest.mark.parametrize("importance", get_args(ImportanceName))
def test_refitting_brings_answers_back(importance, garments, tmp_path):
    options = {"parameters": 0.5, "importance": importance, "data": garments, "probe_images": 0, "compute": EAGER}
    none = prune(DEMO, repair="none", output=tmp_path / "none", **options)
    refit = prune(DEMO, repair="refit", output=tmp_path / "refit", **options)
    assert none.parameters == pytest.approx(refit.parameters, rel=0.02)  # `auto` may choose otherwise.
    assert refit.agreement > max(0.7, none.agreement)


def test_the_importance_that_changes_the_answers_less_is_taken(garments, tmp_path):
    options = {"flops": 0.5, "data": garments, "repair": "refit", "probe_images": 0, "compute": EAGER}
    made = {name: prune(DEMO, importance=name, output=tmp_path / name, **options) for name in ("auto", *AUTO)}
    images, _ = next(open_images(garments, load(DEMO).card).batches(300))
    expected = load(DEMO)(images).log_softmax(1)

    def divergence(name: str) -> float:
        found = made[name].load()(images).log_softmax(1)
        return float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))

    best = min(AUTO, key=divergence)
    best = best if divergence(best) < CLEARLY * divergence(AUTO[0]) else AUTO[0]
    (rounds,) = json.loads((tmp_path / "auto" / "prune.json").read_text())["rounds"]
    assert rounds["importance"] == best
    written = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in made}
    assert [name for name in AUTO if written[name] == written["auto"]] == [best]


def test_the_export_is_timed_beside_the_unpruned_network(whole, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    asked = "--parameters 0.3 --repair refit --probe-images 0 --export onnx -q --json --min-agreement 0.0"
    assert run(["prune", str(DEMO), *asked.split(), "--data", str(whole), "-o", str(out)]) == 0
    made = json.loads((out / "run.json").read_text())["measurements"]
    assert made["export"]["equal"] == made["export"]["images"]
    assert (out / "model.onnx").stat().st_size < 0.5 * (DEMO / "model.safetensors").stat().st_size


def test_a_budget_of_time_keeps_multiples_of_what_onnxruntime_computes_at_once(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert run(["prune", str(DEMO), "--latency", "0.9", "--json", "--dry-run", "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["pruning"]["round_to"] == 8


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert run([*line_of(tmp_path / "out", "--rounds", "2", "--json"), "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["pruning 1"]["share"] == pytest.approx(0.5**0.5)
    assert planned["pruning"] | {"share": 0.5, "resource": "flops", "round_to": 1} == planned["pruning"]
    assert planned["training"]["steps"] == 6
    assert planned["training"]["augmentation"]["flip"] is False
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "that says how much stays, not none"),
        ("--flops 0.5 --filters 0.5", "not --flops and --filters"),
        ("--flops 2", "--flops must be a share between 0 and 1; it is 2"),
        ("--flops 0.001", "the least possible is 0.0"),
        ("--filters 0.5 --repair refit --train-steps 5", "--repair refit trains nothing"),
        ("--filters 0.5 --repair none --objective kd=1", "--repair none trains nothing"),
        ("--filters 0.5 --objective kid=1", "There is no objective 'kid'"),
        ("--filters 0.5 --recipe adaptive-deepinversion --second-recipe none", "there are none to prune by"),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(options, message, tmp_path, capsys):
    assert run(["prune", str(DEMO), *options.split(), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_that_no_name_leads_to_is_pruned_and_resumed_in_python(whole, tmp_path):
    known = load(DEMO)
    card = ModelCard("nowhere", 10, known.card.input_size, known.card.mean, known.card.std)
    mine = Classifier(known.network, card).frozen()
    options = {"flops": 0.5, "repair": "refit", "data": whole, "probe_images": 0, "compute": EAGER}
    options["output"] = tmp_path / "out"
    done = prune(mine, **options)
    again = prune(mine, resume=True, eval_data=None, **options)
    assert again == done


def test_answers_that_decide_are_in_exact_fp32(precisions):
    teacher = load(DEMO)
    passes = precisions(teacher)
    assert _divergence(teacher, teacher, torch.zeros(4, *teacher.card.input_size, dtype=torch.uint8)) == 0
    assert set(passes) == {"ieee"}
