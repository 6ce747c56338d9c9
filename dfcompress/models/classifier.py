"""`Classifier`: a network and its card. It alone applies the mean and the standard deviation of the images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dfcompress.errors import first_line
from dfcompress.machine.memory import Taken, count_growth, images_at_once
from dfcompress.models.card import ModelCard
from dfcompress.models.hooks import counted_runs, hooked_outputs
from dfcompress.randomness import generator

LARGEST_PASS = 2**16


class Classifier(nn.Module):
    """A network that takes images in [0, 1], because it applies the normalisation that its weights expect.

    `network` takes normalised images `(N, C, H, W)` and returns logits `(N, classes)`; in training mode it may also
    return the logits of auxiliary heads (see `main_logits`).
    `name`, `sha256` and `path` identify the file of the weights, if any: synthetic sets and activation records of one
    teacher are refused for another.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, card: ModelCard, *, name: str = "model", sha256: str = "", path: Path | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.card, self.name, self.sha256, self.path = card, name, sha256, path
        self.register_buffer("mean", torch.tensor(card.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, C, H, W)` in [0, 1]."""
        answer: Tensor = self.network(self.normalise(images))
        return main_logits(answer) if self.training else answer

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images: from [0, 1] to the network's input space."""
        return (images - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Undo `normalise`: from the network's input space to [0, 1]."""
        return images * self.std + self.mean

    def identity(self) -> dict[str, Any]:
        """The values that identify this classifier: the hash of its weights, and its card as JSON values."""
        return {"sha256": self.sha256 or self._digest(), "card": self.card.to_json()}

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    def frozen(self) -> Classifier:
        """Return the classifier itself, in evaluation mode and without gradients for its parameters."""
        return self.eval().requires_grad_(False)


def main_logits(answer: Any) -> Any:
    """The main logits of a network's output: of a mapping, tuple or list the entry `logits`, else its first entry.

    In training mode torchvision's GoogLeNet and Inception, and similar networks, also return auxiliary heads' logits.
    """
    if isinstance(answer, Mapping):
        return answer.get("logits", next(iter(answer.values()), None))
    if isinstance(answer, tuple | list):
        return getattr(answer, "logits", next(iter(answer), None))
    return answer


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load `tensors` by name into a network; its other tensors keep their values. `assign` replaces the tensors.

    Modules may read the version of a state dict in torch's `load_state_dict`, and a plain dictionary has no version:
    torchvision's MNASNets refuse it, and spectral normalisation treats it as an old one. So the network's own state
    dict, updated, is loaded.
    """
    state = network.state_dict()
    state.update(tensors)
    network.load_state_dict(state, assign=assign)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode within this context; every module then returns to its own mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def pass_once(classifier: Classifier) -> Tensor:
    """Run one black image, so that hooks are called, in evaluation mode; its logits `(1, classes)`."""
    with evaluating(classifier):
        logits: Tensor = classifier(torch.zeros(1, *classifier.card.input_size, device=classifier.mean.device))
    return logits


@torch.no_grad()
def bytes_a_pass(classifier: Classifier) -> Taken:
    """The memory that images take in a forward pass through a classifier in fp32."""
    images = torch.zeros(4, *classifier.card.input_size, device=classifier.mean.device)
    with evaluating(classifier):
        return count_growth(lambda count: classifier(images[:count]))


def images_a_pass(classifier: Classifier) -> int:
    """The number of images for one forward pass in fp32 that fits into memory: a power of two, `LARGEST_PASS` at most.

    Raises `BadInput` if the memory does not suffice for one image.
    """
    size, target = classifier.card.input_size, classifier.mean.device
    return images_at_once(LARGEST_PASS, bytes_a_pass(classifier), target=target, input_size=size)


def multiply_accumulates(classifier: Classifier) -> int:
    """The number of multiply-accumulates for one image in convolutions, linear layers and attention."""
    operations = _Operations()
    with operations:
        pass_once(classifier)
    return operations.flops // 2  # torch's formulas count a multiplication and an addition as two.


class _Operations(TorchDispatchMode):
    """Sums the floating-point operations within its context, by torch's formulas.

    (torch's own `FlopCounterMode` does the same but imports torch's compiler, which takes 1.3 s of CPU time, also for
    `inspect`.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.flops: int = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # With True, torch would import its compiler to skip this code.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=result)
        return result


# Multiply-accumulates that count for each element that a layer writes, because networks of few channels are bound by
# memory. Measured once, eagerly, on one core with bf16, for LeNet-5, ResNet-20, ResNet-44, ResNet-18, MobileNet-V2 and
# VGG-11: they reach 103 to 245 G of this unit per second, but 12 to 107 G multiply-accumulates per second.
WRITING = 150


def work_of(classifier: Classifier) -> int:
    """The work of a forward pass of one image, in multiply-accumulates: the pass's own, plus `WRITING` (150) for each
    element of a layer's output.
    """
    written = 0

    def note(name: str, output: Any) -> None:
        nonlocal written
        written += sum(tensor.numel() for tensor in tree_leaves(output) if isinstance(tensor, Tensor))

    leaves = [name for name, layer in classifier.named_modules() if not [*layer.children()]]
    with hooked_outputs(classifier, leaves, note):
        pass_once(classifier)
    return multiply_accumulates(classifier) + WRITING * written


def count_runs(classifier: Classifier, names: Iterable[str]) -> Counter[str]:
    """The number of runs of each named module in one forward pass, counted as in `hooks.counted_runs`."""
    with counted_runs(classifier.network, names) as runs:
        pass_once(classifier)
    return runs


ALONE = "Let the --arch factory return a network that answers with logits (N, classes) alone."

STEADY = "Let it be random in training mode alone: F.dropout takes training=self.training."
# Greatest difference between two passes, as a share of the largest logit. Sums in another order differ by a share of
# 1e-6, dropout by more than 1e-2.
SAME = 1e-3


class Unfit(NamedTuple):
    """The reason `why` a classifier cannot be used, as a clause, and the `remedy`, as a sentence."""

    why: str
    remedy: str


@torch.no_grad()
def why_not_run(classifier: Classifier) -> Unfit | None:
    """Check two passes of one image of the card's input size; the reason why they fail, or None.

    Both must return the same logits `(1, classes)`, with the card's number of classes; a number of 0 is unknown and not
    compared.
    """
    name = classifier.card.architecture
    channels, height, width = classifier.card.input_size
    image = torch.rand(1, channels, height, width, generator=generator("runs")).to(classifier.mean.device)
    try:
        with evaluating(classifier):
            answer, again = classifier(image), classifier(image)
    except Exception as error:
        # The network may be the user's code, which can raise anything.
        return Unfit(
            f"{name} cannot take images of {channels}x{height}x{width} ({first_line(error)})",
            "Give another --input-size or --arch.",
        )
    if not isinstance(answer, Tensor):
        return Unfit(f"{name} answers with {_described(answer)}", ALONE)
    if answer.dim() != 2 or len(answer) != 1:
        return Unfit(f"{name} answers one image with a tensor {tuple(answer.shape)}", ALONE)
    if classifier.card.classes not in (0, answer.shape[1]):
        return Unfit(
            f"{name} has {answer.shape[1]} outputs, not {classifier.card.classes}",
            f"Use --num-classes {answer.shape[1]}, or the --arch of a network of {classifier.card.classes} classes.",
        )
    if not torch.allclose(answer, again, rtol=0, atol=SAME * answer.abs().max().item(), equal_nan=True):
        return Unfit(f"{name} answers the same image differently each time, in evaluation mode too", STEADY)
    return None


def _described(answer: object) -> str:
    if isinstance(answer, Mapping):
        return f"a {type(answer).__name__} of {', '.join(map(str, answer)) or 'nothing'}"
    size = f" of {len(answer)}" if isinstance(answer, (tuple, list)) else ""
    return f"a {type(answer).__name__}{size}"
