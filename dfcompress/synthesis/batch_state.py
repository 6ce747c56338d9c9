"""`BatchState`: everything that the next step on unfinished batches depends on; it can be saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress.machine.compiling import captured
from dfcompress.run import Clock, save_state
from dfcompress.synthesis.images import Images
from dfcompress.synthesis.losses import Loss, ModuleState
from dfcompress.synthesis.recipe import Phase
from dfcompress.synthesis.records.targets import BatchTargets
from dfcompress.synthesis.transforms import Drawn

# Factor of the learning rate in each new attempt at a batch whose loss was not finite.
SMALLER = 0.3


class BatchState:
    """The state of one or several unfinished batches that are optimised side by side: images, modules of losses,
    optimiser, step, and the losses of every step so far.

    `labels` `(N,)` and `targets` cover all batches, one after the other. `images` has one parametrisation per batch.
    `modules` has, per batch and by loss, the tensors of the loss's module; passed in, they persist from an earlier
    batch, otherwise every batch begins with fresh ones.

    A single batch may be computed in `chunks`, which are slices of its rows. `means` then holds, by name, the
    quantities that losses average over the batch, `(chunks, ...)`, each chunk's as last computed.
    """

    def __init__(
        self,
        shards: Sequence[int],
        labels: Tensor,
        targets: BatchTargets,
        images: Sequence[Images],
        losses: Sequence[Loss],
        attempt: int,
        *,
        chunk: int | None = None,
        modules: Sequence[dict[str, ModuleState]] | None = None,
    ) -> None:
        self.shards, self.labels, self.targets, self.images = list(shards), labels, targets, list(images)
        fresh = [{loss.name: loss.module_state(labels.device) for loss in losses} for _ in images]
        self.modules = list(modules or fresh)
        self.attempt = attempt
        size = min(chunk or len(labels), len(labels))
        self.chunks = [slice(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]
        self.shares = [(rows.stop - rows.start) / len(labels) for rows in self.chunks]
        every = torch.tensor(self.shares, device=labels.device).expand(len(self.chunks), -1)
        self._shares_of_others = every - every.diagonal().diag()
        self.step, self.started = 0, False
        self.history: list[Tensor] = []
        self.clock = Clock()
        self._groups = self._parameter_groups()
        self.parameters = [parameter for parameters in self._groups.values() for parameter in parameters]
        self._rates = {rate: torch.zeros((), device=labels.device) for rate in self._groups}
        self.start_phase(betas=(0.9, 0.999))

    def begin_next(self, shard: int, labels: Tensor) -> None:
        """Begin the next batch of persistent images, in the same memory and with the same optimiser."""
        self.shards, self.step, self.history, self.clock = [shard], 0, [], Clock()
        self.labels.copy_(labels)

    def _parameter_groups(self) -> dict[tuple[float, float | None], list[Tensor]]:
        """All tensors to optimise, grouped by factor and learning rate, so that few kernels update them."""
        groups: dict[tuple[float, float | None], list[Tensor]] = {}
        for images, modules in zip(self.images, self.modules, strict=True):
            for group in images.parameters():
                groups.setdefault((group.factor, group.lr), []).extend(group.parameters)
            trained = [tensor for module in modules.values() for tensor in module.values() if tensor.requires_grad]
            if trained:
                groups.setdefault((1.0, None), []).extend(trained)
        return groups

    @property
    def losses(self) -> Tensor:
        """The unweighted values of every step so far, `(steps, shards, losses)`."""
        return torch.stack(self.history) if self.history else torch.zeros(0, len(self.shards), 1)

    def start_phase(self, *, betas: tuple[float, float]) -> None:
        """Reset the optimiser, the captured step and the chunks' means, because another phase has other transforms."""
        groups = [{"params": parameters} for parameters in self._groups.values()]
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True)
        self.follow_rates()
        self.drawn: list[list[Drawn]] = []
        self.captured: Callable[[], Tensor] | None = None
        self.steps_since_start = 0
        self.means: dict[str, Tensor] = {}

    def capture(self, step: Callable[[], Tensor]) -> bool:
        """Capture `step`, which takes an optimiser step, as a CUDA graph in `captured`; whether this is possible."""
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # Not before: torch warns of such an optimiser outside of a capture.
        self.captured = captured(step)
        return self.captured is not None

    def of_others(self, number: int) -> dict[str, Tensor]:
        """The contributions of all chunks but `number` to the means over the batch, by name."""
        shares = self._shares_of_others[number]
        return {name: torch.tensordot(shares, means, 1) for name, means in self.means.items()}

    def follow_rates(self) -> None:
        """Let the optimiser read the learning rates from device memory, where a captured step finds them, too."""
        for group, rate in zip(self.optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate

    def set_rates(self, phase: Phase, step_in_phase: int) -> None:
        """Set the learning rates of the next step; they are smaller after an attempt that was not finite."""
        for (factor, lr), rate in self._rates.items():
            peak = factor * phase.lr if lr is None else lr
            rate.fill_(phase.rate(step_in_phase, peak=peak) * SMALLER**self.attempt)

    def put_drawn(self, drawn: Sequence[Sequence[Drawn]]) -> None:
        """Store the random numbers of the next step's transforms for each batch, always in the same memory."""
        if not self.drawn:
            self.drawn = [
                [
                    tuple(tensor.to(self.labels.device, copy=True, non_blocking=True) for tensor in numbers)
                    for numbers in of_batch
                ]
                for of_batch in drawn
            ]
            return
        for old, new in zip(_flat(self.drawn), _flat(drawn), strict=True):
            old.copy_(new, non_blocking=True)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {
            "attempt": self.attempt,
            "step": self.step,
            "seconds": self.clock.seconds,
            "images": [dict(images.state_dict()) for images in self.images],
            "modules": [detached(modules) for modules in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "means": self.means,
            "history": self.losses,
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Resume from what `save` wrote. A file that version 0.1 saved in the middle of a batch is ignored; the batch
        then begins again and ends in the same bytes.
        """
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if "images" not in state:
            return
        self.attempt = state["attempt"]
        for images, saved in zip(self.images, state["images"], strict=True):
            images.load_state_dict(saved)
        for modules, saved_modules in zip(self.modules, state["modules"], strict=True):
            put_modules(modules, saved_modules)
        self.optimizer.load_state_dict(state["optimizer"])
        self.follow_rates()
        self.means = {name: means.to(self.labels.device) for name, means in state.get("means", {}).items()}
        self.step, self.started = state["step"], True
        self.clock.go_on_from(state["seconds"])
        self.history = list(state["history"].to(self.labels.device))


def _flat(drawn: Sequence[Sequence[Drawn]]) -> list[Tensor]:
    return [tensor for of_batch in drawn for numbers in of_batch for tensor in numbers]


def detached(modules: Mapping[str, ModuleState]) -> dict[str, ModuleState]:
    """The tensors of losses' modules, by loss, without gradients, for saving."""
    return {name: {key: tensor.detach() for key, tensor in module.items()} for name, module in modules.items()}


@torch.no_grad()
def put_modules(modules: Mapping[str, ModuleState], saved: Mapping[str, ModuleState]) -> None:
    """Copy saved tensors of losses' modules into `modules`, in place."""
    for name, module in modules.items():
        for key, tensor in module.items():
            tensor.copy_(saved[name][key])
