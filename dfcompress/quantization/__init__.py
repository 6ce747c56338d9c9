"""Few-bit networks. Names that options take are here, so that `--help` shows them without importing torch."""

from typing import Literal

InputRule = Literal["minmax", "percentile", "mse"]
WeightRule = Literal["minmax", "mse"]
WeightGridKind = Literal["auto", "symmetric", "asymmetric"]
