"""Damped balance (ours): ABD, but a tenth of the gradient of its balancing cross-entropy reaches the features.

Without any, as in ABD, the features never learn what tells new classes from old ones; with all of it they learn what
tells made images from real ones, and old classes are forgotten, the more the longer the training is. Measured on
training images of MNIST, a LeNet-5 of the digits 0 to 4 that learns 5 to 9 (old and new classes right, in %):

| steps | none | a tenth | three tenths | all |
|---|---|---|---|---|
| 300 | 97.2, 86.6 | 97.9, 90.0 | 96.7, 93.8 | 88.8, 96.7 |
| 600 | 96.1, 90.8 | 96.7, 94.4 | | |
| 900 | 97.4, 92.4 | | 88.8, 98.5 | |
"""

from __future__ import annotations

from functools import partial

from dfcompress.training.class_incremental.abd import AlwaysBeDreaming
from dfcompress.training.class_incremental.method import IncrementalMethod, usual_training

PASSED = 0.1

METHOD = IncrementalMethod(distiller=partial(AlwaysBeDreaming, passed=PASSED), training=usual_training())
