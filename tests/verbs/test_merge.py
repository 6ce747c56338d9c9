"""`merge`, `distill` and what they report, end to end on the teachers the package ships or that are made here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dfcompress import console
from dfcompress.cli import run
from dfcompress.data.fitted import reshaped
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.run import Clock
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSetSource
from dfcompress.training.loop import METRICS
from dfcompress.training.multi_teacher import merging_method
from dfcompress.training.steps import Steps
from dfcompress.training.student import make_student
from dfcompress.verbs._finish import _collapse
from dfcompress.verbs.distill import DISTILLATION, distill
from dfcompress.verbs.merge import merge, usual_images

DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off")
FEW = Synthesis(images=64, settings={"steps": 2, "batch_size": 32})
SHORT = replace(DISTILLATION, steps=4, batch_size=16)


def teacher(folder, names=None, classes=3, size=(1, 32, 32), architecture="lenet5_bn", seed=0):
    channels = size[0]
    card = ModelCard(architecture, classes, size, (0.4,) * channels, (0.2,) * channels, names)
    classifier, _ = make_student(architecture, card, seed=seed)
    for _ in range(3):  # For BatchNorms that remember something.
        classifier.train()(torch.rand(16, *size, generator=torch.Generator().manual_seed(seed)))
    save(classifier.eval(), folder)
    return folder


@pytest.fixture
def two(tmp_path):
    return [teacher(tmp_path / "a", ("x", "y", "z"), seed=1), teacher(tmp_path / "b", ("z", "w"), 2, seed=2)]


def merged(two, output, **options):
    return merge(two, student="lenet5_bn_half", output=output, synthesis=FEW, training=SHORT, compute=EAGER, **options)


def test_what_a_merge_leaves_behind(two, tmp_path):
    result = merged(two, tmp_path / "out")
    student = load(result.checkpoint)
    assert student.card.class_names == ("x", "y", "z", "w")
    assert student.card.input_size == (1, 32, 32)
    assert [teacher.checkpoint for teacher in result.teachers] == ["a", "b"]
    assert all(0 <= share <= 1 for teacher in result.teachers for share in teacher.blocks)
    for number in (1, 2):
        for name, images in (("synthetic", 32), ("synthetic-bns", 32)):
            made = SyntheticSet(tmp_path / "out" / f"teacher-{number}" / name)
            made.require_complete()
            assert len(made) == images
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert lines[0].keys() >= {"step", "lr", "images_per_second", "logits/1", "block/2", "agreement/1"}
    assert not list((tmp_path / "out").glob("*.partial"))
    supply = TransferSetSource(student, tmp_path / "out", FEW, EAGER)
    assert sum(map(len, supply.sources)) == 2 * FEW.images, "the merged student is compressed on all of them"


def test_the_same_line_resumes_to_the_same_bytes(two, tmp_path):
    first = merged(two, tmp_path / "one")
    again = merged(two, tmp_path / "one", resume=True)
    other = merged(two, tmp_path / "two")
    assert again == first
    assert load(other.checkpoint).sha256 == load(first.checkpoint).sha256


@pytest.mark.parametrize("verb", ["merge", "distill"])
@pytest.mark.parametrize(("state", "saves"), [("shard-00000.partial", 3), ("training.partial", 25)])
def test_a_command_that_ends_between_two_states_resumes_to_the_same_bytes(
    verb, state, saves, two, killed_at_save, tmp_path
):
    """In the middle of its images, and in the middle of its training."""
    models = two if verb == "merge" else two[:1]
    made = "--student lenet5_bn_half --images 96 --steps 6 --batch-size 32 --probe-images 0 --compile off"
    made += " --precision fp32"
    line = [verb, *map(str, models), *made.split(), "--train-steps", "40", "--train-batch-size", "16", "-q"]
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert run([*line, "-o", str(whole)]) == 0
    with killed_at_save(state, saves):
        run([*line, "-o", str(ended)])
    assert list(ended.rglob(state))
    assert not (ended / "model.safetensors").exists()
    assert run([*line, "-o", str(ended), "--resume"]) == 0
    assert (ended / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_teachers_of_grey_and_colour_and_of_two_sizes_share_the_larger_form(tmp_path):
    grey = teacher(tmp_path / "grey", seed=1)
    colour = teacher(tmp_path / "colour", size=(3, 24, 24), architecture="cifar_resnet20", seed=2)
    result = merge(
        [grey, colour], student="cifar_resnet20", output=tmp_path / "out", synthesis=FEW, training=SHORT, compute=EAGER
    )
    student = load(result.checkpoint).card
    assert (student.input_size, student.classes, student.class_names) == ((3, 32, 32), 6, None)
    assert student.mean == pytest.approx((0.4,) * 3)


def test_sets_that_are_fitted_to_the_student_are_still_known_as_sets(tmp_path):
    """What they were made by, and whether they are whole, is looked at before anything is begun."""
    grey = teacher(tmp_path / "grey", seed=1)
    colour = teacher(tmp_path / "colour", size=(3, 24, 24), architecture="cifar_resnet20", seed=2)
    made = tmp_path / "out"
    for number, each in enumerate((grey, colour), 1):
        TransferSetSource(load(each), None, FEW, EAGER, second_recipe="bns").gather(made / f"teacher-{number}")
    classifier = load(teacher(tmp_path / "student", size=(3, 32, 32), architecture="cifar_resnet20"))
    supply = TransferSetSource(classifier, made, FEW, EAGER, probe_images=4)
    assert sum(map(len, supply.sources)) == 2 * FEW.images
    assert supply.probe is not None
    assert supply.probe.choice.name == "bns-inception"
    (made / "teacher-2" / "synthetic" / "shard-00000.safetensors").unlink()
    with pytest.raises(BadInput, match="not complete"):
        TransferSetSource(classifier, made, FEW, EAGER)


def test_real_images_report_each_teacher_and_all_together(two, tmp_path):
    """Labels are the student's classes with one source, each teacher's own with two."""
    images, labels = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8), torch.arange(40) % 4
    one = tmp_path / "all.npz"
    save_npz(one, images, labels)
    save_npz(tmp_path / "a.npz", images[labels < 3], labels[labels < 3])
    save_npz(tmp_path / "b.npz", images[labels >= 2], labels[labels >= 2] - 2)
    together = merged(two, tmp_path / "out", eval_data=[one]).evaluation.results
    apart = merged(two, tmp_path / "out2", eval_data=[tmp_path / "a.npz", tmp_path / "b.npz"]).evaluation.results
    assert [row.images for row in together] == ["a", "a", "b", "b", "all", "all"]
    assert [row.total for row in together] == [30, 30, 20, 20, 40, 40]
    assert [row.correct for row in together][:4] == [row.correct for row in apart][:4]
    assert [row.total for row in apart][4:] == [50, 50]


def save_npz(path, images, labels):
    import numpy as np

    np.savez(path, images=images.numpy(), labels=labels.numpy())


def test_what_cannot_be_merged_is_refused(two, tmp_path):
    with pytest.raises(BadInput, match="b and b are the same checkpoint"):
        merged([two[1], two[1]], tmp_path / "out")
    with pytest.raises(BadInput, match="two checkpoints or more"):
        merged(two[:1], tmp_path / "out")
    with pytest.raises(BadInput, match="--data was given 1 times for 2 teachers"):
        merged(two, tmp_path / "out", data=[DEMO])
    with pytest.raises(BadInput, match="--eval-data was given 3 times for 2 teachers"):
        merged(two, tmp_path / "out", eval_data=[DEMO] * 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("old", "new"), [("all-logits", "logit-matching"), ("paper", "shapira-sidi")])
def test_a_run_that_was_started_by_the_older_name_of_its_method_resumes(old, new, two, tmp_path):
    """The record of version 0.1 holds the older name; another method is still another job."""
    first = merged(two, tmp_path / "out", method=new)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["options"]["method"] == new
    record["options"]["method"] = old
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    assert merged(two, tmp_path / "out", method=new, resume=True) == first
    assert merged(two, tmp_path / "out", method=old, resume=True) == first
    record["options"]["method"] = "another"
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="method"):
        merged(two, tmp_path / "out", method=new, resume=True)


def test_the_papers_way_makes_its_own_images_unless_others_are_asked_for():
    method = merging_method("shapira-sidi")
    synthesis, second = usual_images(method, Synthesis(), "auto")
    assert (synthesis.recipe, synthesis.preset, synthesis.images) == ("deepinversion", "paper-merging", 4096)
    assert second is None
    synthesis, second = usual_images(method, Synthesis(recipe="bns", images=8), "deepinversion")
    assert (synthesis.recipe, synthesis.preset, synthesis.images, second) == ("bns", None, 8, "deepinversion")


def test_the_command_merges_as_typed(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--images", "32", "--steps", "1", "--train-steps", "2", "--precision", "fp32", "--compile", "off"]
    code = run(["merge", "a", "b", "--student", "lenet5_bn_half", "--json", "-q", *quick])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["output"] == "a-merge"
    assert result.keys() >= {"checkpoint", "bytes", "bytes_ratio", "seconds", "teachers", "evaluation"}


def test_distill_reports_held_out_and_probe_images_and_keeps_them_apart(tmp_path):
    result = distill(
        DEMO, student="half", output=tmp_path / "out", synthesis=FEW, training=SHORT, probe_images=32, compute=EAGER
    )
    (followed,) = result.teachers
    assert 0 <= followed.held_out <= 1
    assert 0 <= followed.probe <= 1
    probe = SyntheticSet(tmp_path / "out" / "probe").manifest
    assert (probe["recipe"]["name"], probe["seed"], probe["images"]) == ("bns-inception", 1, 32)


def test_probe_images_are_of_no_recipe_that_was_learnt_from(tmp_path, capsys):
    first = distill(
        DEMO, student="half", output=tmp_path / "a", synthesis=FEW, training=SHORT, compute=EAGER, probe_images=0
    )
    few = replace(FEW, preset="fast-mnist")
    asked = {"synthesis": few, "training": {"steps": 2, "batch_size": 8}, "compute": EAGER, "probe_images": 32}
    console.configure(console.NORMAL)
    distill(DEMO, student="half", output=tmp_path / "b", data=first.output, **asked)
    console.configure(console.QUIET)
    assert "options of synthesis make no others" in capsys.readouterr().err
    assert SyntheticSet(tmp_path / "b" / "probe").manifest["recipe"]["name"] == "bns-inception"


@pytest.mark.parametrize("name", ["ce", "mse-logits", "feature", "attention"])
def test_every_objective_trains_a_student(tmp_path, name):
    made = distill(
        DEMO,
        student="lenet5_bn_half",
        output=tmp_path / "out",
        synthesis=FEW,
        training=SHORT,
        objectives={"kd": 1.0, name: 0.5},
        probe_images=0,
        second_recipe=None,
        compute=EAGER,
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert made.bytes > 0
    assert all(line[name] > 0 for line in lines)


def test_a_student_that_gives_up_half_of_the_classes_has_collapsed():
    given = torch.arange(40) % 4
    assert _collapse(given.clamp(max=2), given) is None
    assert "never answers 3 of the 4 classes" in _collapse(torch.zeros(40, dtype=torch.long), given)


def test_a_recipe_is_not_mixed_with_itself_and_not_with_chosen_classes(tmp_path):
    with pytest.raises(BadInput, match="is the first recipe, too"):
        distill(
            DEMO, student="half", output=tmp_path / "out", synthesis=FEW, second_recipe="deepinversion", compute=EAGER
        )
    some = replace(FEW, classes=("3",))
    with pytest.raises(BadInput, match="all classes"):
        distill(DEMO, student="half", output=tmp_path / "out", synthesis=some, second_recipe="bns", compute=EAGER)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_before_an_image_is_made(two, tmp_path):
    with pytest.raises(BadInput, match="method='papr' is not a valid argument of merge"):
        merged(two, tmp_path / "out", method="papr")
    wrong = replace(SHORT, optimizer="lamb", backend="apex")
    with pytest.raises(BadInput, match="CUDA alone"):
        distill(DEMO, student="half", output=tmp_path / "out", synthesis=FEW, training=wrong, compute=EAGER)
    with pytest.raises(BadInput, match="compares the student's logits"):
        distill(DEMO, student="half", output=tmp_path / "out", objectives={"attention": 1.0}, compute=EAGER)
    assert not (tmp_path / "out").exists()


class Surprise(nn.Module):
    """A student's network that fails in training mode alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).mean((2, 3)) if self.training else self.network(images)


def test_a_student_that_fails_in_training_mode_is_refused_before_an_image_is_made(two, tmp_path):
    student = Classifier(Surprise(load(two[0]).network), load(two[0]).card)
    names = tmp_path / "names.json"
    names.write_text(json.dumps([["x", "y", "z"], ["z", "x"]]))
    asked = {"student_init": student, "output": tmp_path / "out", "synthesis": FEW, "compute": EAGER}
    why = r"lenet5_bn cannot be trained: Dimension out of range.*--student"
    with pytest.raises(BadInput, match=why):
        distill(two[0], **asked)
    with pytest.raises(BadInput, match=why):
        merge(two, class_map=names, **asked)
    assert not (tmp_path / "out").exists()


def test_the_teacher_is_not_trained_where_the_student_starts_from_it(tmp_path):
    teacher = load(DEMO)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distill(
        teacher,
        student_init=teacher,
        output=tmp_path / "out",
        synthesis=FEW,
        training=SHORT,
        probe_images=0,
        compute=EAGER,
    )
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_images_between_models_are_not_cropped():
    images = torch.zeros(1, 3, 160, 160)
    images[..., :4] = 1
    assert reshaped(reshaped(images, (3, 224, 224)), (3, 160, 160))[0, 0, 80, 0] > 0.9


ADAPTIVE = Synthesis(
    recipe="adaptive-deepinversion",
    images=96,
    settings={"steps": 2, "batch_size": 32, "student_steps": 3, "student_batch_size": 16},
)


def distilled(folder, output, **options):
    asked = {
        "synthesis": ADAPTIVE,
        "training": SHORT,
        "compute": EAGER,
        "second_recipe": None,
        "probe_images": 0,
    } | options
    return distill(folder, student="lenet5_bn_half", output=output, **asked)


def test_images_compete_with_the_student_of_distill_itself(tmp_path):
    """The second round, made after three steps, is another where the student learns nothing; the first is the same."""
    folder, enough = teacher(tmp_path / "t"), replace(SHORT, steps=7)
    learned = distilled(folder, tmp_path / "learned", training=enough)
    distilled(folder, tmp_path / "idle", training=replace(enough, lr=1e-12))
    shards = [
        [(tmp_path / run / "synthetic" / f"shard-0000{shard}.safetensors").read_bytes() for run in ("learned", "idle")]
        for shard in range(3)
    ]
    assert shards[0][0] == shards[0][1]
    assert all(first != second for first, second in shards[1:])
    assert learned.teachers[0].held_out is not None


def test_a_training_that_ends_before_the_last_images_are_made_is_refused(tmp_path):
    """Three rounds of three steps: nothing would learn from the images of the last one."""
    with pytest.raises(BadInput, match=r"6 training steps .* 3 rounds .* Use --train-steps 9, or at most --images \d+"):
        distilled(teacher(tmp_path / "t"), tmp_path / "out", training=replace(SHORT, steps=6))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_live_student_that_was_killed_resumes_to_the_same_bytes(tmp_path, steps, monkeypatch):
    """In the middle of a round, between two, and after the last."""
    folder = teacher(tmp_path / "t")
    whole = distilled(folder, tmp_path / "whole", training=replace(SHORT, steps=9))

    class Killed(Exception):
        pass

    take = Steps.take

    def until(self):
        if self.done == steps:
            raise Killed
        take(self)

    monkeypatch.setattr(Clock, "is_time_to_save", lambda self: True)
    monkeypatch.setattr(Steps, "take", until)
    with pytest.raises(Killed):
        distilled(folder, tmp_path / "out", training=replace(SHORT, steps=9))
    monkeypatch.undo()
    resumed = distilled(folder, tmp_path / "out", training=replace(SHORT, steps=9), resume=True)
    for name in ("model.safetensors", *(f"synthetic/shard-0000{shard}.safetensors" for shard in range(3))):
        assert Path(resumed.output, name).read_bytes() == Path(whole.output, name).read_bytes(), name


@pytest.mark.parametrize(
    ("student", "objectives"), [("lenet5_bn", {"kd": 1.0, "feature": 10.0}), ("half", {"kd": 1.0})]
)
def test_features_are_followed_by_default_where_they_have_equal_widths(tmp_path, student, objectives):
    none = replace(SHORT, steps=0)
    asked = {
        "synthesis": FEW,
        "training": none,
        "compute": EAGER,
        "second_recipe": None,
        "probe_images": 0,
        "student_init": None,
    }
    distill(teacher(tmp_path / "t"), student=student, output=tmp_path / "out", **asked)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["objectives"] == objectives


def test_a_merged_student_begins_with_the_first_teacher_of_its_form(tmp_path):
    """With no training the student answers for that teacher's classes as it does."""
    other = teacher(tmp_path / "a", ("p", "q"), 2, architecture="lenet5_bn_half", seed=1)
    its = teacher(tmp_path / "b", ("r", "s", "t"), seed=2)
    asked = {"synthesis": FEW, "training": {"steps": 0}, "compute": EAGER, "second_recipe": None, "probe_images": 0}
    shown = torch.rand(4, 1, 32, 32)
    for name, init in (("begun", "auto"), ("fresh", None)):
        result = merge([other, its], student="lenet5_bn", student_init=init, output=tmp_path / name, **asked)
        with torch.no_grad():
            alike = torch.allclose(load(result.checkpoint)(shown)[:, 2:], load(its)(shown), atol=1e-5)
        assert alike == (name == "begun")
