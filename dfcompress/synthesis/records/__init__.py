"""Activation records, which a model's owner can release beside the model: one file per family of records."""

FIXED_DROPOUT = "all-layers-dropout"
GAUSSIAN = ("top-layer", "all-layers", FIXED_DROPOUT)
SPECTRAL = ("spectral-all", "spectral-pairs")
BN_EQUIVALENT = "bn-equivalent"
KINDS = (*GAUSSIAN, *SPECTRAL, BN_EQUIVALENT)
