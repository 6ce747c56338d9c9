"""What generators minimise, for students that start from random weights: one function per loss.

    losses = [own_argmax_cross_entropy(), 0.001 * feature_activation(), 20.0 * class_balance()]       # DAFL
    losses = [disagreement(), squared_bn_distance(), 0.5 * auxiliary_head(temperature=20.0)]          # IFHE's kind

`on_view` restricts a loss to one of several views that a transform shows of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.recorder import HookRecorder
from dfcompress.models.trace import Trace
from dfcompress.randomness import generator
from dfcompress.synthesis.losses import Loss, Want, bn_distance, require_positive


def own_argmax_cross_entropy() -> Loss:
    """CE(T(x̂), argmax T(x̂)), mean over the batch (Chen 2019, L_oh): the teacher becomes certain of some class."""
    return Loss("own_cross_entropy", lambda trace: F.cross_entropy(trace.logits, trace.logits.argmax(1)))


def feature_activation() -> Loss:
    """−mean |f| over units and images, f the input of the last weighted layer (Chen 2019, L_a; the paper has a norm
    over units, its code and this function the mean).
    """

    def value(trace: Trace) -> Tensor:
        assert trace.penultimate is not None
        return -trace.penultimate.flatten(1).abs().mean(1).mean()

    return Loss("feature_activation", value, wants=(Want.PENULTIMATE,))


# Lower bound of a class's mean probability: a teacher that is certain gives other classes exactly 0 in fp32.
RAREST = 1e-12


def class_balance() -> Loss:
    """Σ_c p̄_c·log p̄_c, p̄ the mean of the teacher's predictions over the batch (Chen 2019, L_ie); −log(classes) if
    all classes are equally frequent.
    """

    def value(trace: Trace) -> Tensor:
        mean = trace.mean_over_batch("class_balance", trace.logits.softmax(1)).clamp_min(RAREST)
        return (mean * mean.log()).sum()

    return Loss("class_balance", value, wants=(Want.BATCH,))


def disagreement(temperature: float = 1.0, *, where_agreed: bool = False) -> Loss:
    """−KL(p_T ‖ p_S) of the predictions of teacher and student at `temperature`, mean over the batch (Micaelli and
    Storkey 2019; Chen 2023, L_adv).

    With `where_agreed`, images on which the two predict different classes count as 0 (L_mask-adv; the mask is that of
    the code of Fang 2021): images are drawn towards the border between classes and not beyond it. Raises `BadInput` for
    a temperature that is not above 0.
    """
    require_positive("temperature", temperature)

    def value(trace: Trace) -> Tensor:
        assert trace.student_logits is not None
        divergence = _divergence(trace.logits, trace.student_logits, temperature)
        if where_agreed:
            divergence = divergence * (trace.logits.argmax(1) == trace.student_logits.argmax(1))
        return -divergence.mean()

    return Loss("disagreement", value, wants=(Want.STUDENT,))


def _divergence(logits: Tensor, approximate: Tensor, temperature: float) -> Tensor:
    """KL `(N,)` from the softened predictions of `logits` to those of `approximate`."""
    exact, approximated = (logits / temperature).log_softmax(1), (approximate / temperature).log_softmax(1)
    return (exact.exp() * (exact - approximated)).sum(1)


def squared_bn_distance() -> Loss:
    """(1/L)·Σ_l ‖μ_l − BN mean‖₂² + ‖σ_l − BN deviation‖₂² over L BatchNorm inputs (Chen 2023, L_bns)."""

    def value(trace: Trace) -> Tensor:
        assert trace.moments is not None
        return trace.moments.squared_distances().mean()

    return Loss("squared_bn_distance", value, wants=(Want.MOMENTS,))


def weighted_losses(
    *,
    adv: float = 0.0,
    bn: float = 0.0,
    oh: float = 0.0,
    act: float = 0.0,
    balance: float = 0.0,
    head: float = 0.0,
    temperature: float = 20.0,
) -> list[Loss]:
    """The losses of methods without intended classes, by weights named as in the code of Fang 2021; losses of weight 0
    are left out. `head` weights the loss of Chen 2023, at the `temperature` of the student.
    """
    losses = [
        adv * disagreement(),
        bn * bn_distance(),
        oh * own_argmax_cross_entropy(),
        act * feature_activation(),
        balance * class_balance(),
        head * auxiliary_head(temperature, own_argmax=True),
    ]
    return [loss for loss in losses if loss.weight]


def on_view(loss: Loss, number: int, views: int = 2) -> Loss:
    """The loss on view `number` of the `views` that a transform shows of every image, one copy of the batch each."""
    value: Callable[[Trace], Tensor] = loss.value
    assert not isinstance(value, nn.Module), "a module of a loss is handed every view"
    return replace(loss, value=lambda trace: value(trace.part(number, views)), whole_batch=True)


class AuxiliaryHead(nn.Module):
    """h(f_T): a linear layer that maps a network's intermediate features to logits `(N, classes)`.

    `forward` is CE(h(f_T), t); with `module_loss` it is KL(T/τ ‖ h(f_T)/τ). Both are means over the batch. t is the
    intended class, or with `own_argmax` the class that the teacher predicts.
    """

    def __init__(self, *, temperature: float, own_argmax: bool, features: int = 0, classes: int = 0) -> None:
        super().__init__()
        self._temperature, self._own_argmax = temperature, own_argmax
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))

    def sized_for(self, teacher: Classifier) -> AuxiliaryHead:
        """A head for this teacher's features and classes."""
        features, classes = feature_count(teacher), teacher.card.classes
        return AuxiliaryHead(
            temperature=self._temperature, own_argmax=self._own_argmax, features=features, classes=classes
        )

    def forward(self, trace: Trace, *, module_loss: bool = False) -> Tensor:
        """The loss of the images; with `module_loss`, the loss of the head."""
        features = trace.features().detach() if module_loss else trace.features()
        logits = F.linear(features, self.weight, self.bias)
        if module_loss:
            return _divergence(trace.logits.detach(), logits, self._temperature).mean()
        return F.cross_entropy(logits, trace.logits.argmax(1) if self._own_argmax else trace.labels)


def auxiliary_head(temperature: float, *, own_argmax: bool = False) -> Loss:
    """CE(h(f_T), t) of an auxiliary classifier h on concatenated intermediate features f_T, mean over the batch (Chen
    2023, L_H); h itself minimises KL(T/τ ‖ h(f_T)/τ) on the images that the student learns from (L_KD-h).

    The paper does not state the features and h; these are ours: the channel means of all BatchNorm inputs, each minus
    its running mean and divided by its running deviation; h is one linear layer that starts at 0, so that only the
    other losses steer the images of the first round. `own_argmax` is for methods without intended classes.
    Raises `BadInput` for a temperature that is not above 0.
    """
    require_positive("temperature", temperature)
    head = AuxiliaryHead(temperature=temperature, own_argmax=own_argmax)
    wants = (Want.MOMENTS,) if own_argmax else (Want.MOMENTS, Want.LABELS)
    return Loss("auxiliary_head", head, wants=wants, learns_with_student=True)


# Maximum number of units in the hidden layer. As coded it is the number of features: 688 for ResNet-20, but 26,560 for
# ResNet-50, which would need 700 million weights.
HIDDEN = 1024


class Contrast(nn.Module):
    """Contrasts images by their features: the two views of an image should be alike, and unlike the views of all other
    images of the batch and of earlier batches. `memory` `(2, slots, batch, features)` holds the features of both views
    of earlier batches.

    Every call writes into one slot of the memory, which is excluded from the comparison; after `steps` calls the next
    slot is used. A batch thus leaves the features of its last step.
    """

    memory: Tensor
    filled: Tensor
    calls: Tensor

    def __init__(
        self, *, temperature: float, units: int, remembered: int, batch_size: int, steps: int, features: int = 0
    ) -> None:
        super().__init__()
        self._settings = {
            "temperature": temperature,
            "units": units,
            "remembered": remembered,
            "batch_size": batch_size,
            "steps": steps,
        }
        self._temperature, self._steps = temperature, max(1, steps)
        slots = 1 + max(1, round(remembered / batch_size))  # One more, for the present batch, which is not compared.
        hidden = min(features, HIDDEN)
        draw = generator("head", features, units)
        self.hidden = nn.Parameter(_uniform((hidden, features), draw))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.head = nn.Parameter(_uniform((units, hidden), draw))
        self.head_bias = nn.Parameter(torch.zeros(units))
        self.register_buffer("memory", torch.zeros(2, slots, batch_size, features))
        self.register_buffer("filled", torch.zeros(slots))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def sized_for(self, teacher: Classifier) -> Contrast:
        """A module with a head and a memory for this teacher's features."""
        return Contrast(**self._settings, features=feature_count(teacher))  # type: ignore[arg-type]

    def forward(self, trace: Trace) -> Tensor:
        """The loss of a batch whose transforms show first the global views and then the local views."""
        features = trace.features()
        size, slots = len(features) // 2, len(self.filled)
        views = features.view(2, size, -1)
        slot = (self.calls // self._steps) % slots
        looked_at = self.filled * (torch.arange(slots, device=slot.device) != slot)
        rows = self.memory.shape[2]
        known = looked_at[:, None].expand(slots, rows).flatten()
        every = torch.cat([views, self.memory.flatten(1, 2)], 1)
        of_globals, of_locals = self._projected(every)
        similarity = of_locals @ of_globals.detach().T / self._temperature
        counted = torch.cat([known.new_ones(size), known])
        similarity = similarity.masked_fill(counted[None] == 0, -torch.inf)
        # Rows that do not count get finite logits, and then a weight of 0.
        similarity = torch.where(counted[:, None] == 0, torch.zeros_like(similarity), similarity)
        alone = F.cross_entropy(similarity, torch.arange(len(counted), device=slot.device), reduction="none")
        remembered = (alone * counted)[size:].sum() / known.sum().clamp_min(1)
        self._remember(views.detach(), slot)
        return alone[:size].mean() + remembered

    def _projected(self, features: Tensor) -> Tensor:
        """Unit vectors `(2, N, units)`."""
        hidden = F.relu(F.linear(features, self.hidden, self.hidden_bias))
        return F.normalize(F.linear(hidden, self.head, self.head_bias), dim=2)

    @torch.no_grad()
    def _remember(self, views: Tensor, slot: Tensor) -> None:
        """Write a batch's views into its slot: at most as many as fit; further rows of the slot stay as they were."""
        rows = min(views.shape[1], self.memory.shape[2])
        index = slot.view(1)
        kept = self.memory[:, :, :rows].index_copy(1, index, views[:, None, :rows])
        self.memory[:, :, :rows].copy_(kept)
        self.filled.index_fill_(0, index, 1.0)
        self.calls.add_(1)


def _uniform(shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Weights of a linear layer, uniform in ±1/√inputs, which is torch's default initialisation."""
    bound = max(1, shape[1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


def contrast(
    *, batch_size: int, steps: int, temperature: float = 0.1, units: int = 128, remembered: int = 4096
) -> Loss:
    """−log softmax, at `temperature`, of the cosine between an image's local view and its global view, among the global
    views of the batch and of the `remembered` images before; mean over the batch + mean over the remembered images
    (Fang 2021, L_cr, as coded). Gradients pass through the local views.

    A head of two layers with `units` outputs makes the compared vectors from the channel means of all BatchNorm inputs
    (minus their running means and divided by their running deviations, which is ours). As coded, 4,096 images are drawn
    from a memory of 40,960 at every step; here all of the last 4,096 are compared. `steps` is a batch's number of
    steps.
    Raises `BadInput` for a temperature that is not above 0, and for fewer remembered images than a batch.
    """
    require_positive("temperature", temperature)
    if remembered < batch_size:
        raise BadInput(f"{remembered} remembered images are not one batch.", f"Use {batch_size} or more.")
    module = Contrast(temperature=temperature, units=units, remembered=remembered, batch_size=batch_size, steps=steps)
    return Loss("contrast", module, wants=(Want.MOMENTS,))


def feature_count(teacher: Classifier) -> int:
    """Number of features that `Trace.features` gives for an image. A layer that is skipped in evaluation counts 0
    times, a layer that runs twice counts twice.
    """
    recorder = HookRecorder(teacher.network, moments=True)
    with torch.no_grad(), evaluating(teacher):
        layers = recorder(torch.zeros(1, *teacher.card.input_size, device=teacher.mean.device)).layers
    return sum(layer.mean_error.shape[-1] for layer in layers)
