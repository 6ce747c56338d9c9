"""A network's output turned into logits `(N, classes)` of exclusive classes, which all losses need.

Two other outputs are understood, because a pass identifies them beyond doubt: probabilities (the network ends in a
softmax), and an object or a dictionary with `logits`, as networks of transformers return.
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

# Greatest error of a sum of probabilities: the sum of 21,841 from a softmax in fp32 is off by less than 1e-5.
TOLERANCE = 1e-4
# One black image and one of noise: the logits of one image may add up to 1 by chance, the logits of both do not.
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
# Operations after a sigmoid that do not change its values.
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
    """Let the network return logits, in place, if it returns another output that is understood.

    Tensor names do not change. A final softmax module is removed; after any other softmax the logarithm of the
    probabilities is taken, which differs from the logits by one number per image (in fp32 it is at most 87 below the
    largest).
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
    # Set through `vars`, because `setattr` of a module is typed for tensors and modules only.
    vars(classifier.network)["logits_in_training"] = in_training is not None and not _are_probabilities(in_training)


def answers_with(network: nn.Module) -> str:
    """The part of a network's output that is used as logits, in words."""
    if _is(network, _LogarithmTaken):
        return LOGARITHMS
    if any(isinstance(module, _SoftmaxOmitted) for module in network.modules()):
        return SOFTMAX
    return FIELD if _is(network, _LogitsTaken) else LOGITS


def why_not_exclusive(classifier: Classifier) -> Unfit | None:
    """Why a classifier does not predict one of several exclusive classes, or None if it does."""
    if classifier.card.classes < 2:
        return ONE_COLUMN
    return SEVERAL_LABELS if _ends_in_sigmoid(classifier) else None


def require_exclusive(classifier: Classifier) -> None:
    """Raise `BadInput` if a classifier has fewer than two classes, or classes that do not exclude each other."""
    if unfit := why_not_exclusive(classifier):
        raise BadInput(f"{classifier.name} cannot be used: {unfit.why}.", unfit.remedy)


class _LogitsTaken:
    """A network whose output has an entry `logits`, which is returned."""

    @staticmethod
    def read(answer: object) -> Any:
        return _logits_in(answer)

    def forward(self, images: Tensor) -> Any:
        # Not `self.read`, which is the other class's if the network has both changes.
        return _LogitsTaken.read(super().forward(images))  # type: ignore[misc]


class _LogarithmTaken:
    """A network that computes probabilities, whose logarithms are returned; in training mode it may compute logits."""

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
    """Replaces a final softmax module."""


def _let(network: nn.Module, kind: Kind) -> None:
    """Change the network's class to one whose `forward` passes the output through `kind.read`.

    The network is not wrapped in a module, so tensor names, hooks and copies do not change. A traced network has its
    own class and is copied in its own way; there `kind.read` becomes a part of the graph.
    No module defines the new class, so such a network cannot be pickled; its `state_dict()` can.
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
    """The network's output for a few images, with the autograd graph if `graph` is set; None if the pass fails."""
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
        # `why_not_run` tries again and reports the error.
        return None


def _logits_in(answer: object) -> Tensor | None:
    """The entry `logits` of an output that is not a tensor, or None if there is none."""
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
    """Whether the network's last operation is a sigmoid, by the autograd graph of its output.

    The values would not show it: the logits of a small network may all be in [0, 1].
    """
    node = getattr(_answer(classifier, graph=True), "grad_fn", None)
    while node is not None and node.name().startswith(PASSING):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sigmoid", "Hardsigmoid"))


def _last_softmax(classifier: Classifier) -> list[str]:
    """The names of the softmax module whose output is the network's output; empty if there is no such module."""
    softmaxes = {name: module for name, module in classifier.network.named_modules() if isinstance(module, nn.Softmax)}
    outputs: dict[str, list[Tensor]] = {name: [] for name in softmaxes}
    # No copies: the network's output must be the same tensor object.
    with hooked_outputs(classifier.network, softmaxes, lambda name, output: outputs[name].append(output)):
        answer = _answer(classifier)
    last = [softmaxes[name] for name, answers in outputs.items() if len(answers) == 1 and answers[0] is answer]
    names = classifier.network.named_modules(remove_duplicate=False)
    return [name for name, module in names if name and module in last]
