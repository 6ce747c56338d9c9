"""`Classifier`: a network and its card. Nothing else in the code knows a mean or a standard deviation."""

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
    """A network that takes images in [0, 1] because it owns the normalisation its weights expect.

    `network` takes normalised images `(N, C, H, W)` and returns logits `(N, classes)`, in training mode perhaps others
    beside them (see `main_logits`).
    `name`, `sha256` and `path` say which file the weights came from, if any; sets and records of one teacher are
    refused to another.
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
        """Images in [0, 1] → the space the network works in."""
        return (images - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The network's space → images in [0, 1]."""
        return images * self.std + self.mean

    def identity(self) -> dict[str, Any]:
        """What results of this classifier depend on: the weights' hash and the card."""
        return {"sha256": self.sha256 or self._digest(), "card": self.card.to_json()}

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    def frozen(self) -> Classifier:
        """Itself in evaluation mode, no parameter asking for a gradient."""
        return self.eval().requires_grad_(False)


def main_logits(answer: Any) -> Any:
    """The logits of a network that answers with more while it trains: those named `logits`, or the first.

    So torchvision's GoogLeNet and Inception, and networks written after them, give the logits of auxiliary heads.
    """
    if isinstance(answer, Mapping):
        return answer.get("logits", next(iter(answer.values()), None))
    if isinstance(answer, tuple | list):
        return getattr(answer, "logits", next(iter(answer), None))
    return answer


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Put tensors into the places of a network that have their names; other places keep what they hold.

    torch's own `load_state_dict` lets modules ask of which version a state dict is, and a plain dictionary has none:
    torchvision's MNASNets refuse it, spectral normalisation takes it for an old one.
    """
    state = network.state_dict()
    state.update(tensors)
    network.load_state_dict(state, assign=assign)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def pass_once(classifier: Classifier) -> Tensor:
    """Logits `(1, classes)` of one black image, for what hooks see of it."""
    with evaluating(classifier):
        logits: Tensor = classifier(torch.zeros(1, *classifier.card.input_size, device=classifier.mean.device))
    return logits


@torch.no_grad()
def bytes_a_pass(classifier: Classifier) -> Taken:
    """What images take of the memory on their way through a classifier, forwards and in fp32."""
    images = torch.zeros(4, *classifier.card.input_size, device=classifier.mean.device)
    with evaluating(classifier):
        return count_growth(lambda count: classifier(images[:count]))


def images_a_pass(classifier: Classifier) -> int:
    """How many images to send through a classifier at once, forwards and in fp32: a power of two, `LARGEST_PASS` at
    most. Raises `BadInput` where the memory does not suffice for one.
    """
    size, target = classifier.card.input_size, classifier.mean.device
    return images_at_once(LARGEST_PASS, bytes_a_pass(classifier), target=target, input_size=size)


def multiply_accumulates(classifier: Classifier) -> int:
    """Multiply-accumulates of one image in convolutions, linear layers and attention."""
    operations = _Operations()
    with operations:
        pass_once(classifier)
    return operations.flops // 2  # torch's formulas take a multiplication and an addition as two.


class _Operations(TorchDispatchMode):
    """Sums inside what the operations take, by torch's formulas.

    (torch's own `FlopCounterMode` does the same and imports torch's compiler: 1.3 s of CPU time, for `inspect` too.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.flops: int = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # To keep the compiler away from here, torch would import it.

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


# Networks of few channels are bound by memory. Measured once, eagerly, on one core with bf16: in this unit a second is
# 103 to 245 G for LeNet-5, ResNet-20, ResNet-44, ResNet-18, MobileNet-V2 and VGG-11, in multiply-accumulates alone 12
# to 107 G.
WRITING = 150


def work_of(classifier: Classifier) -> int:
    """What a forward pass of one image takes, in multiply-accumulates: its own, and 150 for each element that a layer
    gives.
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
    """How often one forward pass runs each named module of the network, as `hooks.counted_runs` counts."""
    with counted_runs(classifier.network, names) as runs:
        pass_once(classifier)
    return runs


ALONE = "Let the --arch factory return a network that answers with logits (N, classes) alone."

STEADY = "Let it be random in training mode alone: F.dropout takes training=self.training."
# Of the largest logit. Sums in another order differ by 1e-6 of it, a dropout by more than 1e-2.
SAME = 1e-3


class Unfit(NamedTuple):
    """Why a classifier cannot be used as it is, in half a sentence, and what to do."""

    why: str
    remedy: str


@torch.no_grad()
def why_not_run(classifier: Classifier) -> Unfit | None:
    """Why a classifier does not answer one image of its card's input size with logits of its card's classes, the same
    each time, or None where it does; classes of 0 are not known yet.
    """
    name = classifier.card.architecture
    channels, height, width = classifier.card.input_size
    image = torch.rand(1, channels, height, width, generator=generator("runs")).to(classifier.mean.device)
    try:
        with evaluating(classifier):
            answer, again = classifier(image), classifier(image)
    except Exception as error:
        # The network may be code of the user's, which can raise anything.
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
