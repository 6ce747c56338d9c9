"""Fewer channels: which go together (`groups`), which matter (`importance`), how many stay (`budget`), and what mends
the rest in seconds (`repair`).

Names that options take are here, so that `--help` shows them without importing torch.
"""

from typing import Literal

ImportanceName = Literal["auto", "taylor", "bn-scale", "magnitude", "fold", "random"]
Resource = Literal["flops", "parameters", "filters", "latency"]
