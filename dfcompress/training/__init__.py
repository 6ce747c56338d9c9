"""The training of a student. Names that options take are here, so that `--help` shows them without importing torch."""

from typing import Literal

OptimizerName = Literal["sgd", "adam", "adamw", "lamb"]
OptimizerBackend = Literal["auto", "torch", "apex"]

OF_FEATURES = ("feature", "attention", "iq")
OBJECTIVES = ("kd", "ce", "mse-logits", *OF_FEATURES)
