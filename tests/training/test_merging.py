"""Merging: classes joined by name, terms equal to what is worked out by hand, and a student that knows all blocks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfcompress.data.pool import ImagePool
from dfcompress.device import Compute
from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap, join_classes
from dfcompress.training.loop import PARTIAL, Trainer
from dfcompress.training.merging import Merging
from dfcompress.training.ood_score import BatchNormOodScore
from dfcompress.training.settings import Training
from dfcompress.verbs.merge import usual_training

EAGER = Compute(device="cpu", precision="fp32", compile="off")


def teacher(names=None, classes=2, name="t", size=(1, 4, 4), seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(size), classes))
    card = ModelCard("tiny", classes, size, (0.5,) * size[0], (0.25,) * size[0], names)
    return Classifier(network, card, name=name).frozen()


def lists(outputs):
    return [own.tolist() for own in outputs.of]


def test_equal_names_become_one_output():
    outputs = join_classes([teacher(("cat", "dog")), teacher(("dog", "ship", "cat"), 3)])
    assert lists(outputs) == [[0, 1], [1, 2, 0]]
    assert (outputs.count, outputs.names) == (3, ("cat", "dog", "ship"))


def test_without_names_classes_are_different_and_in_order():
    outputs = join_classes([teacher(classes=2), teacher(("a", "b", "c"), 3)])
    assert lists(outputs) == [[0, 1], [2, 3, 4]]
    assert (outputs.count, outputs.names) == (5, None)


def test_a_map_names_the_classes(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps([["cat", "dog"], ["dog", "ship"]]))
    outputs = join_classes([teacher(("x", "y")), teacher()], tmp_path / "map.json")
    assert lists(outputs) == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "no list for 2 teachers"),
        ('[["a", "b"]]', "no list for 2 teachers"),
        ('[["a", "b"], "cd"]', "no list of names"),
        ('[["a", "b"], ["c"]]', "names 1 classes"),
        ('[["a", "a"], ["c", "d"]]', "two classes of the name 'a'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        join_classes([teacher(), teacher()], tmp_path / "map.json")


def test_names_that_differ_in_spelling_alone_are_refused():
    with pytest.raises(BadInput, match=r"'T-shirt' and 't shirt'.*--class-map"):
        join_classes([teacher(("T-shirt", "dog")), teacher(("t shirt", "cat"))])


class Predictions(nn.Module):
    """A student that gives fixed logits: those of the row that an image's pixels name."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


LOGITS = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
GIVEN = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[-0.5, 0.5], [2.0, -2.0]])
BLOCKS = ClassMap((torch.tensor([0, 1]), torch.tensor([1, 2])), 3)
SOURCES = torch.tensor([0, 1])


def values(method):
    merging = Merging([teacher(), teacher()], BLOCKS, method=method)
    rows = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    found = merging.compare(Predictions(LOGITS), rows, (*GIVEN, SOURCES))
    return dict(zip(merging.names, found.tolist(), strict=True))


def test_all_logits_by_hand():
    found = values("all-logits")
    # For teacher 1's (1, −1) and (−1, 1) the student has (1, 0) and (0.5, −1).
    assert found["logits/1"] == pytest.approx(((0 + 1) / 2 + (2.25 + 4) / 2) / 2)
    # For teacher 2's (−0.5, 0.5) and (2, −2) it has (0, 2) and (−1, 0).
    assert found["logits/2"] == pytest.approx(((0.25 + 2.25) / 2 + (9 + 4) / 2) / 2)
    share = LOGITS[0].softmax(0)[:2].sum()
    assert found["block/1"] == pytest.approx(-math.log(share), rel=1e-5)
    share = LOGITS[1].softmax(0)[1:].sum()
    assert found["block/2"] == pytest.approx(-math.log(share), rel=1e-5)
    assert (found["agreement/1"], found["agreement/2"]) == (1.0, 0.0)


def test_a_teachers_mean_is_how_much_more_familiar_an_image_is_to_it():
    """Logits keep their differences; their means are ±16 times half the difference of unfamiliarity, at most ±4."""
    teachers, shown = [remembering(0.0), remembering(0.2)], torch.randn(6, 1, 4, 4)
    merging, alone = Merging(teachers, BLOCKS), [BatchNormOodScore(each) for each in teachers]
    with merging.listening(teachers[0]), alone[0].listening(), alone[1].listening(), torch.no_grad():
        *targets, _ = merging.teach(shown, torch.zeros(6))
        strange = [each.taken() for each in alone]
        logits = [each(shown) for each in teachers]
    expected = (8 * (strange[1] - strange[0])).clamp(-4, 4)
    torch.testing.assert_close(targets[0].mean(1), expected)
    torch.testing.assert_close(targets[1].mean(1), -expected)
    assert (expected.abs() < 4).any()
    for target, own in zip(targets, logits, strict=True):
        torch.testing.assert_close(target - target.mean(1, keepdim=True), own - own.mean(1, keepdim=True))


def remembering(mean):
    """A teacher of two classes whose BatchNorm remembers that mean."""
    made = teacher()
    made.network.insert(0, nn.BatchNorm2d(1))
    made.network[0].running_mean.fill_(mean)
    made.network[0].running_var.fill_(0.9)
    return made.frozen()


def test_the_papers_way_is_cross_entropy_with_the_own_teachers_best_class():
    found = values("paper")
    assert found["block/1"] == pytest.approx(-LOGITS[0].log_softmax(0)[0].item(), rel=1e-5)
    assert found["block/2"] == pytest.approx(-LOGITS[1].log_softmax(0)[1].item(), rel=1e-5)
    assert found["logits/1"] == found["logits/2"] == 0
    assert Merging([teacher(), teacher()], BLOCKS, method="paper").weights.tolist() == [0, 0, 1, 1, 0, 0]


def test_the_papers_training_is_plain_sgd_on_a_pass_of_each_teachers_images():
    """Momentum 0.9 without Nesterov, decay of all parameters, one BatchNorm pass a mini-batch, the norm cut at 0.5."""
    size, teachers = (1, 4, 4), [teacher(name=str(number), seed=number) for number in range(3)]
    sets = [images(number, size, 24) for number in range(3)]
    training = replace(usual_training("paper", 24, 3), batch_size=24, steps=10)

    def fresh():
        torch.manual_seed(9)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        return Classifier(network, ModelCard("tiny", 6, size, (0.5,), (0.25,)))

    student, plain = fresh(), fresh().train()
    merging = Merging(teachers, join_classes(teachers), method="paper")
    Trainer(student, merging, training, compute=EAGER).fit(*sets)
    pool = ImagePool(*sets, augmentation=training.augmentation, batch_size=24, seed=EAGER.seed)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (step // 2)
        loss = torch.zeros(())
        for number, shown in enumerate(pool.batch(step).split(8)):
            loss += nn.functional.cross_entropy(plain(shown), teachers[number](shown).argmax(1) + 2 * number)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for (name, got), wanted in zip(student.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (got - wanted).abs().max() < 1e-6, name


def test_a_teacher_that_is_followed_worse_weighs_more():
    merging = Merging([teacher(), teacher()], BLOCKS)
    before = merging.weights
    for _ in range(50):
        merging.observe(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.9, 0.2]))
    after = merging.weights
    assert torch.equal(before[:2], torch.full((2,), 0.5))
    assert after[1] > 1.5 * after[0]
    assert after[:2].sum().item() == pytest.approx(1.0)


def test_unknown_methods_are_refused():
    with pytest.raises(BadInput, match="no method 'blocks'"):
        Merging([teacher(), teacher()], BLOCKS, method="blocks")


def images(seed, size, count=256):
    shape, random = (count, *size), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("method", ["all-logits", "paper"])
def test_a_student_learns_two_teachers_of_different_input_sizes(method):
    """Teacher 1 knows dark images' halves, teacher 2 bright ones'; the student tells all four."""
    size = (1, 4, 4)
    teachers = [teacher(name="a", size=size, seed=1), teacher(name="b", size=(1, 2, 2), seed=2)]
    sets = [images(1, size) // 2, 127 + images(2, size) // 2]
    outputs = join_classes(teachers)
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    student = Classifier(network, ModelCard("tiny", 4, size, (0.5,), (0.25,)))
    merging = Merging(teachers, outputs, method=method)
    training = Training(steps=600, lr=0.1, batch_size=64)
    trained = Trainer(student, merging, training, compute=EAGER).fit(*sets)
    assert trained.steps == 600
    with torch.no_grad():
        for number, some in enumerate(sets):
            shown = some.float() / 255
            answer = student(shown).argmax(1)
            (given,) = merging.teach(shown, torch.zeros(len(shown)))[number : number + 1]
            assert (answer // 2 == number).float().mean() > 0.95
            assert (answer == outputs.of[number][given.argmax(1)]).float().mean() > 0.85


def test_what_is_remembered_of_the_teachers_survives_a_resume(tmp_path):
    blocks = ClassMap((torch.tensor([0, 1]), torch.tensor([2, 3])), 4)
    sets = images(1, (1, 4, 4)), images(2, (1, 4, 4))

    def trainer(folder):
        student, merging = teacher(classes=4, seed=5), Merging([teacher(seed=1), teacher(seed=2)], blocks)
        training = Training(steps=20, lr=0.1, batch_size=16)
        return Trainer(student, merging, training, compute=EAGER, folder=folder)

    def fitted(folder):
        made = trainer(folder)
        made.fit(*sets)
        return made.student.state_dict()

    with trainer(tmp_path).ready(*sets) as steps:
        for _ in range(7):
            steps.take()
        steps.save(tmp_path / PARTIAL)
    whole, resumed = fitted(None), fitted(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
