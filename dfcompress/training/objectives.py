"""What the student is asked to minimise; `0.9 * kd(4.0) + ...` becomes a list of named, weighted terms.

Nothing here sees a label: the teacher's answers are all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from dfcompress.errors import BadInput


@dataclass(frozen=True)
class Objective:
    """A named, weighted scalar of (student_logits, teacher_logits), each `(N, classes)`."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0

    def __rmul__(self, weight: float) -> Objective:
        return replace(self, weight=weight * self.weight)


def kd(temperature: float) -> Objective:
    """τ²·KL(p_T ‖ p_S) of the answers softened by τ, mean over the batch (Hinton et al. 2015).

    τ² keeps the gradient's size the same at every temperature. Raises `BadInput` where τ is not positive.
    """

    if not 0 < temperature < math.inf:
        raise BadInput(f"--temperature {temperature} is not positive.", "4 is usual.")

    def value(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student = (student_logits / temperature).log_softmax(1)
        teacher = (teacher_logits / temperature).log_softmax(1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2

    return Objective("kd", value)
