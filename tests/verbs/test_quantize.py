"""`quantize` end to end: what is killed is finished to the same bits, and what is left on disk serves other runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from dfcompress import console
from dfcompress.cli import run
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput, DfcompressError, GateNotMet
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.fake_quantizers import quantized_layers, tensor_grids
from dfcompress.quantization.calibration import Calibration, calibration_batches
from dfcompress.quantization.reconstruction import Reconstruction
from dfcompress.settings import named_function
from dfcompress.synthesis.recipe import Synthesis, choose
from dfcompress.synthesis.transfer_set import TransferSetSource
from dfcompress.training.loop import Trainer
from dfcompress.training.settings import Training
from dfcompress.verbs import export
from dfcompress.verbs._co_training import co_training
from dfcompress.verbs._finish import Compressed, TeacherReport
from dfcompress.verbs._gates import Gates
from dfcompress.verbs._quantize_defaults import (
    BEFORE_LSQ,
    LSQ,
    usual_calibration,
    usual_images,
    usual_rounding,
    usual_tuning,
)
from dfcompress.verbs.distill import distill
from dfcompress.verbs.evaluate import Evaluation, Score
from dfcompress.verbs.quantize import quantize

DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off", seed=0)
SMALL, LARGE = (ModelCard("own", 10, (3, side, side), (0.5,) * 3, (0.25,) * 3) for side in (32, 224))
SAVING = "import sys; from dfcompress import cli, run; run.SAVE_EVERY_SECONDS = 0.0; sys.exit(cli.run(sys.argv[1:]))"


def line_of(finetune, output):
    """A command that makes its images, calibrates and fine-tunes in a second or two."""
    asked = f"--bits 3w3a --finetune {finetune} --train-steps 60 --train-batch-size 32 --compile off --precision fp32"
    made = "--images 64 --steps 10 --batch-size 32 --calibration-steps 2 -q"
    rounded = ["--rounding-set", "steps=40"] if finetune == "blocks+lsq" else []
    return ["quantize", str(DEMO), *asked.split(), *rounded, *made.split(), "-o", str(output)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: the folder of an undisturbed run of that fine-tuning."""

    @cache
    def whole(finetune):
        folder = tmp_path_factory.mktemp("whole") / finetune
        assert run(line_of(finetune, folder)) == 0
        return folder

    return whole


def resumes_to(whole, folder, finetune):
    assert not (folder / "model.safetensors").exists()
    assert run([*line_of(finetune, folder), "--resume"]) == 0
    for name in ("model.safetensors", "quantization.json"):
        assert (folder / name).read_bytes() == (whole(finetune) / name).read_bytes()
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_a_killed_reconstruction_resumes_to_the_same_bytes(whole, tmp_path):
    """SIGKILL a real process when its first units are done, and run the line again."""
    process = subprocess.Popen([sys.executable, "-c", SAVING, *line_of("blocks", tmp_path / "killed")])
    while not (tmp_path / "killed" / "blocks.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    resumes_to(whole, tmp_path / "killed", "blocks")


@pytest.mark.parametrize(
    ("finetune", "state", "saves"),
    [
        ("blocks", "blocks.partial", 3),
        ("lsq", "training.partial", 30),
        ("blocks+lsq", "blocks.partial", 2),
        ("blocks+lsq", "training.partial", 1),
    ],
)
def test_a_quantization_that_ends_between_two_states_resumes_to_the_same_bytes(
    finetune, state, saves, whole, killed_at_save, tmp_path
):
    with killed_at_save(state, saves):
        run(line_of(finetune, tmp_path / "ended"))
    assert (tmp_path / "ended" / state).exists()
    resumes_to(whole, tmp_path / "ended", finetune)


def test_a_small_network_is_quantized_in_one_thread_and_the_others_are_given_back(monkeypatch, tmp_path):
    """In two threads, with a busy second core, the demo's network would take fifteen times the CPU time."""
    seen, linear = set(), torch.nn.functional.linear

    def watched(input, *rest):
        if len(input) > 4:  # Up to four images are looked at before any work.
            seen.add(torch.get_num_threads())
        return linear(input, *rest)

    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    torch.set_num_threads(2)
    quick = Synthesis(images=64, settings={"steps": 2, "batch_size": 32})
    rounding, training = {"steps": 2}, {"steps": 2, "batch_size": 32}
    quantize(DEMO, synthesis=quick, rounding=rounding, training=training, compute=EAGER, output=tmp_path / "q")
    assert seen == {1}
    assert torch.get_num_threads() == 2


def test_what_was_measured_is_what_is_loaded_to_the_bit(tmp_path, monkeypatch):
    saved = []
    from dfcompress.verbs import _finish

    writing = _finish.save
    monkeypatch.setattr(_finish, "save", lambda student, folder: (saved.append(student), writing(student, folder)))
    training = Training(steps=3, lr=0.01, batch_size=32, freeze_batchnorm=True)
    quantize(DEMO, data=DEMO, output=tmp_path / "out", rounding={"steps": 3}, training=training, compute=EAGER)
    images = torch.rand(16, 1, 32, 32)
    assert torch.equal(load(tmp_path / "out")(images), saved[0](images))


FACTORIES = """
from torch import nn

def make(*dropout):
    stem = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), *dropout
    return nn.Sequential(*stem, nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))

def plain():
    return make(nn.Identity())

def with_dropout():
    return make(nn.Dropout2d(0.5))

class WithHead(nn.Sequential):
    def __init__(self):
        super().__init__(*plain())
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        *body, head = self
        early = nn.Sequential(*body[:4])(images)
        late = nn.Sequential(*body[4:])(early)
        return (late, head(early.mean((2, 3)))) if self.training else late

with_head = WithHead

class Cut(WithHead):
    def forward(self, images):
        return super().forward(images).detach()

cut = Cut
"""


def defined(folder, name):
    """A teacher of the factory of that name, from a file; all of them have the same weights."""
    (folder / "net.py").write_text(FACTORIES)
    torch.manual_seed(0)
    namespace: dict = {"__name__": "net"}
    exec(FACTORIES, namespace)
    torch.save(namespace[name]().state_dict(), folder / f"{name}.pt")
    return load(folder / f"{name}.pt", arch=f"{folder / 'net.py'}:{name}", input_size=(1, 32, 32))


@pytest.mark.parametrize("finetune", ["lsq", "kd"])
def test_dropout_and_heads_in_the_definition_change_nothing(finetune, tmp_path):
    """A quantized network is repaired, and has no weights to spare for noise."""
    states = []
    for name in ("plain", "with_dropout", "with_head"):
        teacher, settings = defined(tmp_path, name), {"steps": 3, "batch_size": 32}
        asked = {"data": DEMO, "finetune": finetune, "training": settings, "compute": EAGER}
        quantize(teacher, output=tmp_path / name, calibration=Calibration(steps=1), **asked)
        states.append(load(tmp_path / name, arch=teacher.card.architecture).state_dict())
    assert all(torch.equal(other[name], value) for other in states[1:] for name, value in states[0].items())


def test_a_network_that_no_gradient_reaches_is_quantized_without_fine_tuning(tmp_path):
    asked = {"data": DEMO, "compute": EAGER, "calibration": Calibration(steps=1), "output": tmp_path / "out"}
    with pytest.raises(BadInput, match=r"cannot be trained: .*does not require grad.*--finetune none"):
        quantize(defined(tmp_path, "cut"), **asked)
    assert not (tmp_path / "out").exists()
    quantize(defined(tmp_path, "cut"), finetune="none", **asked)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_images_of_one_run_serve_another(tmp_path):
    few = Synthesis(images=40, settings={"steps": 2, "batch_size": 20})
    first = quantize(DEMO, output=tmp_path / "first", finetune="none", synthesis=few, compute=EAGER)
    recipes = {path.name: SyntheticSet(path).manifest["recipe"]["name"] for path in (tmp_path / "first").glob("synth*")}
    assert recipes == {"synthetic": "bns-inception", "synthetic-bns": "bns"}
    again = quantize(DEMO, output=tmp_path / "again", data=first.output, finetune="none", compute=EAGER)
    assert load(again.checkpoint).sha256 == load(first.checkpoint).sha256
    assert again.seconds["synthesis"] == 0
    assert len(TransferSetSource(load(DEMO), first.output, Synthesis(), EAGER)) == 38


def test_a_competitor_under_repair_learns_at_a_fifth_of_the_rate():
    teacher, recipe = load(DEMO), choose("adaptive-deepinversion", overrides={"student_lr": 0.05}).recipe
    assert co_training(teacher, recipe, None, EAGER).settings(steps=1).lr == 0.05
    repaired = co_training(teacher, recipe, load(DEMO), EAGER, repair=True).settings(steps=1)
    assert repaired.lr == pytest.approx(0.01)
    assert repaired.freeze_batchnorm


def test_adaptive_images_compete_with_what_quantization_leaves_of_the_model(tmp_path, monkeypatch):
    """It begins with the model's own weights and statistics, learns without losing these, and depends on the bits."""
    learned, fit = [], Trainer.fit

    def seen(trainer, source):
        trained = fit(trainer, source)
        learned.append(trainer.student)
        return trained

    monkeypatch.setattr(Trainer, "fit", seen)
    settings = {"steps": 2, "batch_size": 16, "student_steps": 2, "student_batch_size": 8}
    asked = Synthesis(recipe="adaptive-deepinversion", images=32, settings=settings)
    shards = []
    for bits in ("2w2a", "8w8a"):
        folder = tmp_path / bits
        quantize(DEMO, bits=bits, finetune="none", second_recipe=None, synthesis=asked, output=folder, compute=EAGER)
        teacher = load(DEMO).state_dict()
        for name, value in learned[-1].state_dict().items():
            if "running" in name:
                assert torch.equal(value, teacher[name]), name
            elif value.dim() > 1:
                assert 0 < (value - teacher[name]).norm() < 0.2 * teacher[name].norm(), name
        shards.append((folder / "synthetic" / "shard-00000.safetensors").read_bytes())
    assert shards[0] != shards[1]


def test_correction_and_ranges_are_settings_of_calibration(tmp_path):
    shas = set()
    for number, calibration in enumerate(
        [Calibration(), Calibration(correction=False), Calibration(weights="minmax"), Calibration(inputs="minmax")]
    ):
        done = quantize(
            DEMO, data=DEMO, output=tmp_path / str(number), finetune="none", calibration=calibration, compute=EAGER
        )
        shas.add(load(done.checkpoint).sha256)
    assert len(shas) == 4


def test_signed_activations_have_no_zero_points_in_the_file(tmp_path):
    quantize(
        DEMO, bits="8w8a", data=DEMO, output=tmp_path / "out", finetune="none", calibration=Calibration(signed=True)
    )
    grids = [layer.input_grid for layer in quantized_layers(load(tmp_path / "out").network).values()]
    assert all(grid.signed and grid.zero_point == 0 for grid in grids)
    layers = json.loads((tmp_path / "out" / "quantization.json").read_text())["layers"]
    assert all(row["input_low"] < 0 < row["input_high"] for row in layers)


def test_the_papers_method_has_every_published_value_and_each_can_be_changed():
    """Haroush et al. 2020, section 4."""
    published = Calibration(
        inputs="minmax",
        weights="minmax",
        steps=200,
        signed=False,
        correction=False,
        weight_grid="asymmetric",
        replacement=True,
    )
    assert usual_calibration("paper", None, input_size=(3, 224, 224)) == published
    changes = {"steps": 3, "correction": True}
    assert usual_calibration("paper", changes, input_size=(3, 32, 32)) == replace(published, steps=3, correction=True)
    small = usual_tuning("kd", None, method="paper", card=SMALL)
    assert (small.steps, small.batch_size, small.freeze_batchnorm, small.schedule) == (16_000, 512, True, "cosine")
    assert small.augmentation.flip
    assert small.augmentation.mixup
    large = usual_tuning("kd", None, method="paper", card=LARGE)
    assert (large.steps, large.batch_size) == (44_000, 256)
    fewer = usual_tuning("kd", {"steps": 7}, method="paper", card=SMALL)
    assert fewer == replace(small, steps=7)
    assert usual_tuning("lsq", None, method="paper", card=SMALL) == LSQ


@pytest.mark.parametrize(
    ("weight_grid", "symmetric"),
    [("auto", {"2": False, "3": False, "4": True}), ("symmetric", dict.fromkeys("234", True))],
)
def test_two_and_three_bits_have_zero_points_by_default_and_none_where_they_are_not_wanted(
    weight_grid, symmetric, tmp_path
):
    widths = {"conv2": "2w8a", "fc1": "3w8a", "fc2": "4w8a"}
    asked = {"data": DEMO, "calibration": {"steps": 1, "weight_grid": weight_grid}, "compute": EAGER}
    done = quantize(DEMO, bits="8w8a", layer_bits=widths, finetune="none", output=tmp_path / "out", **asked)
    layers = quantized_layers(load(done.checkpoint).network)
    assert {str(layers[name].weight_bits): layers[name].weight_grid.symmetric for name in widths} == symmetric
    assert layers["conv1"].weight_grid.symmetric


def test_the_papers_images_are_of_one_recipe_unless_others_are_asked_for():
    teacher, some = load(DEMO), Synthesis(images=8)
    made, second = usual_images("paper", teacher, some, "auto", trains=True)
    assert (made.recipe, made.preset, second) == ("bns-inception", "paper-cifar10", None)
    made, second = usual_images("paper", teacher, replace(some, recipe="bns"), "deepinversion", trains=True)
    assert (made.recipe, made.preset, second) == ("bns", None, "deepinversion")
    made, second = usual_images("default", teacher, some, "auto", trains=True)
    assert (made.recipe, made.preset, second) == ("bns-inception", None, "auto")


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({"bits": "4w4a"}, 2048),
        ({"bits": "4w4a", "finetune": "none"}, 512),
        ({"bits": "4w4a", "finetune": "blocks"}, 2048),
        ({"bits": "4w4a", "training": {"steps": 0}}, 512),
        ({"bits": "4w4a", "training": {"steps": 0}, "rounding": {"steps": 20}}, 2048),
        ({"bits": "8w8a"}, 512),
        ({"bits": "8w8a", "method": "paper", "finetune": "none"}, 2048),
        ({"bits": "8w8a", "synthesis": Synthesis(images=30)}, 30),
    ],
)
def test_calibration_alone_makes_fewer_images(settings, images):
    assert sum(part.spec.images for part in quantize.plan(DEMO, **settings).synthesis) == images


def test_the_papers_weights_cover_each_channel_with_all_integers_and_nothing_is_corrected(tmp_path):
    asked = {"data": DEMO, "method": "paper", "calibration": {"steps": 2}, "compute": EAGER}
    done = quantize(DEMO, bits="3w8a", first_last_bits="same", finetune="none", output=tmp_path / "out", **asked)
    made, teacher = load(done.checkpoint), load(DEMO)
    for name, layer in quantized_layers(made.network).items():
        integers, grid = layer.integer_weight()
        assert not grid.symmetric
        weight = teacher.network.get_parameter(f"{name}.weight").flatten(1)
        covered = weight.amax(1).clamp_min(0) - weight.amin(1).clamp_max(0)
        torch.testing.assert_close(grid.scale, covered / 7)
        rows = integers.flatten(1)
        assert ((rows.amax(1) == 7) | (rows.amin(1) == 0)).all()
    before, quantized = teacher.network.state_dict(), {f"{name}.weight" for name in quantized_layers(made.network)}
    for name, tensor in made.network.state_dict().items():
        assert name in quantized or name.endswith("num_batches_tracked") or torch.equal(tensor, before[name])
    options = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (options["method"], options["calibration"]["steps"]) == ("paper", 2)
    assert (options["calibration"]["inputs"], options["calibration"]["replacement"]) == ("minmax", True)


def test_the_papers_fine_tuning_learns_with_kd_and_iq(tmp_path):
    asked = {"data": DEMO, "method": "paper", "calibration": {"steps": 1}, "training": {"steps": 2, "batch_size": 16}}
    quantize(DEMO, output=tmp_path / "out", compute=EAGER, **asked)
    options = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (options["finetune"], options["objectives"]) == ("kd", {"kd": 1.0, "iq": 0.001})
    assert (options["training"]["steps"], options["training"]["batch_size"]) == (2, 16)


def test_calibration_with_replacement_fills_a_batch_from_fewer_images_and_depends_on_the_seed_alone():
    images = (torch.arange(10, dtype=torch.uint8) * 20).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    drawing = Calibration(steps=2, replacement=True)
    first, second = calibration_batches(images, drawing, seed=0)
    assert first.shape == second.shape == (256, 1, 8, 8)
    assert not torch.equal(first, second)
    counts = torch.unique((first[:, 0, 0, 0] * 255).round(), return_counts=True)[1]
    assert len(counts) == 10
    assert counts.min() < counts.max()
    assert torch.equal(first, next(calibration_batches(images, drawing, seed=0)))
    assert not torch.equal(first, next(calibration_batches(images, drawing, seed=1)))
    assert next(calibration_batches(images, Calibration(steps=1), seed=0)).shape == (10, 1, 8, 8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"finetune": "qat"}, "finetune='qat' is not a valid argument"),
        ({"method": "papers"}, "method='papers' is not a valid argument"),
        ({"calibration": {"step": 3}}, "no setting of calibration called 'step'. Did you mean 'steps'"),
        ({"calibration": {"weight_grid": "skewed"}}, "weight_grid='skewed' is not a valid argument"),
        ({"finetune": "blocks", "training": Training(steps=3, lr=0.1, batch_size=8)}, "not set by a Training"),
        ({"finetune": "lsq", "training": Reconstruction()}, "not set by a Reconstruction"),
        ({"finetune": "lsq", "rounding": {"steps": 3}}, "has no rounding before its training"),
        ({"finetune": "blocks", "rounding": Reconstruction()}, "has no rounding before its training"),
        ({"rounding": {"step": 3}}, "no setting of rounding called 'step'. Did you mean 'steps'"),
        ({"objectives": {"feature": 1.0}}, "No objective compares"),
        ({"objectives": {"kd": 1.0, "iqs": 1.0}}, "no objective 'iqs'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(asked, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        quantize(DEMO, data=DEMO, output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_gate_without_what_it_counts_is_bad_input(tmp_path):
    data = tmp_path / "few.npz"
    import numpy as np

    np.savez(data, images=np.zeros((8, 1, 32, 32), np.uint8), labels=np.zeros(8, np.int64))
    done = quantize(DEMO, data=data, output=tmp_path / "out", finetune="none", compute=EAGER)
    with pytest.raises(BadInput, match="Add --eval-data"):
        Gates(max_drop=1.0).check(done)
    with pytest.raises(GateNotMet, match="too few images"):
        Gates(min_agreement=0.5).check(done)
    Gates().check(done)


def scored(name, correct, total=1000):
    share = correct / total
    return Score(
        checkpoint=name, correct=correct, total=total, top1=share, standard_error=0.0, top5=None, agreement=None
    )


def test_a_loss_of_just_so_many_points_is_allowed():
    """In floating point 100 · (0.93 − 0.92) is more than 1."""
    for correct in range(100, 1001):
        scores = [scored("teacher", correct), scored("student", correct - 10)]
        result = Compressed("", "", 1, 1.0, 1, {}, 1.0, [], [], Evaluation(scores))
        Gates(max_drop=1.0).check(result)
        with pytest.raises(GateNotMet, match=r"loses 1\.00 points"):
            Gates(max_drop=0.99).check(result)


def test_all_gates_that_are_missed_are_told_at_once_with_the_number_of_images(monkeypatch):
    follows = TeacherReport(checkpoint="net", agreement=1.0, held_out=0.5, probe=None, blocks=None, held_out_images=4)
    scores = [scored("teacher", 900), scored("student", 800)]
    result = Compressed("", "", 1, 1.0, 1, {}, 1.0, [follows], [], Evaluation(scores))
    with pytest.raises(GateNotMet, match=r"on 50\.00% of the 4 images held out.*loses 10\.00 points"):
        Gates(max_drop=1.0, min_agreement=0.9).check(result)
    said: list[str] = []
    monkeypatch.setattr(console, "notice", said.append)
    Gates(min_agreement=0.5).check(result)
    assert "judged by 4 images" in said[0]


def test_single_settings_are_changed_by_name(tmp_path):
    asked = {"data": DEMO, "finetune": "lsq", "compute": EAGER, "eval_data": None}
    with pytest.raises(BadInput, match="no setting of training called 'step'"):
        quantize(DEMO, output=tmp_path / "out", training={"step": 3}, **asked)
    with pytest.raises(BadInput, match="none trains nothing"):
        quantize(DEMO, output=tmp_path / "out", training={"steps": 3}, **asked | {"finetune": "none"})
    assert not (tmp_path / "out").exists()
    quantize(DEMO, output=tmp_path / "out", training={"steps": 2, "batch_size": 8}, **asked)
    options = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (options["training"]["steps"], options["training"]["batch_size"]) == (2, 8)
    assert options["training"]["lr"] == LSQ.lr
    assert options["rounding"] is None


@pytest.mark.parametrize(
    ("asked", "rounded", "trained"),
    [
        ({}, BEFORE_LSQ, LSQ.steps),
        ({"rounding": {"steps": 2, "drop": 0.25}}, replace(BEFORE_LSQ, steps=2, drop=0.25), LSQ.steps),
        ({"rounding": Reconstruction(lr=0.5)}, Reconstruction(lr=0.5), LSQ.steps),
        ({"rounding": {"steps": 0}}, None, LSQ.steps),
        ({"training": {"steps": 0}}, None, None),
        ({"rounding": {"lr": 0.5}, "training": {"steps": 0}}, replace(BEFORE_LSQ, lr=0.5), None),
    ],
)
def test_both_halves_of_the_fine_tuning_are_settable(asked, rounded, trained):
    planned = quantize.plan(DEMO, data=DEMO, compute=EAGER, **asked).settings
    assert planned["rounding"] == rounded
    assert (planned["training"].steps if planned["training"] else None) == trained


def test_large_images_are_fine_tuned_on_fewer_of_them():
    """An hour of two cores holds a hundred times as many images of 32 pixels as of 224."""
    tuning = usual_tuning("blocks+lsq", None, method="default", card=LARGE)
    assert (tuning.steps, tuning.batch_size) == (100, 32)
    assert usual_tuning("lsq", {"steps": 7}, method="default", card=LARGE) == replace(tuning, steps=7)
    assert usual_rounding("blocks+lsq", None, tuning, small=False) == replace(BEFORE_LSQ, steps=100)
    assert usual_rounding("blocks+lsq", None, tuning, small=True) == BEFORE_LSQ


def test_settings_of_the_rounding_reach_the_reconstruction(tmp_path, monkeypatch):
    seen = []
    learn = importlib.import_module("dfcompress.verbs.quantize").reconstruct
    monkeypatch.setattr(
        "dfcompress.verbs.quantize.reconstruct",
        lambda *networks_and_settings, **others: (
            seen.append(networks_and_settings[3]) or learn(*networks_and_settings, **others)
        ),
    )
    asked = {"data": DEMO, "calibration": {"steps": 1}, "compute": EAGER, "training": {"steps": 1, "batch_size": 8}}
    done = quantize(DEMO, output=tmp_path / "out", rounding={"steps": 1, "batch_size": 8}, **asked)
    assert seen == [replace(BEFORE_LSQ, steps=1, batch_size=8)]
    options = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (options["rounding"]["steps"], options["training"]["steps"]) == (1, 1)
    assert done.seconds["rounding"] > 0


def test_what_cannot_be_exported_is_told_before_anything_is_made(tmp_path, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise DfcompressError("onnxruntime cannot load it", "Use the model without ONNX.")

    monkeypatch.setattr(export, "Session", refuse)
    with pytest.raises(DfcompressError, match="cannot load"):
        quantize(DEMO, output=tmp_path / "out", export="onnxruntime", compute=EAGER)
    assert not (tmp_path / "out").exists()


def test_a_vision_transformer_is_quantized_by_images_of_its_patches(tmp_path):
    """Random weights: every linear layer gets 8 bits, and the file answers in onnxruntime as the model does."""
    torch.manual_seed(0)
    arch = f"{Path(__file__).parents[1] / 'models' / 'factories.py'}:tiny_vit"
    torch.save(named_function(arch, option="--arch", returns="a network")().state_dict(), tmp_path / "vit.pt")
    teacher = load(tmp_path / "vit.pt", arch=arch, input_size=(3, 64, 64))
    few = Synthesis(images=8, settings={"steps": 4, "warmup": 0, "batch_size": 8})
    made = quantize(
        teacher,
        bits="8w8a",
        finetune="none",
        synthesis=few,
        calibration={"steps": 1},
        compute=EAGER,
        export="onnxruntime",
        output=tmp_path / "packed",
    )
    assert SyntheticSet(tmp_path / "packed" / "synthetic").manifest["recipe"]["name"] == "psaq-vit"
    packed = load(tmp_path / "packed", arch=arch)
    of_blocks = {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(quantized_layers(packed.network)) == {"patch_embed.proj", "head", *of_blocks}
    assert made.bytes_ratio < 0.3
    assert made.export.equal == made.export.images
    images = torch.rand(16, 3, 64, 64)
    error = (packed(images) - teacher(images)).norm() / teacher(images).norm()
    assert 0 < error < 0.1


def quantized_demo(folder, **asked):
    images = {"data": DEMO, "calibration": {"steps": 1}, "compute": EAGER}
    return quantize(DEMO, bits="8w8a", output=folder, **images, **asked)


def test_eight_bits_everywhere_give_grids_to_all_tensors_and_the_file_is_what_was_measured(tmp_path):
    done = quantized_demo(tmp_path / "out", export="onnxruntime")
    made = load(done.checkpoint)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in made.network.modules())
    grids, layers = tensor_grids(made.network), quantized_layers(made.network)
    assert {name for grid in grids.values() for name in grid.feeds} == layers.keys()
    assert done.seconds["training"] == 0
    assert done.agreement > 0.99
    assert done.export.equal_unsaturated >= 0.995 * done.export.images
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["options"]["placement"], record["options"]["finetune"]) == ("all-tensors", "none")


@pytest.mark.parametrize(
    "asked",
    [
        {"placement": "layer-inputs", "finetune": "none"},
        {"layer_bits": {"fc1": "4w8a"}, "finetune": "none"},
        {"finetune": "lsq", "training": {"steps": 1}},
    ],
    ids=["asked for", "other bits", "fine-tuning"],
)
def test_otherwise_inputs_of_layers_alone_get_grids(asked, tmp_path):
    made = load(quantized_demo(tmp_path / "out", **asked).checkpoint)
    assert tensor_grids(made.network) == {}
    assert all(layer.input_grid for layer in quantized_layers(made.network).values())


def test_tensorrt_gets_grids_without_zero_points(tmp_path):
    made = load(quantized_demo(tmp_path / "out", export="tensorrt").checkpoint)
    assert all(grid.input_grid.signed for grid in tensor_grids(made.network).values())


def test_a_student_does_not_begin_with_layers_that_hold_their_batchnorms(tmp_path):
    made = quantized_demo(tmp_path / "out")
    with pytest.raises(BadInput, match="has grids on all tensors"):
        distill(DEMO, student_init=made.checkpoint, data=DEMO, output=tmp_path / "student")
