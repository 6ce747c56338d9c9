"""Comparison of an ONNX file with the model it was exported from: predictions, size, and speed in onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfcompress import console
from dfcompress.errors import DfcompressError
from dfcompress.machine.memory import PIXELS
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.fake_quantizers import tensor_grids
from dfcompress.models.safe_reading import file_bytes

# Session options of onnxruntime. This one computes exactly as the file states, in floating point between the
# quantizers; by default quantized operations are rewritten for integer kernels.
EXACT = "session.disable_quant_qdq"
# This one makes weights unsigned. The sums of their products are exact also on x86 processors without VNNI, which add
# products of signed weights in 16 bits, where the sums saturate.
UNSATURATED = "session.x64quantprecision"
BATCH = 256
TIMED = 64
ROUNDS = 5


@dataclass(frozen=True)
class Exported:
    """An ONNX file at `path` for a `target`, and its comparison with the model it was exported from.

    `equal` is the number of the `images` for which model and file have the same best class, with the file computed
    exactly as it states; `median_difference` and `largest_difference` are the absolute differences of the logits.
    `equal_rewritten` is the same number with onnxruntime's default rewriting of quantized operations, which rounds
    differently. `equal_unsaturated` is the same number with this rewriting and `session.x64quantprecision=1`, for a
    model with grids on all tensors. Both are None where the file does not load with these options.
    `bytes` is the size of the file, and `bytes_ratio` its share of the checkpoint's size. `milliseconds` is the time of
    64 images in onnxruntime on one thread, with the rewriting if the file loads with it, and unsaturated if the model
    `saturates`. `milliseconds_fp32` is the time of the network in float, measured in the same rounds (None where the
    file itself is in float).
    """

    path: str
    target: str
    bytes: int
    bytes_ratio: float | None
    images: int
    equal: int
    equal_rewritten: int | None
    median_difference: float
    largest_difference: float
    milliseconds: float
    milliseconds_fp32: float | None
    equal_unsaturated: int | None = None  # Not recorded by earlier versions.

    @property
    def saturates(self) -> bool:
        """Whether `session.x64quantprecision=1` makes more predictions equal than default options on this processor."""
        if self.equal_rewritten is None or self.equal_unsaturated is None:
            return False
        return self.equal_unsaturated > self.equal_rewritten

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


def compare(classifier: Classifier, path: Path, fp32: Path | None, images: Tensor, *, target: str) -> Exported:
    """Compare the outputs of the model and of the ONNX file at `path` on `images` `(N, C, H, W)` in [0, 1], and time
    the file, beside the ONNX file `fp32` if there is one.

    Raises `DfcompressError` where onnxruntime cannot load a file.
    """
    expected = _answers(classifier, images)
    exact, usual, unsaturated = Session(path, EXACT), _usual(path), _unsaturated(classifier, path)
    answers = exact(images)
    different = (answers - expected).abs()
    whole = file_bytes(classifier.path) if classifier.path else None
    found = Exported(
        path=str(path),
        target=target,
        bytes=path.stat().st_size,
        bytes_ratio=round(path.stat().st_size / whole, 4) if whole else None,
        images=len(images),
        equal=_equal(answers, expected),
        equal_rewritten=_equal(usual(images), expected) if usual else None,
        equal_unsaturated=_equal(unsaturated(images), expected) if unsaturated else None,
        median_difference=different.median().item(),
        largest_difference=different.max().item(),
        milliseconds=0,
        milliseconds_fp32=None,
    )
    timed = (unsaturated if found.saturates else usual) or exact
    milliseconds, *milliseconds_fp32 = _milliseconds([timed, Session(fp32)] if fp32 else [timed], images)
    return replace(found, milliseconds=milliseconds, milliseconds_fp32=next(iter(milliseconds_fp32), None))


def _usual(path: Path) -> Session | None:
    """The file with onnxruntime's default rewriting; None where that fails, as with 2 bits."""
    try:
        return Session(path)
    except DfcompressError as error:
        console.notice(f"The file needs the session option {EXACT}=1. Without it: {error.problem}")
        return None


def _unsaturated(classifier: Classifier, path: Path) -> Session | None:
    """The file with rewriting but without saturation. None where the model has no grids on all tensors, so that
    onnxruntime computes in floating point, and where the file does not load so, as with a layer that is used twice.
    """
    if not tensor_grids(classifier.network):
        return None
    try:
        return Session(path, UNSATURATED)
    except DfcompressError:
        return None


class Session:
    """An ONNX file in onnxruntime, on one thread of the CPU, with default options or with one `option` set to 1.

    Raises `DfcompressError` where onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, option: str | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        if option:
            options.add_session_config_entry(option, "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # Onnxruntime's exceptions have no other common class.
            said = str(error).replace(str(path), "the file")  # The file may have a temporary name.
            raise DfcompressError(f"onnxruntime cannot load the file: {said}", "Use the model without ONNX.") from error

    def __call__(self, images: Tensor) -> Tensor:
        """The logits `(N, classes)` of images `(N, C, H, W)` in [0, 1]."""
        return torch.cat([torch.from_numpy(self._run(some)) for some in images.split(_at_once(images))])

    def _run(self, images: Tensor) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._session.run(None, {self._session.get_inputs()[0].name: images.numpy()})[0]
        return logits


def _milliseconds(sessions: Sequence[Session], images: Tensor) -> list[float]:
    """The least milliseconds of 64 images in each session over `ROUNDS` rounds. Each round runs all sessions, so that a
    busy machine slows all of them.
    """
    few = images[torch.arange(TIMED) % len(images)]
    seconds: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session(few)
    for _ in range(ROUNDS):
        for session, found in zip(sessions, seconds, strict=True):
            started = time.perf_counter()
            session(few)
            found.append(time.perf_counter() - started)
    return [round(1000 * min(found), 2) for found in seconds]


@torch.no_grad()
def _answers(classifier: Classifier, images: Tensor) -> Tensor:
    with exact_fp32(), evaluating(classifier):
        return torch.cat([classifier(some.to(classifier.mean.device)).cpu() for some in images.split(_at_once(images))])


def _at_once(images: Tensor) -> int:
    """The number of images in a pass: more pixels are not faster on a CPU, and onnxruntime keeps the memory of its
    largest pass.
    """
    return min(BATCH, max(1, PIXELS // images[0, 0].numel()))


def _equal(one: Tensor, other: Tensor) -> int:
    return int((one.argmax(1) == other.argmax(1)).sum())
