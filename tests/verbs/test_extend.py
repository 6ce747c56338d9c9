"""`extend` end to end, on a small model that is made here and images of noise."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dfcompress import console
from dfcompress.cli import root, run
from dfcompress.distributed import World
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.saving import save
from dfcompress.reporting.sections.summary_table import _teachers_top1
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.training.class_incremental import DEFAULT, METHODS, incremental_method
from dfcompress.training.loop import METRICS
from dfcompress.training.student import make_student
from dfcompress.verbs.extend import extend, training_for
from dfcompress.verbs.report import _all

EAGER = Compute(device="cpu", precision="fp32", compile="off")
FEW = Synthesis(images=32, settings={"steps": 2, "batch_size": 32})
SHORT = {"steps": 4, "batch_size": 16}
LINE = "--images 32 --steps 6 --batch-size 32 --probe-images 0 --compile off --precision fp32 --train-batch-size 16 -q"


@pytest.fixture
def old(tmp_path):
    """A model of two classes whose BatchNorms remember something."""
    card = ModelCard("lenet5_bn", 2, (1, 32, 32), (0.4,), (0.2,), ("x", "y"))
    classifier, _ = make_student("lenet5_bn", card, seed=1)
    for _ in range(3):
        classifier.train()(torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    save(classifier.eval(), tmp_path / "old")
    return tmp_path / "old"


def images(path, *labels, size=28):
    """Ten images of noise of each label."""
    shape, random = (10 * len(labels), 1, size, size), np.random.default_rng(len(labels))
    np.savez(path, images=random.integers(0, 256, shape, np.uint8), labels=np.repeat(labels, 10))
    return path


@pytest.fixture
def new(tmp_path):
    """Images of labels 5, 6 and 7, smaller than the model's."""
    return images(tmp_path / "new.npz", 5, 6, 7)


def extended(old, new, output, **options):
    return extend(old, new_data=new, output=output, synthesis=FEW, training=SHORT, compute=EAGER, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_model_of_all_classes(method, old, new, tmp_path):
    real = {"old_data": images(tmp_path / "real.npz", 0, 1)} if method == "oracle" else {}
    result = extended(old, new, tmp_path / "out", method=method, probe_images=8, **real)
    model = load(result.checkpoint)
    assert model.card.class_names == ("x", "y", "5", "6", "7")
    assert 0 <= result.agreement <= 1
    assert result.teachers[0].probe is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert lines[0].keys() >= {"step", "lr"}
    assert (tmp_path / "out" / "synthetic").exists() == (method != "oracle")
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert ("new-classes" in result.seconds) == incremental_method(method).expert


def test_another_step_is_pruned_quantized_and_merged(old, new, tmp_path, capsys):
    """On the model that is extended already; known names are more images of their classes."""
    console.configure(console.NORMAL)
    first = extended(old, new, tmp_path / "first")
    again = images(tmp_path / "again.npz", 7, 8)
    second = extended(first.checkpoint, again, tmp_path / "second", also_old=True, old_images=tmp_path / "first")
    assert load(second.checkpoint).card.class_names == ("x", "y", "5", "6", "7", "8")
    assert not (tmp_path / "second" / "synthetic").exists()
    assert "No image stands for 3 of the 5 classes that first knows" in capsys.readouterr().err
    console.configure(console.QUIET)
    line = f"prune {second.checkpoint} --data {tmp_path / 'first'} --filters 0.8 --train-steps 2 --probe-images 0 -q"
    assert run([*line.split(), "--train-batch-size", "16", "--compile", "off", "-o", str(tmp_path / "pruned")]) == 0
    assert load(tmp_path / "pruned").card.class_names == ("x", "y", "5", "6", "7", "8")
    line = f"quantize {second.checkpoint} --data {tmp_path / 'first'} --bits 8w8a --finetune none -q"
    assert run([*line.split(), "-o", str(tmp_path / "packed")]) == 0
    assert load(tmp_path / "packed").card.classes == 6
    line = f"merge {first.checkpoint} {old} --student lenet5_bn --train-steps 2 {LINE} -o {tmp_path / 'merged'}"
    assert run(line.split()) == 0
    assert load(tmp_path / "merged").card.classes == 5


def test_more_images_of_old_classes_are_measured_on_as_they_are_learnt_from(old, tmp_path):
    """And a report of new classes alone knows no accuracy of the teacher's."""
    mixed = images(tmp_path / "mixed.npz", 1, 5)
    names = tmp_path / "names.txt"
    names.write_text("x\ny\na\nb\nc\nd\n")
    of_old = images(tmp_path / "of-old.npz", 0, 1)
    asked = {"class_names": names, "also_old": True, "probe_images": 0}
    result = extended(old, mixed, tmp_path / "out", eval_data=[of_old, mixed], **asked)
    assert [(score.images, score.total) for score in result.evaluation.results] == [
        ("old", 30),
        ("old", 30),
        ("new", 10),
        ("all", 40),
    ]
    learnt, of_new = images(tmp_path / "new.npz", 5), images(tmp_path / "of-new.npz", 2)
    alone = extended(old, learnt, tmp_path / "alone", eval_data=of_new, **asked)
    assert [score.images for score in alone.evaluation.results] == ["new", "all"]
    (run_of_new,) = _all([tmp_path / "alone"])
    assert _teachers_top1(run_of_new) is None


def test_parts_of_a_batch_that_processes_cannot_share_are_refused(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr("dfcompress.training.class_incremental.replay.world", lambda: World(0, 4, 0, 4))
    with pytest.raises(BadInput, match=r"6 old and 10 new images of a batch .* among 4 .*--train-batch-size 20"):
        extend.plan(old, new_data=new, synthesis=FEW, training=SHORT, compute=EAGER, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "state", "saves"),
    [
        ("abd", "shard-00000.partial", 3),
        ("deepinversion", "training.partial", 7),
        ("rdfcil", "training.partial", 20),
    ],
)
def test_a_command_that_ends_between_two_states_resumes_to_the_same_bytes(
    method, state, saves, old, new, killed_at_save, tmp_path
):
    """In the middle of its images, of the model of the new classes, and of the two parts of a training."""
    line = f"extend {old} --new-data {new} --method {method} --train-steps 24 {LINE}".split()
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert run([*line, "-o", str(whole)]) == 0
    with killed_at_save(state, saves):
        run([*line, "-o", str(ended)])
    assert list(ended.rglob(state))
    assert not (ended / "model.safetensors").exists()
    assert run([*line, "-o", str(ended), "--resume"]) == 0
    assert (ended / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_real_images_are_counted_from_one_source_or_two_and_gate_the_old_classes(old, new, tmp_path, capsys):
    one, of_old = images(tmp_path / "all.npz", 0, 1, 2, 3, 4), images(tmp_path / "of_old.npz", 0, 1)
    result = extended(old, new, tmp_path / "out", eval_data=[one])
    assert [(each.images, each.total) for each in result.evaluation.results] == [
        ("old", 20),
        ("old", 20),
        ("new", 30),
        ("all", 50),
    ]
    result = extended(old, new, tmp_path / "out", eval_data=[of_old, new], resume=True)
    assert [each.total for each in result.evaluation.results] == [20, 20, 30, 50]
    line = f"extend {old} --new-data {new} --train-steps 2 {LINE} --eval-data {of_old} --eval-data {new} --json"
    code = run([*line.split(), "-o", str(tmp_path / "gated"), "--max-drop", "0", "--min-agreement", "1"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 3
    assert [each["name"] for each in printed["evaluation"]["forgetting"]] == ["x", "y"]
    assert printed["bytes_ratio"] > 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--new-data {new} --method oracle", "real images of the old classes"),
        ("--new-data {new} --old-data {new}", "no real images of the old classes"),
        ("--new-data {new} --class-names {absent}", "cannot be read"),
        ("--new-data {absent}", "does not exist"),
        ("--new-data {known}", "already knows '0'"),
        ("--new-data {new} --eval-data {new} --eval-data {new} --eval-data {new}", "3 times"),
        ("--new-data {new} --max-drop 1", "--max-drop needs real images"),
        ("--new-data {new} --method lwf", "is not one of"),
        ("--new-data {new} --train-batch-size 7", "too few of the old or of the new classes"),
        ("--new-data {new} --train-set mixup=1", "mixes images of unlike labels"),
    ],
)
def test_bad_input_ends_with_2_and_nothing_written(asked, message, old, new, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "{known}" in asked:  # A model without names calls its classes 0 and 1.
        save(nameless(old), old)
    known = images(tmp_path / "known.npz", 0, 5)
    words = [*LINE.replace("-q", "").split(), *asked.format(new=new, absent=tmp_path / "absent", known=known).split()]
    before = sorted(tmp_path.rglob("*"))
    assert run(["extend", str(old), *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def nameless(folder):
    classifier = load(folder)
    classifier.card = replace(classifier.card, class_names=None)
    return classifier


@pytest.mark.parametrize("method", METHODS)
def test_help_tells_the_training_of_every_method(method):
    """Help must not import torch, so it repeats numbers that belong to the methods."""
    told = {parameter.name: parameter for parameter in root.get_command(None, "extend").params}
    training = incremental_method(method).training
    for field in ("steps", "lr", "batch_size"):
        own, _, rest = told[f"train_{field}"].show_default.partition(f" with {DEFAULT}, ")
        others = rest.removeprefix("more for many new images, ").removeprefix("else ")
        assert (own if method == DEFAULT or not others else others) == str(getattr(training, field))


@pytest.mark.parametrize(("count", "steps"), [(10, 4000), (100_000, 8 * 100_000 // 64)])
def test_many_new_images_are_all_seen_several_times(count, steps):
    card = ModelCard("lenet5_bn", 10, (1, 32, 32), (0.4,), (0.2,))
    usual = training_for(incremental_method("abd"), card, replace(card, classes=20), count)
    assert usual.steps == steps


@pytest.mark.parametrize("dry", [True, False])
def test_an_image_that_cannot_be_decoded_is_refused_before_any_is_made(dry, old, tmp_path, capsys):
    (tmp_path / "birds" / "wren").mkdir(parents=True)
    (tmp_path / "birds" / "wren" / "1.png").touch()
    line = ["extend", str(old), "--new-data", str(tmp_path / "birds"), *LINE.split(), "-o", str(tmp_path / "o")]
    assert run([*line, *["--dry-run"] * dry]) == 2
    assert "1.png" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(old, new, tmp_path, capsys):
    assert run(["extend", str(old), "--new-data", str(new), *LINE.split(), "--dry-run", "-o", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "training: steps=" in out
    assert "flip=False" in out
    assert f"the result goes to {tmp_path / 'o'}" in out
    assert "32 images" in out or "16 images" in out
    assert not (tmp_path / "o").exists()
