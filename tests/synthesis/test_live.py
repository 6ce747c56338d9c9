"""Images that are made while a student learns from them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import load
from dfcompress.synthesis.images import ParameterGroup, Pixels
from dfcompress.synthesis.live import LiveSource
from dfcompress.synthesis.losses import Loss, Want, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe, StudentUpdates, Synthesis
from dfcompress.synthesis.set_builder import SetBuilder
from dfcompress.synthesis.spec import resolve
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer
from dfcompress.training.objectives import kd
from dfcompress.training.settings import Training
from dfcompress.training.student import make_student

EAGER = Compute(device="cpu", precision="fp32", compile="off")
TRAINING = Training(steps=6, lr=0.05, batch_size=8)


class Painter:
    """Images of a linear layer of latent vectors; it goes on learning over batches."""

    in_range, persistent = True, True

    def __init__(self):
        self.network, self.latent = None, None

    def start(self, labels, teacher, generator, pixels=None):
        latent = torch.randn(len(labels), 4, generator=generator)
        if self.network is None:
            size = teacher.card.input_size
            self.network = nn.Sequential(nn.Linear(4, torch.Size(size).numel()), nn.Unflatten(1, size), nn.Sigmoid())
            for parameter in self.network.parameters():
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
            self.latent, self.teacher = latent, teacher
        self.latent.copy_(latent)

    def parameters(self):
        return [ParameterGroup([*self.network.parameters()])]

    def render(self):
        return self.teacher.normalise(self.network(self.latent))

    def project(self):
        """Nothing to put back."""

    def state_dict(self):
        return {"latent": self.latent, **self.network.state_dict(prefix="network.")}

    def load_state_dict(self, state):
        self.latent.copy_(state["latent"])
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k != "latent"})


class Head(nn.Module):
    """Classes by the logits, through a linear layer that learns on the student's images alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 10)

    def forward(self, trace, *, module_loss=False):
        if module_loss:
            return F.cross_entropy(self.layer(trace.logits), trace.logits.argmax(1))
        return F.cross_entropy(self.layer(trace.logits), trace.labels)


def disagreement():
    """The student's probability of the teacher's class."""

    def value(trace):
        return trace.student_logits.softmax(1).gather(1, trace.logits.argmax(1, keepdim=True)).mean()

    return Loss("disagreement", value, wants=(Want.STUDENT,))


def painted(*, keep=False):
    """A generator against a student; without `keep` in four rounds of which no image is kept."""
    return Recipe(
        images=Painter(),
        batch_size=8,
        losses=[class_cross_entropy(), disagreement()],
        phases=[Phase(2, 0.02)],
        student_updates=StudentUpdates(steps=2, lr=0.05, batch_size=8, keep=keep, rounds=4),
    )


def headed():
    """Pixels, and a head that lives on and learns on the student's images."""
    return Recipe(
        images=Pixels(clip=True),
        batch_size=8,
        losses=[Loss("head", Head(), wants=(Want.LABELS,), learns_with_student=True), disagreement()],
        phases=[Phase(2, 0.02)],
        student_updates=StudentUpdates(steps=2, lr=0.05, batch_size=8),
    )


def kept():
    return painted(keep=True)


@pytest.fixture
def teacher(resnet20_file):
    return load(resnet20_file)


def source(recipe, teacher, folder, student, *, images=24, **options):
    spec = resolve(teacher, Synthesis(recipe=recipe, images=images))

    def pool(images, labels):
        return TRAINING.pool(images, labels=[labels], seed=0)

    options = {"batch_size": TRAINING.batch_size, **options}
    return LiveSource(spec, folder, EAGER, student, pool=pool, **options)


def new_student(teacher):
    return make_student("half", teacher.card, seed=0)[0]


def trained(recipe, teacher, folder, *, training=TRAINING):
    student, live = new_student(teacher), None
    live = source(recipe, teacher, folder / "set", student)
    Trainer(student, Distillation(teacher, [kd(4.0)]), training, compute=EAGER, folder=folder).fit(live)
    return student, live


@pytest.mark.parametrize("recipe", [painted, kept, headed])
def test_a_run_that_was_killed_ends_in_the_same_bytes(recipe, teacher, tmp_path):
    """Generator, optimiser, head and student go on from between two steps of a round."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    student, whole = trained(recipe, teacher, tmp_path / "whole")
    expected = whole.finish()
    # The rate's schedule is that of the whole training, so the first half has its steps, and is told to end early.
    with pytest.raises(KeyboardInterrupt):
        stopped(recipe, teacher, tmp_path / "killed", after=3)
    again, live = trained(recipe, teacher, tmp_path / "killed")
    found = live.finish()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


def stopped(recipe, teacher, folder, *, after):
    student = new_student(teacher)
    live = source(recipe, teacher, folder / "set", student)
    trainer = Trainer(student, Distillation(teacher, [kd(4.0)]), TRAINING, compute=EAGER, folder=folder)
    with trainer.ready(live) as steps:
        for _ in range(after):
            steps.take()
        trainer._save(steps)
        steps.take()
        raise KeyboardInterrupt


def test_a_generator_whose_images_are_not_kept_draws_the_set_at_the_end(teacher, tmp_path):
    _, live = trained(painted, teacher, tmp_path, training=replace(TRAINING, steps=8))
    assert live.measured()["round"] == 4
    assert not list((tmp_path / "set").glob("shard-*"))
    made = live.finish()
    assert len(made) == 24
    assert json.loads((tmp_path / "set" / "student.json").read_text())["seconds"] > 0
    lines = [json.loads(line) for line in (tmp_path / "set" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [0, 1, 2, 3]
    assert {"cross_entropy", "disagreement"} <= lines[0].keys()


@pytest.mark.parametrize("size", [4, 8, 12])
def test_batches_are_as_large_as_the_training_asks_whatever_the_generator_learns_from(size, teacher, tmp_path):
    live = source(painted, teacher, tmp_path / "set", new_student(teacher), batch_size=size)
    assert len(live.batch(0).images) == live.batch_size == size
    assert len(live.batch(1).images) == size


def test_images_that_are_not_kept_are_new_in_every_step(teacher, tmp_path):
    live = source(painted, teacher, tmp_path, new_student(teacher))
    live.to(torch.device("cpu"))
    first, second = live.batch(0), live.batch(1)
    assert first.images.shape == (8, 3, 32, 32)
    assert 0 <= first.images.min() <= first.images.max() <= 1
    assert not torch.equal(first.images, second.images)


def test_beside_stored_images_half_of_a_batch_is_new(teacher, tmp_path):
    stored = torch.full((16, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(16) % 10
    live = source(painted, teacher, tmp_path / "new", new_student(teacher), stored=stored)
    live.to(torch.device("cpu"))
    white = (live.batch(0).images.flatten(1).min(1).values == 1).tolist()
    assert white == [False] * 4 + [True] * 4


def test_stored_images_of_another_form_are_as_bright_as_they_were(teacher, tmp_path):
    """Unclipped images are kept in float16, others in bytes: white stays 1."""
    stored = torch.full((16, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(16) % 10
    live = source(kept, teacher, tmp_path, new_student(teacher), stored=stored)
    read = live._builder.synthetic.read_shard
    live._builder.synthetic.read_shard = lambda shard: (read(shard)[0] / torch.tensor(255.0).half(), read(shard)[1])
    live.to(torch.device("cpu"))
    brightest = [image.max().item() for step in range(10) for image in live.batch(step).images]
    assert max(brightest) == 1.0
    assert min(brightest) < 1.0


def test_images_held_out_are_never_shown(teacher, tmp_path):
    held_out = torch.arange(24) % 3 == 0
    live = source(kept, teacher, tmp_path, new_student(teacher), held_out=held_out)
    live.to(torch.device("cpu"))
    shown = {image.numpy().tobytes() for step in range(20) for image in live.batch(step).images}
    images = SyntheticSet(tmp_path).images.float() / 255
    found = torch.tensor([image.numpy().tobytes() in shown for image in images])
    # The pool shifts nothing and mirrors some; what is there as it was made is not held out.
    assert found.any()
    assert not found[held_out].any()


def test_a_head_learns_on_the_students_images_alone(teacher, tmp_path):
    live = source(headed, teacher, tmp_path, new_student(teacher))
    live.to(torch.device("cpu"))
    fresh = live.state_dict()["synthesis"]["modules"]["head"]["layer.weight"].clone()
    live._make_round()
    assert torch.equal(live.state_dict()["synthesis"]["modules"]["head"]["layer.weight"], fresh)
    live.batch(0)
    moved = live.state_dict()["synthesis"]["modules"]["head"]["layer.weight"] - fresh
    assert moved.abs().max().item() == pytest.approx(1e-3, rel=1e-2)


def test_labels_that_the_teacher_gives_are_in_exact_fp32(teacher, tmp_path, precisions):
    """Whatever the precision of the images."""
    recipe = replace(painted(), losses=[disagreement()])
    spec = resolve(teacher, Synthesis(recipe=lambda: recipe, images=24))
    builder = SetBuilder(spec, tmp_path, replace(EAGER, precision="bf16"), student=new_student(teacher))
    passes = precisions(teacher)
    builder.look(0)
    assert set(passes) == {"ieee"}
