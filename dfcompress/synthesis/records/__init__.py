"""What the owner of a model can release beside it: one file a family of records."""

GAUSSIAN = ("top-layer", "all-layers", "all-layers-dropout")
SPECTRAL = ("spectral-all", "spectral-pairs")
BN_EQUIVALENT = "bn-equivalent"
KINDS = (*GAUSSIAN, *SPECTRAL, BN_EQUIVALENT)
