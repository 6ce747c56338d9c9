"""What a loss owns is optimised, saved and taken up again together with the images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfcompress.machine.execution import Execution
from dfcompress.models.checkpoint import load
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import ChannelMeans, Loss, class_cross_entropy
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.synthesizer import Synthesizer

EAGER = Execution("cpu", "fp32", False, 1, "")
LABELS = torch.arange(8) % 10


class Contrast(nn.Module):
    """A head on channel means, and a memory bank that every step writes into (as in CMI, Fang et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 4)
        self.register_buffer("bank", torch.randn(8, 4))

    def forward(self, trace):
        features = F.normalize(self.head(trace.channel_means["layer2"]), dim=1)
        similarity = features @ self.bank.clone().T
        with torch.no_grad():
            self.bank.copy_(features)
        return similarity.exp().mean()


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def synthesizer(teacher, contrast, execution=EAGER):
    losses = [class_cross_entropy(), 0.5 * Loss("contrast", contrast, wants=[ChannelMeans("layer2")])]
    recipe = Recipe(images=Pixels(), batch_size=8, losses=losses, phases=[Phase(3, 0.05), Phase(3, 0.1)])
    return Synthesizer(recipe, teacher, execution)


@pytest.fixture
def contrast():
    torch.manual_seed(0)
    return Contrast()


def steps(made, state, count):
    for _ in range(count):
        made.step(state)
    return state


def test_a_loss_trains_its_own_module_and_leaves_that_of_the_recipe(teacher, contrast):
    made = synthesizer(teacher, contrast)
    before = {name: tensor.detach().clone() for name, tensor in contrast.state_dict().items()}
    state = steps(made, made.begin({0: LABELS}), 1)
    (modules,) = state.modules
    assert (modules["contrast"]["head.weight"] - before["head.weight"]).abs().max().item() == pytest.approx(
        0.05, rel=1e-3
    )
    assert modules["contrast"]["bank"].norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in contrast.state_dict().items())


def test_head_and_bank_of_a_killed_batch_go_on_to_the_same_bytes(teacher, contrast, tmp_path):
    """Through the change of the phase, where the optimiser starts anew."""
    whole = synthesizer(teacher, contrast)
    expected = steps(whole, whole.begin({0: LABELS}), 6)
    killed = synthesizer(teacher, contrast)
    steps(killed, killed.begin({0: LABELS}), 4).save(tmp_path / "state")
    again = synthesizer(teacher, contrast)
    state = again.begin({0: LABELS})
    state.load(tmp_path / "state")
    steps(again, state, 2)
    assert torch.equal(state.images[0].render(), expected.images[0].render())
    for name, tensor in expected.modules[0]["contrast"].items():
        assert torch.equal(state.modules[0]["contrast"][name], tensor), name


def test_batches_side_by_side_have_modules_of_their_own(teacher, contrast):
    made = synthesizer(teacher, contrast)
    together = steps(made, made.begin({0: LABELS, 1: LABELS.flip(0)}), 2)
    for number, labels in enumerate((LABELS, LABELS.flip(0))):
        alone = steps(made, made.begin({number: labels}), 2)
        for name, tensor in alone.modules[0]["contrast"].items():
            torch.testing.assert_close(together.modules[number]["contrast"][name], tensor, rtol=1e-3, atol=1e-3)


def test_a_module_of_a_loss_compiles(teacher, contrast, monkeypatch):
    """Its tensors are inputs of the compiled function, so the next batch compiles nothing."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("dfcompress.machine.compiling._inductor", counted)
    torch._dynamo.reset()
    made = synthesizer(teacher, contrast, Execution("cpu", "fp32", True, 1, ""))
    compiled = steps(made, made.begin({0: LABELS}), 2)
    first = len(graphs)
    steps(made, made.begin({1: LABELS}), 1)
    assert len(graphs) == first == 2
    eager = synthesizer(teacher, contrast)
    expected = steps(eager, eager.begin({0: LABELS}), 2)
    torch.testing.assert_close(compiled.images[0].render(), expected.images[0].render())


def test_a_state_of_version_0_1_is_left_and_the_batch_begun_again(teacher, contrast, tmp_path):
    torch.save({"attempt": 0, "step": 3, "parameters": [torch.zeros(8, 3, 32, 32)]}, tmp_path / "state")
    state = synthesizer(teacher, contrast).begin({0: LABELS})
    state.load(tmp_path / "state")
    assert state.step == 0
