"""Rules for the ranges of quantized layers, one file each; the folder is the registry of `--calibrate` and
`--weight-ranges`.

A rule's file defines `Observer` and `weight_shares`. `Observer.observe(activations)` takes the inputs of one layer,
batch by batch, and `Observer.range(bits=, signed=)` then returns the ends of a grid for them. `weight_shares` returns
the shares of each output channel's lowest and highest weight that a grid covers.
"""

import pkgutil


def range_rules() -> list[str]:
    """The names of all rules, as the options take them; no rule is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
