"""Pruning of channels: groups that are removed together (`groups`), the importance of channels (`importance`), the
number that stays (`budget`), and the refit of the pruned network (`repair`).

The values of options are defined here, so that `--help` shows them without importing torch.
"""

from typing import Literal

ImportanceName = Literal["auto", "taylor", "bn-scale", "magnitude", "fold", "random"]
Resource = Literal["flops", "parameters", "filters", "latency"]
