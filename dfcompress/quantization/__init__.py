"""Quantization. The values of options are defined here, so that `--help` shows them without importing torch."""

from typing import Literal

WeightGridKind = Literal["auto", "symmetric", "asymmetric"]
Placement = Literal["all-tensors", "layer-inputs"]
