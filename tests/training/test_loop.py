"""The one student loop, on a released teacher's answers and on tiny networks."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import odd_networks
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import DropBlock2d, StochasticDepth

from dfcompress import console
from dfcompress.data.batches import Batch
from dfcompress.data.pool import Augmentation
from dfcompress.distributed import World
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import shared_stages
from dfcompress.run import Clock
from dfcompress.settings import with_defaults
from dfcompress.training import loop
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import PARTIAL, Trainer, require_passes, require_trainable
from dfcompress.training.multi_teacher.logit_matching import LogitMatching
from dfcompress.training.objectives import Prediction, feature, kd
from dfcompress.training.settings import Training
from dfcompress.training.steps import Steps, training_mode

CARD = ModelCard("tiny", 4, (1, 8, 8), (0.5,), (0.25,))
EAGER = Compute(device="cpu", precision="fp32", compile="off")
TRAINING = Training(steps=40, lr=0.2, batch_size=32)


def tiny(seed, width=8):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return Classifier(nn.Sequential(*layers, nn.Linear(4 * width, 4)), CARD)


def images(count=256):
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def trainer(training=TRAINING, compute=EAGER, folder=None):
    return Trainer(tiny(2), Distillation(tiny(1), [kd(2.0)]), training, compute=compute, folder=folder)


def fitted(training=TRAINING, compute=EAGER, folder=None):
    made = trainer(training, compute, folder)
    trained = made.fit(images())
    return made.student, trained


def agreement(student, teacher):
    shown = images().float() / 255
    with torch.no_grad():
        return (student.eval()(shown).argmax(1) == teacher.eval()(shown).argmax(1)).float().mean().item()


def test_a_student_learns_to_answer_as_the_teacher():
    teacher, before = tiny(1), agreement(tiny(2), tiny(1))
    student, _ = fitted(replace(TRAINING, steps=200))
    assert before < 0.6
    assert agreement(student, teacher) > 0.85


def test_one_step_equals_plain_sgd_by_hand():
    student, _ = fitted(Training(steps=1, lr=0.2, batch_size=256, momentum=0.9, weight_decay=0.0, warmup=0.0, clip=1e9))
    expected, teacher = tiny(2).train(), tiny(1).eval()
    shown = images().float() / 255
    kd(2.0).value(Prediction(expected(shown)), Prediction(teacher(shown).detach())).backward()
    for got, wanted in zip(student.parameters(), expected.parameters(), strict=True):
        # Nesterov's first step is (1 + momentum) times the gradient.
        torch.testing.assert_close(got.detach(), wanted.detach() - 0.2 * 1.9 * wanted.grad, rtol=1e-4, atol=1e-6)


def test_momentum_may_be_plain_and_decay_may_be_of_all():
    """Two steps by torch's own SGD; Nesterov's differ from the first step on."""
    asked = Training(steps=2, lr=0.2, batch_size=256, weight_decay=0.01, schedule="constant", warmup=0.0, clip=0.0)
    student, _ = fitted(replace(asked, nesterov=False, decay_all=True))
    expected, teacher, shown = tiny(2).train(), tiny(1).eval(), images().float() / 255
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        kd(2.0).value(Prediction(expected(shown)), Prediction(teacher(shown).detach())).backward()
        optimizer.step()
    for got, wanted in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    usual, _ = fitted(asked)
    assert not torch.allclose(usual.network[-1].weight, expected.network[-1].weight, rtol=1e-3)


def test_what_the_last_layer_takes_is_dropped_while_a_student_trains_and_not_afterwards():
    def trained(dropout, layer=None):
        student = tiny(2)
        if layer:
            student.network.insert(5, layer)
        training = replace(TRAINING, steps=3, dropout=dropout)
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), training, compute=EAGER).fit(images())
        return student

    dropped, plain = trained(0.4), trained(0.0)
    wanted = trained(0.0, nn.Dropout(0.4))
    assert all(torch.equal(a, b) for a, b in zip(dropped.parameters(), wanted.parameters(), strict=True))
    assert not torch.equal(dropped.network[-1].weight, plain.network[-1].weight)
    assert dropped.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(dropped(images()[:8].float()), dropped(images()[:8].float()))


class Noted(Distillation):
    """Remembers how many images the student saw at once."""

    def losses(self, student, batch, targets):
        self.seen = [*getattr(self, "seen", []), len(batch.images)]
        return super().losses(student, batch, targets)


def in_chunks(monkeypatch, fit, training, *, teachers=1, folder=None):
    """A student after its training where so many images fit, and how many it saw at once."""
    monkeypatch.setattr(loop, "images_at_once", lambda wanted, each, **how: min(wanted, fit))
    distiller = Noted(tiny(1), [kd(2.0)])
    made = Trainer(tiny(2), distiller, training, compute=EAGER, folder=folder, repair=training.freeze_batchnorm)
    made.fit(images())
    return made.student, distiller.seen


@pytest.mark.parametrize("fit", [8, 5])
def test_a_batch_in_chunks_has_the_gradient_of_the_whole_where_statistics_are_frozen(fit, monkeypatch):
    """32 images in chunks of 8, or of 5 and 4."""
    frozen = replace(TRAINING, steps=5, freeze_batchnorm=True, augmentation=Augmentation(flip=True, mixup=1.0))
    whole, seen = in_chunks(monkeypatch, 32, frozen)
    assert seen == [32] * 5
    parts, seen = in_chunks(monkeypatch, fit, frozen)
    assert seen == ([8] * 4 if fit == 8 else [5] * 4 + [4] * 3) * 5
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_training_in_chunks_resumes_in_the_same_ones(monkeypatch, tmp_path):
    """Though all images of a batch fit at the second time."""
    whole, _ = in_chunks(monkeypatch, 8, replace(TRAINING, steps=6))

    def stop(steps, real=Steps.take):
        if steps.done == 3:
            raise KeyboardInterrupt
        real(steps)

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "take", stop)
        patched.setattr(Clock, "is_time_to_save", lambda clock: True)
        with pytest.raises(KeyboardInterrupt):
            in_chunks(patched, 8, replace(TRAINING, steps=6), folder=tmp_path)
    resumed, seen = in_chunks(monkeypatch, 32, replace(TRAINING, steps=6), folder=tmp_path)
    assert seen == [8] * 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_every_chunk_has_images_of_all_teachers(monkeypatch):
    monkeypatch.setattr(loop, "images_at_once", lambda wanted, each, **how: 8)
    seen = []

    def noted(distiller, student, batch, targets, real=LogitMatching.losses):
        seen.append(batch.sources.bincount().tolist())
        return real(distiller, student, batch, targets)

    monkeypatch.setattr(LogitMatching, "losses", noted)
    training, (matching, sets) = replace(TRAINING, steps=1), taught("merging")
    made = Trainer(tiny(2), matching, training, compute=EAGER)
    made.fit(training.pool(*[images()] * sets, seed=0))
    assert seen == [[4, 4]] * 4


def test_the_rate_warms_up_linearly_and_falls_to_zero():
    training = Training(steps=100, lr=1.0, batch_size=1, warmup=0.1)
    assert [training.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert training.rate(55) == pytest.approx(0.5)
    assert training.rate(99) < 0.001


def test_frozen_batchnorm_keeps_its_statistics_but_trains_its_scale():
    student = tiny(2)
    before = copy.deepcopy(student.state_dict())
    training = replace(TRAINING, steps=3, freeze_batchnorm=True)
    Trainer(student, Distillation(tiny(1), [kd(2.0)]), training, compute=EAGER).fit(images())
    after = student.state_dict()
    assert torch.equal(after["network.1.running_mean"], before["network.1.running_mean"])
    assert not torch.equal(after["network.1.weight"], before["network.1.weight"])


def test_training_mode_leaves_frozen_batchnorms_in_evaluation():
    student = tiny(2)
    with training_mode(student, repair=False, freeze_batchnorm=True):
        assert student.training
        assert not student.network[1].training
    assert not student.training


class OwnDropout(nn.Module):
    """A layer that is no dropout by its class."""

    def forward(self, features):
        return nn.functional.dropout(features, 0.5, training=self.training)


RANDOM = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "StochasticDepth": lambda: StochasticDepth(0.5, "row"),
    "DropBlock": lambda: DropBlock2d(0.5, 3),
    "RReLU": lambda: nn.RReLU(-3.0, 5.0),  # In evaluation its slope is their mean, 1: the identity.
    "functional": OwnDropout,
    "timm's DropPath": lambda: pytest.importorskip("timm").layers.DropPath(0.5),
    "in timm's BatchNorm": lambda: pytest.importorskip("timm").layers.BatchNormAct2d(
        8, apply_act=False, drop_layer=OwnDropout
    ),
}


@pytest.mark.parametrize("freeze_batchnorm", [True, False])
@pytest.mark.parametrize("kind", RANDOM)
def test_a_network_under_repair_trains_as_if_it_had_no_random_layer(kind, freeze_batchnorm):
    """A student that learns from scratch keeps its own."""

    def trained(layer, repair):
        student, training = tiny(2), replace(TRAINING, steps=3, freeze_batchnorm=freeze_batchnorm)
        student.network.insert(2, layer)
        distiller = Distillation(tiny(1), [kd(2.0)])
        Trainer(student, distiller, training, compute=EAGER, repair=repair).fit(images())
        return list(student.parameters())

    def without():
        layer = RANDOM[kind]()
        layer.drop = nn.Identity()
        return layer if isinstance(layer, nn.BatchNorm2d) else nn.Identity()

    repaired, wanted = trained(RANDOM[kind](), True), trained(without(), True)
    assert all(torch.equal(a, b) for a, b in zip(repaired, wanted, strict=True))
    learnt, plain = trained(RANDOM[kind](), False), trained(without(), False)
    assert not all(torch.equal(a, b) for a, b in zip(learnt, plain, strict=True))


def test_batchnorms_of_a_network_under_repair_learn_the_statistics_of_the_images():
    changed = []
    for freeze_batchnorm in (True, False):
        student, training = tiny(2), replace(TRAINING, steps=3, freeze_batchnorm=freeze_batchnorm)
        before = student.network[1].running_mean.clone()
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), training, compute=EAGER, repair=True).fit(images())
        changed.append(not torch.equal(student.network[1].running_mean, before))
    assert changed == [False, True]


class WithHead(nn.Module):
    """`tiny` with an auxiliary head, which answers in training mode in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.body, self.form, self.head = tiny(2).network, form, nn.Linear(8, 4)

    def forward(self, features):
        early = self.body[:3](features)
        late = self.body[3:](early)
        return self.form(late, self.head(early.mean((2, 3)))) if self.training else late


class Answered(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor


FORMS = {
    "tuple": lambda late, early: (late, early),
    "named tuple": lambda late, early: Answered(auxiliary=early, logits=late),
    "dict": lambda late, early: {"aux": early, "logits": late},
    "no more": lambda late, early: late,
}


@pytest.mark.parametrize("form", FORMS)
def test_of_all_that_a_student_answers_while_it_trains_the_main_logits_are_learnt(form):
    def trained(network):
        student = Classifier(network, CARD)
        require_passes(student, TRAINING)
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), replace(TRAINING, steps=3), compute=EAGER).fit(images())
        return student.network.state_dict()

    wanted, found = trained(tiny(2).network), trained(WithHead(FORMS[form]))
    assert all(torch.equal(found[f"body.{name}"], value) for name, value in wanted.items())


def fails(late, early):
    raise AttributeError("'tuple' object has no attribute 'mean'")


def cut(late, early):
    return late.detach()


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (lambda late, early: (early, late), r"the first logits of the tuple .* are not its answer"),
        (lambda late, early: late[:, :2], r"it answers with \(2, 2\), not with \(2, 4\)"),
        (lambda late, early: None, "it answers with NoneType"),
        (fails, "'tuple' object has no attribute 'mean'"),
        (cut, "does not require grad"),
    ],
)
def test_a_student_that_cannot_learn_is_found_by_one_pass_that_leaves_it_alone(form, why):
    """In evaluation mode, in which a network is repaired, it has no such surprises."""
    student = Classifier(WithHead(form), CARD)
    before, mode = copy.deepcopy(student.state_dict()), student.training
    with pytest.raises(BadInput, match=why + r".*--student"):
        require_trainable(student, TRAINING, EAGER, [256])
    require_trainable(student, TRAINING, EAGER, [256], repair=True)
    assert student.training == mode
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_torchvisions_networks_with_auxiliary_heads_can_be_trained():
    for make, size in ((torchvision.models.googlenet, 64), (torchvision.models.inception_v3, 299)):
        network = make(num_classes=4, aux_logits=True, init_weights=False)
        card = ModelCard("own", 4, (3, size, size), (0.5,) * 3, (0.25,) * 3)
        require_passes(Classifier(network, card), TRAINING)


def test_too_little_memory_names_the_option_that_helps(monkeypatch):
    def out_of_memory(steps):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Steps, "take", out_of_memory)
    with pytest.raises(DfcompressError, match=r"32 images of a training step do not fit.*--train-batch-size"):
        fitted()


def test_a_rate_that_diverges_is_reported_with_its_step():
    with pytest.raises(DfcompressError, match=r"not finite at training step \d+.*--train-lr"):
        fitted(replace(TRAINING, lr=1e30))


def test_weights_that_overflow_while_no_loss_does_are_reported():
    student = tiny(2)
    # A parameter that the forward pass never reads stands for one that the last step spoilt.
    student.register_parameter("unseen", nn.Parameter(torch.tensor([float("inf")])))
    with pytest.raises(DfcompressError, match=r"weights are not finite.*--train-lr"):
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), replace(TRAINING, steps=1), compute=EAGER).fit(images())


def test_a_seed_may_be_large():
    assert fitted(replace(TRAINING, steps=1), compute=replace(EAGER, seed=2**40))[1].steps == 1


def test_a_rate_of_zero_is_refused():
    with pytest.raises(BadInput, match="--train-lr"):
        fitted(replace(TRAINING, lr=0.0))


def test_bf16_reaches_nearly_the_loss_of_fp32():
    _, exact = fitted(replace(TRAINING, steps=100))
    _, low = fitted(replace(TRAINING, steps=100), compute=replace(EAGER, precision="bf16"))
    assert low.losses["kd"] == pytest.approx(exact.losses["kd"], rel=0.25)


def taught(kind):
    """A distiller of that kind, some of which record what networks do inside, and how many sets it needs."""
    if kind == "merging":
        teachers = [tiny(1), tiny(3)]
        for teacher in teachers:
            teacher.train()(images().float() / 255)  # For BatchNorms that remember something.
        return LogitMatching([each.eval() for each in teachers], ClassMap((torch.arange(4), torch.arange(4)), 4)), 2
    pairs = shared_stages(tiny(2), tiny(1))
    return Distillation(tiny(1), [kd(2.0), *([feature(pairs)] if kind == "feature" else [])]), 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "feature", "merging"])
def test_compiled_training_agrees_with_eager_training(kind):
    students = []
    for compile in ("off", "on"):
        torch.manual_seed(0)
        (distiller, count), student = taught(kind), tiny(2)
        trainer = Trainer(student, distiller, replace(TRAINING, steps=5), compute=replace(EAGER, compile=compile))
        trained = trainer.fit(TRAINING.pool(*[images()] * count, seed=0))
        students.append((student, trained.losses))
    (eager, wanted_losses), (compiled, losses) = students
    assert losses == pytest.approx(wanted_losses, rel=1e-3, abs=1e-4)
    for got, wanted in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("broken_compiler")
def test_training_goes_on_eagerly_where_compiling_fails(capsys):
    console.configure(console.NORMAL)
    try:
        student, _ = fitted(compute=replace(EAGER, compile="on"))
    finally:
        console.configure(console.QUIET)
    assert "runs eagerly" in capsys.readouterr().err
    wanted = fitted()[0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())


def test_teachers_lie_in_memory_as_the_images_do_while_they_are_asked():
    """Otherwise every step copies every weight."""
    student, teacher = tiny(2), tiny(1)
    for each in (student, teacher):
        each.network.insert(1, nn.Conv2d(8, 8, 3))
    weights = [each.network[1].weight for each in (student, teacher)]
    made = Trainer(student, Distillation(teacher, [kd(2.0)]), TRAINING, compute=replace(EAGER, precision="bf16"))
    with made.ready(images()) as steps:
        steps.take()
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(weight.is_contiguous() for weight in weights)


STRIDED = """
import torch
from torch import nn
from dfcompress.data.pool import Augmentation
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer
from dfcompress.training.objectives import kd
from dfcompress.training.settings import Training

def network():
    layers = [nn.Conv2d(3, 16, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return Classifier(nn.Sequential(*layers), ModelCard("strided", 10, (3, 32, 32), (0.5,) * 3, (0.2,) * 3))

compute = Compute(device="cpu", precision="fp32", compile="off")
training = Training(steps=3, lr=0.1, batch_size=64, augmentation=Augmentation(shift=4))
images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
Trainer(network(), Distillation(network(), [kd(1.0)]), training, compute=compute).fit(images)
"""


def test_a_convolution_whose_gradient_would_kill_the_process_trains():
    """Of a fresh process: where it goes wrong, the memory of this one is overwritten."""
    done = subprocess.run([sys.executable, "-c", STRIDED], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_strided_convolution_computes_the_same_in_training(layout):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 48, 1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shown = torch.rand(4, 3, 32, 32)
    network(shown).square().sum().backward()  # Of contiguous images, outside: torch's own stride.
    expected = network[0].weight.grad.clone()
    network.zero_grad()
    with training_mode(network, repair=False, freeze_batchnorm=False):
        network(shown.contiguous(memory_format=layout)).square().sum().backward()
    torch.testing.assert_close(network[0].weight.grad, expected)
    assert network[0].stride == (2, 2)
    assert not network[0]._forward_pre_hooks


def test_dropout_depends_on_the_seed_and_not_on_what_ran_before():
    def trained():
        torch.rand(3)
        student = tiny(2)
        student.network.insert(3, nn.Dropout(0.5))
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), replace(TRAINING, steps=3), compute=EAGER).fit(images())
        return student.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from dfcompress import run
from training.test_loop import fitted
run.SAVE_EVERY_SECONDS = 0.0
fitted(folder=Path({folder!r}))
"""


def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    """SIGKILL a real process in the middle, run it again, and compare with one that was left alone."""
    code = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / PARTIAL).exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / PARTIAL, weights_only=True)["step"] < TRAINING.steps
    whole, resumed = fitted()[0].state_dict(), fitted(folder=tmp_path)[0].state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_that_ends_between_two_states_resumes_to_the_same_weights(precision, killed_at_save, tmp_path):
    compute = replace(EAGER, precision=precision)
    with killed_at_save(PARTIAL, 20):
        fitted(compute=compute, folder=tmp_path)
    assert torch.load(tmp_path / PARTIAL, weights_only=True)["step"] == 19
    whole, resumed = (fitted(compute=compute, folder=folder)[0].state_dict() for folder in (None, tmp_path))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_kept_targets_are_those_of_every_step():
    """Where nothing changes the images, the teacher sees each once, whether stored as bytes or as float16."""

    class Counted(Distillation):
        times = 0

        def targets(self, batch):
            Counted.times += 1
            return super().targets(batch)

    def fitted_on(repeatable):
        student, distiller = tiny(2), Counted(tiny(1), [kd(2.0)])
        distiller.repeatable = repeatable
        Counted.times = 0
        halves = images()[:100], (images()[100:].float() / 255).half()
        trained = Trainer(student, distiller, TRAINING, compute=EAGER).fit(TRAINING.pool(*halves, seed=0))
        return Counted.times, trained.losses["kd"], student.state_dict()

    times, loss, kept = fitted_on(True)
    every, wanted, asked = fitted_on(False)
    assert times < every == TRAINING.steps
    assert loss == pytest.approx(wanted, rel=1e-4)
    for name in kept:
        torch.testing.assert_close(kept[name], asked[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"steps": -1}, {"warmup": 1.0}, {"clip": -1.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput):
        replace(TRAINING, **wrong)


@pytest.mark.parametrize(("name", "value"), [("ema", "0.99"), ("optimizer", "novograd")])
def test_what_was_removed_says_what_to_use(name, value):
    with pytest.raises(BadInput, match=r"was removed.*(Leave it out|Use lamb)"):
        with_defaults(TRAINING, {name: value})


def test_the_multistep_schedule_falls_at_its_milestones_and_clip_0_leaves_gradients():
    training = replace(TRAINING, steps=100, lr=1.0, schedule="multistep", warmup=0.0, milestones=(0.5, 0.75), gamma=0.1)
    assert [training.rate(step) for step in (0, 49, 50, 75)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    unclipped, _ = fitted(replace(TRAINING, steps=2, clip=0.0))
    loose, _ = fitted(replace(TRAINING, steps=2, clip=1e9))
    assert all(torch.equal(a, b) for a, b in zip(unclipped.parameters(), loose.parameters(), strict=True))


def test_a_student_that_cannot_learn_in_the_precision_asked_for_is_refused_before_any_work():
    card = ModelCard("odd", odd_networks.CLASSES, odd_networks.SIZE, (0.5,) * 3, (0.25,) * 3)
    student, training = Classifier(odd_networks.trained("scattered"), card), Training(steps=2, lr=0.1, batch_size=4)
    require_trainable(student, training, Compute(device="cpu", precision="fp32", compile="off"), [8])
    require_trainable(student, training, Compute(device="cpu", precision="auto", compile="off"), [8])
    with pytest.raises(BadInput, match="odd cannot be computed in bf16"):
        require_trainable(student, training, Compute(device="cpu", precision="bf16", compile="off"), [8])


@pytest.mark.parametrize(("names", "precision"), [(("prelu", "plain"), "bf16"), (("plain", "scattered"), "fp32")])
def test_the_precision_is_tried_with_student_and_teacher_and_stored(names, precision, tmp_path, monkeypatch):
    monkeypatch.setattr("dfcompress.machine.device._cpu_multiplies_bf16", lambda: True)
    card = ModelCard("odd", odd_networks.CLASSES, odd_networks.SIZE, (0.5,) * 3, (0.25,) * 3)
    student, teacher = (Classifier(odd_networks.trained(name), card) for name in names)
    training = Training(steps=2, lr=0.1, batch_size=4)
    auto = Compute(device="cpu", precision="auto", compile="off")
    shown = torch.randint(0, 256, (8, *odd_networks.SIZE), dtype=torch.uint8)
    trained = Trainer(student, Distillation(teacher, [kd(2.0)]), training, compute=auto, folder=tmp_path).fit(shown)
    assert trained.execution.precision == precision
    state = torch.load(tmp_path / PARTIAL, weights_only=True)
    assert state["execution"]["precision"] == precision


def of_layers_in_place():
    """A sigmoid needs its output for its gradient, which the layer behind it overwrites."""
    between = nn.Sequential(nn.Sigmoid(), nn.ELU(inplace=True))
    card = ModelCard("odd", odd_networks.CLASSES, odd_networks.SIZE, (0.5,) * 3, (0.25,) * 3)
    return Classifier(odd_networks.settled(odd_networks.Net(between), odd_networks.SIZE), card)


def test_a_network_that_cannot_be_differentiated_teaches_and_does_not_learn():
    card = ModelCard("odd", odd_networks.CLASSES, odd_networks.SIZE, (0.5,) * 3, (0.25,) * 3)
    shown, training = torch.zeros(8, *odd_networks.SIZE, dtype=torch.uint8), Training(steps=1, lr=0.1, batch_size=4)
    plain, spoilt = Classifier(odd_networks.trained("plain"), card), of_layers_in_place()
    distiller = Distillation(spoilt, [kd(2.0)])
    assert Trainer(plain, distiller, training, compute=EAGER).fit(shown).execution.precision == "fp32"
    with pytest.raises(BadInput, match=r"cannot be differentiated: .*inplace operation.*inplace=False"):
        Trainer(spoilt, Distillation(plain, [kd(2.0)]), training, compute=EAGER).fit(shown)


@pytest.mark.parametrize("repair", [False, True])
def test_a_student_whose_layers_spoil_its_gradient_is_told_what_helps(repair):
    with pytest.raises(BadInput, match=r"cannot be trained: .*inplace operation.*inplace=False") as refused:
        require_trainable(of_layers_in_place(), TRAINING, EAGER, [256], repair=repair)
    assert "anomaly" not in str(refused.value)


@pytest.mark.parametrize(("theirs", "taken"), [(["apex", "apex"], "apex"), (["apex", "torch"], "torch")])
def test_apex_computes_only_where_every_process_has_it(theirs, taken, monkeypatch):
    """Else each process would take steps of its own kind."""

    class Two(World):
        def all_gather(self, value):
            assert value == theirs[0]
            return theirs

    monkeypatch.setattr("dfcompress.training.optimizers.choose_backend", lambda *asked: theirs[0])
    trainer = Trainer(tiny(1), Distillation(tiny(2), [kd(2.0)]), TRAINING, compute=EAGER)
    trainer.everyone = Two()
    assert trainer._backend(torch.device("cpu")) == taken


class Generated:
    """A live source: a network renders the images of every step for the classes asked for, and changes meanwhile."""

    batch_size = 32

    def __init__(self):
        torch.manual_seed(4)
        self.network = nn.Sequential(nn.Linear(12, 64), nn.BatchNorm1d(64), nn.Sigmoid())
        self.steps = []

    @torch.no_grad()
    def batch(self, step):
        self.steps.append(step)
        noise = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        labels = torch.randint(4, (32,), generator=torch.Generator().manual_seed(step))
        shown = self.network(torch.cat([noise, nn.functional.one_hot(labels, 4)], 1)).view(32, 1, 8, 8)
        self.network[0].weight.mul_(1.05)
        return Batch(shown, labels, torch.zeros(32, dtype=torch.long))

    def to(self, device):
        self.network.to(device)

    def measured(self):
        return {}

    def state_dict(self):
        return self.network.state_dict()

    def load_state_dict(self, state):
        self.network.load_state_dict(state)


class Listed:
    """A live source that gives the batches of a list."""

    def __init__(self, batches):
        self.batches, self.batch_size = batches, len(batches[0].images)

    def batch(self, step):
        return self.batches[step]

    def to(self, device):
        pass

    def measured(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def test_the_trainer_cannot_tell_a_live_source_from_a_pool():
    """The same batches out of either give the same bits, and the labels of either reach the distiller."""

    class Labelled(Distillation):
        def targets(self, batch):
            self.labels = [*getattr(self, "labels", []), batch.labels]
            return super().targets(batch)

    training = replace(TRAINING, steps=5, augmentation=Augmentation(shift=1))
    labels = torch.arange(256) % 4
    pool = training.pool(images(), labels=[labels], seed=3)
    drawn = [pool.batch(step) for step in range(5)]
    students = []
    for source in (pool, Listed(drawn)):
        student, distiller = tiny(2), Labelled(tiny(1), [kd(2.0)])
        Trainer(student, distiller, training, compute=EAGER).fit(source)
        assert [each.tolist() for each in distiller.labels] == [batch.labels.tolist() for batch in drawn]
        students.append(student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_a_loss_of_the_images_may_have_the_name_of_one_of_the_student():
    source = Listed([Batch(images(32).float() / 255, torch.zeros(32, dtype=torch.long), torch.zeros(32))])
    source.measured = lambda: {"kd": 5.0}
    made = Trainer(tiny(2), Distillation(tiny(1), [kd(2.0)]), replace(TRAINING, steps=1), compute=EAGER)
    assert made.fit(source).losses["kd"] != 5.0


@pytest.mark.parametrize("done", [0, 7])
def test_a_training_on_a_live_source_resumes_to_the_same_bytes(done, tmp_path):
    """All that the source has become is in the state: another source object goes on with it."""
    training = replace(TRAINING, steps=12)

    def fitted_on(source, folder=None):
        student = tiny(2)
        Trainer(student, Distillation(tiny(1), [kd(2.0)]), training, compute=EAGER, folder=folder).fit(source)
        return {name: value.numpy().tobytes() for name, value in student.state_dict().items()}

    whole = fitted_on(Generated())
    with trainer(training, folder=tmp_path).ready(Generated()) as steps:
        for _ in range(done):
            steps.take()
        steps.save(tmp_path / PARTIAL)
    resumed = Generated()
    assert fitted_on(resumed, tmp_path) == whole
    assert resumed.steps == list(range(done, 12)), "every step is asked for once"
    state = torch.load(tmp_path / PARTIAL, weights_only=True)
    assert state["source"]["0.weight"].equal(resumed.network[0].weight)
