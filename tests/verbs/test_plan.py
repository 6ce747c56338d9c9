"""A plan is one thing: what a dry run prints, what a verb does, and what `run.json` keeps."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfcompress.distributed import World
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.run import RunFile
from dfcompress.synthesis.recipe import StudentUpdates, Synthesis
from dfcompress.training.student import make_student
from dfcompress.verbs._budget import Budget, fit_budget
from dfcompress.verbs._finish import Compressed
from dfcompress.verbs.distill import distill
from dfcompress.verbs.invert import invert
from dfcompress.verbs.merge import merge
from dfcompress.verbs.quantize import quantize

DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off")
FEW = Synthesis(images=16, settings={"steps": 1, "batch_size": 16})
SHORT = {"synthesis": FEW, "compute": EAGER, "training": {"steps": 1, "batch_size": 8}}
VERBS = {
    "invert": lambda folder: invert.plan(DEMO, output=folder, synthesis=FEW, compute=EAGER),
    "distill": lambda folder: distill.plan(DEMO, student="half", output=folder, **SHORT),
    "merge": lambda folder: merge.plan([DEMO, another()], student="half", output=folder, **SHORT),
    "quantize": lambda folder: quantize.plan(DEMO, output=folder, finetune="lsq", **SHORT),
}


def another() -> Classifier:
    """The demo's teacher under another name, with other classes."""
    demo = load(DEMO)
    names = tuple(f"other {number}" for number in range(10))
    return Classifier(demo.network, replace(demo.card, class_names=names), name="other", sha256="other")


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_planned_is_what_is_made_and_what_the_record_keeps(verb, tmp_path):
    plan = VERBS[verb](tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert "Conv2d" not in repr(plan)
    plan.execute()
    kept = record(tmp_path / "out")["plan"]
    assert kept == json.loads(json.dumps(plan.to_json()))
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("dataset.json")]
    made = [(each["recipe"], each["images"], len(each["shards"])) for each in manifests]
    told = [(each["recipe"], each["images"], each["batches"]) for each in kept["synthesis"]]
    assert sorted(told, key=str) == sorted(made, key=str)
    assert plan.steps.keys() <= record(tmp_path / "out")["options"].keys()


@pytest.mark.parametrize("verb", [invert, distill, merge, quantize], ids=lambda verb: verb.__name__)
def test_a_verb_and_its_plan_have_one_signature(verb):
    called, planned = inspect.signature(verb), inspect.signature(verb.plan)
    assert called.parameters == planned.parameters
    assert planned.return_annotation == f"Plan[{called.return_annotation}]"
    assert verb.__doc__ == verb.plan.__doc__


@pytest.mark.parametrize("verb", ["distill", "merge", "quantize"])
def test_grey_images_are_mirrored_only_where_somebody_asks_for_it(verb, tmp_path):
    """They are mostly characters; the plan says what is done."""
    assert VERBS[verb](tmp_path / "out").settings["training"].augmentation.flip is False
    asked = {**SHORT, "training": {"flip": True}}
    assert distill.plan(DEMO, student="half", **asked).settings["training"].augmentation.flip is True
    colour, _ = make_student("cifar_resnet20", replace(load(DEMO).card, input_size=(3, 32, 32)), seed=0)
    colour.train()(torch.rand(8, 3, 32, 32))  # Untrained BatchNorms tell nothing to make images of.
    colour.eval()
    assert distill.plan(colour, student="half", **SHORT).settings["training"].augmentation.flip is True


def test_images_that_take_no_time_leave_the_budget_to_the_training():
    noise = Synthesis(recipe="gaussian", images=None)
    asked = {"second_recipe": None, "probe_images": 0, "compute": EAGER}
    plan = distill.plan(DEMO, student="half", synthesis=noise, budget=30.0, **asked)
    assert plan.synthesis[0].spec.images == 2048
    assert plan.settings["training"].steps > 1


def test_a_whole_number_is_not_cut_from_a_fraction():
    with pytest.raises(BadInput, match=r"steps = 2\.7 is not a value of type int"):
        distill.plan(DEMO, student="half", **{**SHORT, "training": {"steps": 2.7}})


def test_what_the_plan_leaves_out_is_not_done(tmp_path):
    """The verb executes the plan, and nothing besides it."""
    plan = distill.plan(DEMO, student_init=DEMO, data=DEMO, probe_images=0, output=tmp_path / "out", **SHORT)
    result = replace(plan, steps={"training": None}).execute()
    assert record(tmp_path / "out")["plan"] == {"synthesis": [], "training": None}
    teacher = load(DEMO).state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in load(result.checkpoint).state_dict().items())


def test_what_a_run_says_of_itself_is_read_as_objects(tmp_path):
    """For whoever compares runs: the record, and from its measurements the result with its rows."""
    result = VERBS["distill"](tmp_path / "out").execute()
    kept = RunFile.read(tmp_path / "out")
    assert (kept.verb, kept.finished, kept.options["student"]) == ("distill", True, "half:lenet5_bn")
    assert Compressed.from_json(kept.measurements or {}) == result
    assert json.loads(json.dumps(result.to_json())).items() <= (kept.measurements or {}).items()
    with pytest.raises(BadInput, match=r"holds no run\.json"):
        RunFile.read(tmp_path)


def test_a_result_loads_the_model_that_was_written(tmp_path):
    result = quantize(DEMO, data=DEMO, finetune="none", compute=EAGER, output=tmp_path / "out")
    assert result.load().sha256 == load(tmp_path / "out").sha256


def test_a_run_whose_record_holds_no_plan_goes_on(tmp_path):
    """So older versions wrote it."""
    first = VERBS["distill"](tmp_path / "out").execute()
    whole = load(first.checkpoint).sha256
    older = record(tmp_path / "out")
    del older["plan"], older["measurements"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(older))
    (tmp_path / "out" / "model.safetensors").unlink()
    resumed = distill(DEMO, student="half", output=tmp_path / "out", resume=True, **SHORT)
    assert load(resumed.checkpoint).sha256 == whole
    assert record(tmp_path / "out")["plan"]["training"]["steps"] == 1


def usual_plan(folder, *, updates=None, asked=0.0):
    """1,000 images of two recipes in 100 s, images to ask about in `asked` s, and 6,000 training steps in 60 s."""
    specs = [
        SimpleNamespace(recipe=SimpleNamespace(student_updates=updates), batch_size=64, images=500)
        for updates in (updates, None, None)
    ]
    return SimpleNamespace(
        folder=folder,
        options={"synthesis": {"synthetic": {}, "synthetic-bns": {}}},
        synthesis=[SimpleNamespace(spec=spec) for spec in specs],
        estimates=lambda: [SimpleNamespace(seconds=seconds) for seconds in (70.0, 30.0, asked)],
        predicted=lambda: {"training": 60.0},
        settings_json=lambda: {"training": {"steps": 6000}},
    )


def test_a_budget_is_shared_between_images_and_steps(tmp_path):
    budget = fit_budget(100.0, usual_plan(tmp_path), resume=False)
    # A tenth is spare; half of the rest makes whole batches of 64 by both, and training has what is left of it.
    assert (budget.images, budget.rounds) == (384, None)
    assert budget.steps == pytest.approx(5160, abs=1)
    asking = fit_budget(100.0, usual_plan(tmp_path, asked=10.0), resume=False)
    assert (asking.images, asking.steps) == (384, pytest.approx(4160, abs=1))
    every = StudentUpdates(steps=1280, lr=0.1, batch_size=64)
    # Half of the images are of rounds: 128 take 12.8 s, and the steps of their round as long.
    live = fit_budget(100.0, usual_plan(tmp_path, updates=every), resume=False)
    assert live.images == 384
    # Fewer images, so that every round has all of its steps.
    longer = fit_budget(100.0, usual_plan(tmp_path, updates=replace(every, steps=2560)), resume=False)
    assert longer.images == 256
    assert longer.steps >= 2 * 2560
    every = replace(every, steps=640)
    painted = fit_budget(100.0, usual_plan(tmp_path, updates=replace(every, keep=False, rounds=10)), resume=False)
    # 30 s of another set come first; ten rounds take 70 s, and their steps 60.
    assert (painted.rounds, painted.steps) == (4, 4 * 640)


def test_a_budget_is_of_one_process(tmp_path, monkeypatch):
    """Each would time steps of its own, and take others than the rest."""
    monkeypatch.setattr("dfcompress.verbs._budget.world", lambda: World(0, 2, 0, 2))
    with pytest.raises(BadInput, match="--budget times steps of one process, and there are 2"):
        fit_budget(100.0, usual_plan(tmp_path), resume=False)


@pytest.mark.parametrize("seconds", [0.0, 3.0, float("nan"), float("inf")])
def test_a_budget_too_short_for_anything_is_refused(seconds, tmp_path):
    with pytest.raises(BadInput, match=r"budget|too short"):
        fit_budget(seconds, usual_plan(tmp_path), resume=False)


def test_a_resumed_run_keeps_the_budget_that_it_was_begun_with(tmp_path):
    kept = Budget(100.0, 96, 7)
    (tmp_path / "run.json").write_text(json.dumps({"verb": "distill", "options": {"budget": kept.to_json()}}))
    assert fit_budget(100.0, usual_plan(tmp_path), resume=True) == kept
    with pytest.raises(BadInput, match="was begun with 100 s"):
        fit_budget(200.0, usual_plan(tmp_path), resume=True)


def test_a_budget_decides_the_plan_of_distill(tmp_path, monkeypatch):
    monkeypatch.setattr("dfcompress.verbs.distill.fit_budget", lambda *_, **__: Budget(100.0, 96, 7))
    plan = distill.plan(DEMO, student="half", budget=100.0, output=tmp_path / "out", compute=EAGER)
    assert [(each.spec.choice.name, each.spec.images) for each in plan.synthesis[:1]] == [("fast-generator", 96)]
    assert plan.settings["training"].steps == 7
    assert plan.options["budget"] == {"seconds": 100.0, "images": 96, "steps": 7, "rounds": None}
    with pytest.raises(BadInput, match="--budget decides"):
        distill.plan(DEMO, student="half", budget=100.0, data=DEMO)


@pytest.mark.parametrize(
    ("options", "recipes"),
    [
        ({"student": "half"}, ["fast-generator"]),
        ({"student": "lenet5_bn", "student_init": DEMO}, ["deepinversion", "bns"]),
        ({"student": "half", "second_recipe": "bns"}, ["deepinversion", "bns"]),
        ({"student": "half", "synthesis": Synthesis(settings={"steps": 3})}, ["deepinversion", "bns"]),
    ],
)
def test_a_student_that_starts_from_nothing_learns_from_a_generator_unless_something_was_asked_for(options, recipes):
    plan = distill.plan(DEMO, probe_images=0, compute=EAGER, **options)
    assert [each.spec.choice.name for each in plan.synthesis] == recipes


def test_a_dry_run_estimates_what_training_takes(tmp_path):
    plan = distill.plan(DEMO, student="half", data=DEMO, output=tmp_path / "out", compute=EAGER)
    short = distill.plan(DEMO, student="half", data=DEMO, training={"steps": 60}, compute=EAGER)
    assert 20 < plan.predicted()["training"] / short.predicted()["training"] < 500


def test_two_recipes_whose_rounds_a_student_learns_between_are_refused():
    images = Synthesis(recipe="dafl", images=16)
    with pytest.raises(BadInput, match="rounds of dafl and of ifhe"):
        distill.plan(DEMO, student="half", synthesis=images, second_recipe="ifhe", compute=EAGER)
