"""What a network answers with, made logits `(N, classes)` of exclusive classes: nothing else has a loss here.

Two other answers are understood, because a pass shows beyond doubt what they are: probabilities (the network ends in
softmax), and an object or a dictionary with `logits`, as networks of transformers give.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, Unfit, evaluating
from dfcompress.models.hooks import hooked_outputs
from dfcompress.randomness import generator

# Of softmax in fp32 the sum of 21,841 probabilities is off by less than 1e-5.
TOLERANCE = 1e-4
# The logits of one image may add up to 1 by chance, those of a black image and one of noise do not.
IMAGES = 2

SOFTMAX = "the logits before its softmax"
LOGARITHMS = "the logarithms of its probabilities, which are logits"
FIELD = "the logits in its answer"
LOGITS = "logits"

ONE_COLUMN = Unfit(
    "it answers with one column, and two or more classes are needed",
    "Let the --arch factory return two: of a sigmoid head with logit z, torch.cat([0 * z, z], 1) is the same.",
)
SEVERAL_LABELS = Unfit(
    "it answers with values in [0, 1] that do not add up to 1, as a network of several labels per image does",
    "If every image has one class, let the network answer with the logits before its sigmoid; several labels per image "
    "are not supported.",
)
# Operations after a sigmoid that leave its values what they are.
PASSING = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Select",
    "Alias",
    "Clone",
    "ToCopy",
    "Clamp",
)


def take_logits(classifier: Classifier) -> None:
    """Let the network answer with logits, in place, where it gives something else that is understood.

    Names of tensors stay. Of a softmax module the input is taken; of any other softmax the logarithm of the
    probabilities, which differs from the logits by one number per image (at most 87 below the largest, in fp32).
    """
    answer = _answer(classifier)
    if (logits := _logits_in(answer)) is not None:
        _let(classifier.network, _LogitsTaken)
        answer = logits
    if not _are_probabilities(answer):
        return
    if softmax := _last_softmax(classifier):
        for name in softmax:
            classifier.network.set_submodule(name, _SoftmaxOmitted())
        return
    in_training = _answer(copy.deepcopy(classifier), training=True)
    _let(classifier.network, _LogarithmTaken)
    # An entry of the dictionary: `setattr` of a module is typed for tensors and modules alone.
    vars(classifier.network)["logits_in_training"] = in_training is not None and not _are_probabilities(in_training)


def answers_with(network: nn.Module) -> str:
    """What is used of a network's answer, in words."""
    if _is(network, _LogarithmTaken):
        return LOGARITHMS
    if any(isinstance(module, _SoftmaxOmitted) for module in network.modules()):
        return SOFTMAX
    return FIELD if _is(network, _LogitsTaken) else LOGITS


def why_not_exclusive(classifier: Classifier) -> Unfit | None:
    """Why a classifier does not answer with one of several classes, or None where it does."""
    if classifier.card.classes < 2:
        return ONE_COLUMN
    return SEVERAL_LABELS if _ends_in_sigmoid(classifier) else None


def require_exclusive(classifier: Classifier) -> None:
    """Raise `BadInput` where a classifier has fewer than two classes, or classes that do not exclude each other."""
    if unfit := why_not_exclusive(classifier):
        raise BadInput(f"{classifier.name} cannot be used: {unfit.why}.", unfit.remedy)


class _LogitsTaken:
    """A network whose answer holds logits under that name."""

    @staticmethod
    def read(answer: object) -> Any:
        return _logits_in(answer)

    def forward(self, images: Tensor) -> Any:
        # By its class: of a network that has both changes, `self.read` is the other's.
        return _LogitsTaken.read(super().forward(images))  # type: ignore[misc]


class _LogarithmTaken:
    """A network that answers with probabilities, in training mode perhaps with logits."""

    logits_in_training = False

    @staticmethod
    def read(answer: Tensor) -> Tensor:
        return answer.float().clamp_min(torch.finfo(torch.float32).tiny).log()

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = super().forward(images)  # type: ignore[misc]
        if self.training and self.logits_in_training:  # type: ignore[attr-defined]
            return answer
        return _LogarithmTaken.read(answer)


Kind = type[_LogitsTaken] | type[_LogarithmTaken]


class _SoftmaxOmitted(nn.Identity):
    """Stands where the softmax was."""


def _let(network: nn.Module, kind: Kind) -> None:
    """Change the network's class to one whose `forward` reads the answer as that kind does.

    It is no module around the network, so names of tensors, hooks and copies stay what they are. A traced network has
    its own class and its own way to be copied; there the reading becomes a part of the graph.
    The new class has no name in any module, so such a network cannot be pickled; its `state_dict()` can.
    """
    if not isinstance(network, GraphModule):
        base = type(network)
        network.__class__ = type(base.__name__, (kind, base), {})
        return
    *_, output = network.graph.nodes
    with network.graph.inserting_before(output):
        output.args = (network.graph.call_function(kind.read, output.args),)
    network.recompile()


def _is(network: nn.Module, kind: Kind) -> bool:
    if isinstance(network, GraphModule):
        return any(node.target is kind.read for node in network.graph.nodes)
    return isinstance(network, kind)


def _answer(classifier: Classifier, *, training: bool = False, graph: bool = False) -> object:
    """What the network gives for a few images, with the `graph` of its operations where asked for; None where it cannot
    take them.
    """
    shape = (IMAGES, *classifier.card.input_size)
    images = torch.rand(shape, generator=generator("answers")).to(classifier.mean.device)
    images[0] = 0
    try:
        with torch.set_grad_enabled(graph):
            if training:
                with torch.random.fork_rng(devices=[]):
                    return classifier.train()(images)
            with evaluating(classifier):
                return classifier(images.requires_grad_(graph))
    except Exception:
        # `why_not_run` tries again and says what is wrong.
        return None


def _logits_in(answer: object) -> Tensor | None:
    """The logits of an answer that is more than one tensor."""
    if isinstance(answer, Tensor):
        return None
    logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _are_probabilities(answer: object) -> bool:
    if not isinstance(answer, Tensor) or answer.dim() != 2 or answer.shape[1] < 2:
        return False
    within = (answer >= 0) & (answer <= 1 + TOLERANCE)
    return bool(within.all() and ((answer.sum(1) - 1).abs() < TOLERANCE).all())


def _ends_in_sigmoid(classifier: Classifier) -> bool:
    """Whether the network's last operation is a sigmoid, as the graph of its answer says.

    Values would not tell: the logits of a small network may all be in [0, 1].
    """
    node = getattr(_answer(classifier, graph=True), "grad_fn", None)
    while node is not None and node.name().startswith(PASSING):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sigmoid", "Hardsigmoid"))


def _last_softmax(classifier: Classifier) -> list[str]:
    """The names of the softmax module whose output is the network's answer, none where there is no such module."""
    softmaxes = {name: module for name, module in classifier.network.named_modules() if isinstance(module, nn.Softmax)}
    outputs: dict[str, list[Tensor]] = {name: [] for name in softmaxes}
    # No copies: what counts is whether the answer is the very tensor.
    with hooked_outputs(classifier.network, softmaxes, lambda name, output: outputs[name].append(output)):
        answer = _answer(classifier)
    last = [softmaxes[name] for name, answers in outputs.items() if len(answers) == 1 and answers[0] is answer]
    names = classifier.network.named_modules(remove_duplicate=False)
    return [name for name, module in names if name and module in last]
