"""The student that images compete with: its answers, and new weights in the old place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_objective import gradient, noise
from test_synthesizer import EAGER
from torch import nn

from dfcompress.machine import compiling
from dfcompress.machine import execution as execution_module
from dfcompress.machine.compiling import compiled
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import is_quantized, learn_steps, quantize_layers
from dfcompress.models.grids import InputGrid
from dfcompress.models.recorder import FusedRecorder, _tensors
from dfcompress.synthesis import live_student, objective
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import Synthesizer


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


@pytest.mark.parametrize("normalisation", ["teacher's", "none", "halves"])
def test_images_compete_with_the_students_own_answer(teacher, normalisation):
    """1 − JS of both models' answers to the same images in [0, 1], each normalised by the model's own card."""
    known = {
        "teacher's": (teacher.card.mean, teacher.card.std),
        "none": ((0.0,) * 3, (1.0,) * 3),
        "halves": ((0.5,) * 3, (0.25,) * 3),
    }
    mean, std = known[normalisation]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    student = Classifier(network, replace(teacher.card, mean=mean, std=std)).frozen()
    recipe = choose("adaptive-deepinversion", "paper-cifar10", {"batch_size": 16}).recipe
    _, values = gradient(Synthesizer(recipe, teacher, EAGER, student=student), noise())
    images = teacher.denormalise(noise())
    given, own = ((model(images) / 3).softmax(1) for model in (teacher, student))
    middle = (given + own) / 2
    divergence = sum((p * (p / middle).log()).sum(1).mean() for p in (given, own)) / 2
    named = dict(zip((loss.name for loss in recipe.losses), values[0].tolist(), strict=True))
    assert named["competition"] == pytest.approx(1 - divergence.item(), abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [False, True])
def test_images_compete_with_a_quantized_student_as_it_will_answer(teacher, precision, steps):
    """To rounding, in which bf16 would move activations from one level to the next."""
    student = Classifier(copy.deepcopy(teacher.network), teacher.card)
    quantize_layers(student.network, {"conv1": (8, 8), "layer2.0.conv1": (2, 4), "fc": (4, 32)})
    for layer in ("conv1", "layer2.0.conv1"):
        student.network.get_submodule(layer).input_grid = InputGrid.covering(-2.0, 2.0, bits=4)
    if steps:
        learn_steps(student.network)
    recipe = choose("adaptive-deepinversion", "paper-cifar10", {"batch_size": 16}).recipe
    made = Synthesizer(recipe, teacher, replace(EAGER, precision=precision), student=student)
    with torch.no_grad():
        torch.testing.assert_close(made._live_student.logits(noise()), student.network(noise()), rtol=1e-3, atol=1e-3)
    change, _ = gradient(made, noise())
    assert change.isfinite().all()
    assert is_quantized(student.network)
    assert (student.network.conv1.weight_step is not None) == steps


def test_a_student_that_learns_is_updated_in_place(monkeypatch):
    """Three rounds: two recorders and three compiled functions in all, and the bits of a synthesizer made anew."""
    recorders, graphs, functions = [], [], []

    def counted_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for module in (objective, live_student):
        monkeypatch.setattr(
            module, "FusedRecorder", lambda *of, **how: recorders.append(of) or FusedRecorder(*of, **how)
        )
    monkeypatch.setattr(execution_module, "compiled", lambda function: functions.append(function) or compiled(function))
    monkeypatch.setattr(compiling, "_inductor", counted_graph)
    torch._dynamo.reset()
    settings = {"steps": 2, "batch_size": 8}
    recipe = choose("adaptive-deepinversion", "paper-cifar10", settings).recipe
    execution = replace(EAGER, compile=True, precision="bf16")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    teacher = Classifier(network, ModelCard("small", 10, (3, 8, 8), (0.5,) * 3, (0.25,) * 3)).frozen()
    student = Classifier(copy.deepcopy(network), teacher.card)
    live = Synthesizer(recipe, teacher, execution, student=student)
    tensors = [tensor.data_ptr() for _, tensor in _tensors(live._live_student._recorder.network)]
    labels, images = torch.arange(8), []
    for shard in range(3):
        images.append(live.batch(shard, labels).images)
        torch.manual_seed(shard)
        with torch.no_grad():
            for tensor in student.network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.rand(tensor.shape))
        live.update_student(student)
    images.append(live.batch(3, labels).images)
    assert (len(recorders), len(functions), len(graphs)) == (2, 3, 3)
    assert [tensor.data_ptr() for _, tensor in _tensors(live._live_student._recorder.network)] == tensors
    anew, fresh = (Synthesizer(recipe, teacher, execution, student=each) for each in (student, teacher))
    assert torch.equal(images[3], anew.batch(3, labels).images)
    assert not torch.equal(images[3], fresh.batch(3, labels).images)


def test_a_quantized_student_that_learns_is_updated_in_place(teacher):
    """To the bit: its weights on their grids anew, and its input grids."""
    student = Classifier(copy.deepcopy(teacher.network), teacher.card)
    quantize_layers(student.network, {"layer2.0.conv1": (2, 4), "fc": (4, 32)})
    student.network.layer2[0].conv1.input_grid = InputGrid.covering(-2.0, 2.0, bits=4)
    recipe = choose("adaptive-deepinversion", "paper-cifar10", {"batch_size": 16}).recipe
    live = Synthesizer(recipe, teacher, EAGER, student=student)
    with torch.no_grad():
        student.network.fc.weight.mul_(1.5)
        student.network.layer2[0].conv1.weight.add_(0.01)
    student.network.layer2[0].conv1.input_grid = InputGrid.covering(-1.0, 2.5, bits=4)
    before = live._live_student.logits(noise())
    live.update_student(student)
    after = live._live_student.logits(noise())
    assert not torch.equal(after, before)
    assert torch.equal(after, Synthesizer(recipe, teacher, EAGER, student=student)._live_student.logits(noise()))
    assert not student.network.fc.is_frozen
