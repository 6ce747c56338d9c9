"""What the owner of a model can release beside it: one file a family of records."""

FIXED_DROPOUT = "all-layers-dropout"
GAUSSIAN = ("top-layer", "all-layers", FIXED_DROPOUT)
SPECTRAL = ("spectral-all", "spectral-pairs")
BN_EQUIVALENT = "bn-equivalent"
KINDS = (*GAUSSIAN, *SPECTRAL, BN_EQUIVALENT)
