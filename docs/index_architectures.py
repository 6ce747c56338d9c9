"""How `dfcompress/models/fingerprints.json` was made, of every architecture of timm, torchvision and dfcompress.

    python docs/index_architectures.py dfcompress/models/fingerprints.json

Each is built twice, the second time with one class and one channel more: the shapes that change tell head and stem.
Where several architectures have the same tensors, random weights and images tell which of them compute the same.
It takes about 25 minutes on one core and up to 4 GB, and downloads nothing. Run it with the newest timm.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from dfcompress import console
from dfcompress.models.architecture import Architecture, tensors_of
from dfcompress.models.architectures import architectures, named
from dfcompress.models.classifier import load_tensors
from dfcompress.models.fingerprints import Shape, Twins, of_names, of_order, unwrapped

CLASSES = 10
# Two networks of that many values take 3.2 GB; larger ones of the same tensors count as different.
COMPARED_VALUES = 400_000_000
# Of the largest logit: the same sums in another order differ by 1e-6 of it, BatchNorms of another eps by 1e-3.
SAME = 1e-5


@dataclass(frozen=True)
class Listed:
    """An architecture's shapes by name, in order, and which of them are its head's and its stem's."""

    name: str
    shapes: Mapping[str, Shape]
    head: list[str]
    stem: list[str]


def names() -> list[str]:
    """torchvision's and our own first: where others compute the same, theirs are the usual names."""
    return [*architectures(), *(f"timm:{name}" for name in timm.list_models())]


def listed(name: str) -> Listed | None:
    """What the index needs to know of an architecture, None where its network cannot be built or has no classes."""
    architecture = named(name)
    try:
        shapes = tensors_of(architecture, CLASSES, architecture.channels)
    except Exception as error:  # Code of timm's that needs another package, for instance.
        console.notice(f"{name} left out: {error}")
        return None
    try:
        others = tensors_of(architecture, CLASSES + 1, architecture.channels + 1)
    except Exception:  # Not every network takes other channels.
        others = tensors_of(architecture, CLASSES + 1, architecture.channels)
    found = _with_ends(name, shapes, others)
    return found if found.head else None


def _with_ends(name: str, shapes: Mapping[str, Shape], others: Mapping[str, Shape]) -> Listed:
    head, stem = [], []
    for tensor, shape in shapes.items():
        changed = {place for place, sizes in enumerate(zip(shape, others[tensor], strict=True)) if len({*sizes}) > 1}
        if changed == {1}:
            stem.append(tensor)
        elif changed:
            head.append(tensor)
    return Listed(
        name,
        {unwrapped(tensor): tuple(shape) for tensor, shape in shapes.items()},
        [unwrapped(tensor) for tensor in head],
        [unwrapped(tensor) for tensor in stem],
    )


def compute_alike(one: Architecture, other: Architecture) -> bool:
    """Whether two architectures of the same tensors answer random images alike, of the usual sizes of both."""
    networks = [each.build(CLASSES, each.channels).eval() for each in (one, other)]
    _randomise(networks[0])
    load_tensors(networks[1], networks[0].state_dict())
    sizes = {one.size or 224, other.size or 224}
    answers = [_answers(network, one.channels, sizes) for network in networks]
    return len(answers[0]) == len(answers[1]) > 0 and all(
        torch.allclose(mine, yours, rtol=0, atol=SAME * mine.abs().max().item())
        for mine, yours in zip(*answers, strict=True)
    )


@torch.no_grad()
def _randomise(network: nn.Module) -> None:
    """Weights that hide nothing: many networks begin with gates and scales of zero."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.dim() >= 2 and tensor.is_floating_point():
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        elif tensor.is_floating_point() and name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def _answers(network: nn.Module, channels: int, sizes: Iterable[int]) -> list[Tensor]:
    found = []
    for size in sorted(sizes):
        with contextlib.suppress(Exception):  # Some take images of one size alone.
            images = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(1))
            found.append(network(images))
    return found


def twins(together: Sequence[Listed]) -> list[Twins]:
    """The names in groups that compute the same; the first of each is the usual one."""
    usual = sorted(together, key=lambda each: (":" in each.name, len(each.name), each.name))
    values = sum(torch.Size(shape).numel() for shape in together[0].shapes.values())
    groups: list[list[str]] = []
    for each in usual:
        group = None
        if values <= COMPARED_VALUES:
            group = next((known for known in groups if compute_alike(named(known[0]), named(each.name))), None)
        if group is None:
            groups.append([each.name])
        else:
            group.append(each.name)
    if ":" in groups[0][0]:
        return [tuple(group) for group in groups]
    # Beside torchvision's, variants of timm's that nobody released weights of would only be doubts.
    return [tuple(group) for group in groups if group is groups[0] or any(map(_was_released, group))]


def _was_released(name: str) -> bool:
    bare = name.removeprefix("timm:")
    return any(each.partition(".")[0] == bare for each in timm.list_pretrained(f"{bare}*"))


def written(every: Sequence[Listed]) -> str:
    """The index as JSON, one fingerprint a line."""
    together: dict[str, list[Listed]] = defaultdict(list)
    for each in every:
        together[of_names(each.shapes, each.head, each.stem)].append(each)
    found: dict[str, list[str]] = defaultdict(list)
    for fingerprint, same in sorted(together.items()):
        order = {each.name: of_order([*each.shapes.values()]) for each in same}
        for group in twins(same):
            found[f"{fingerprint} {order[group[0]]}"].append(" ".join(group))
    parts = {
        "versions": {"timm": timm.__version__, "torchvision": torchvision.__version__.partition("+")[0]},
        "heads": sorted({tuple(each.head) for each in every if each.head}),
        "stems": sorted({tuple(each.stem) for each in every}),
        "architectures": found,
    }
    return "{\n" + ",\n".join(f'"{name}": {_lines(part)}' for name, part in parts.items()) + "\n}\n"


def _lines(part: Mapping[str, object] | Sequence[object]) -> str:
    compact = (",", ":")
    if isinstance(part, Mapping):
        lines = [f'"{key}":{json.dumps(value, separators=compact)}' for key, value in part.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return "[\n" + ",\n".join(json.dumps(value, separators=compact) for value in part) + "\n]"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    every = [found for name in names() if (found := listed(name))]
    Path(sys.argv[1]).write_text(written(every))
    console.notice(f"{len(every)} of {len(names())} architectures listed.")
