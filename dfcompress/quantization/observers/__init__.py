"""One file a rule for ranges of quantized layers; the folder is the registry of `--calibrate` and `--weight-ranges`.

A rule's file holds `Observer`, whose `observe(activations)` is shown the inputs of one layer batch by batch and whose
`range(bits=, signed=)` then gives the ends of a grid for them, and `weight_shares`, the shares of each output channel's
lowest and highest weight that a grid covers.
"""

import pkgutil


def range_rules() -> list[str]:
    """All rules, as the options take them; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
