"""Sets of noise and of adversarial images, which show how a classifier responds to images unlike its training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dfcompress.data.batches import UNLABELLED
from dfcompress.errors import BadInput
from dfcompress.machine.memory import Taken, count_growth, images_at_once
from dfcompress.models.classifier import LARGEST_PASS, Classifier, evaluating
from dfcompress.randomness import generator


def noise(classifier: Classifier, images: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `images` noise images in all, N(0, 1) in the normalised space of a classifier, with the labels
    `UNLABELLED`. The images are the same in every call.
    """
    draw = generator("noise-set")
    for start in range(0, images, batch_size):
        count = min(batch_size, images - start)
        values = torch.randn(count, *classifier.card.input_size, generator=draw).to(classifier.mean.device)
        yield classifier.denormalise(values), torch.full((count,), UNLABELLED)


def attacked(
    classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]], epsilon: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `batches` after one step of the fast gradient sign method against a classifier in evaluation mode:
    x + ε σ sign(∂ cross-entropy / ∂x), clipped to [0, 1] (Goodfellow 2015).

    ε is in the classifier's normalised space, and σ is the std of its card. (Haroush 2020 states ε = 0.1, but not in
    which space. In the normalised space this raises J_KL of ResNet-44 2.7 times, in pixels of [0, 1] 12.0 times; the
    paper reports 3.3 times.)
    Where labels are `UNLABELLED`, the attack leads away from the classifier's own best class.
    Raises `BadInput` where no gradient passes through the classifier to the images.
    """
    fit = images_at_once(LARGEST_PASS, _bytes_a_gradient(classifier), target=classifier.mean.device)
    for images, labels in batches:
        parts = zip(images.split(fit), labels.split(fit), strict=True)
        signs = [_gradient(classifier, some.to(classifier.mean.device), truth).sign() for some, truth in parts]
        step = epsilon * classifier.std * torch.cat(signs)
        yield (images.to(step.device) + step).clamp(0, 1), labels


def require_gradient(classifier: Classifier) -> None:
    """Raise `BadInput` where no gradient passes through a classifier to its images, so that they cannot be attacked."""
    image = torch.zeros(1, *classifier.card.input_size, device=classifier.mean.device)
    with evaluating(classifier):
        _gradient(classifier, image, torch.full((1,), UNLABELLED))


def _bytes_a_gradient(classifier: Classifier) -> Taken:
    images = torch.zeros(4, *classifier.card.input_size, device=classifier.mean.device)
    labels = torch.full((4,), UNLABELLED)
    return count_growth(lambda count: _gradient(classifier, images[:count], labels[:count]))


def _gradient(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """∂ cross-entropy / ∂x of every image, up to a positive factor.

    The result is the gradient of m = log Σ_{j≠y} exp z_j − z_y. Cross-entropy is softplus(m), so its gradient has the
    same sign; but it is rounded to 0 where the classifier is confident.
    """
    with torch.enable_grad():
        moving = images.detach().requires_grad_()
        logits = classifier(moving)
        classes = torch.where(labels.to(logits.device) == UNLABELLED, logits.argmax(1), labels.to(logits.device))
        if not logits.requires_grad:
            raise BadInput(
                f"{classifier.name} passes no gradient to its images, so it cannot be attacked.",
                "Leave out fgsm: sets for it.",
            )
        places = classes[:, None]
        margins = logits.scatter(1, places, -torch.inf).logsumexp(1) - logits.gather(1, places)[:, 0]
        (gradient,) = torch.autograd.grad(margins.sum(), moving)
    return gradient
