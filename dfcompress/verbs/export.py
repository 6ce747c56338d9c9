"""`export`: a checkpoint in, an ONNX file out that was run in onnxruntime and compared with the checkpoint.

dfcompress.export("resnet20-4w4a")                      # resnet20-4w4a/model.onnx
dfcompress.export("resnet20-8w8a", target="tensorrt", output="resnet20.onnx")
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST, as_float
from dfcompress.errors import BadInput
from dfcompress.evaluation.onnx_check import BATCH, EXACT, Exported, Session, compare
from dfcompress.models.checkpoint import opened
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import FLOAT_BITS, in_float, quantized_layers
from dfcompress.models.grids import Scheme
from dfcompress.models.safe_reading import weights_files
from dfcompress.models.saving import state_bytes
from dfcompress.quantization.bits import Bits
from dfcompress.quantization.mixed_precision import uncalibrated
from dfcompress.quantization.onnx import LARGEST, write_onnx
from dfcompress.randomness import generator
from dfcompress.run import check_output_file, write_atomically
from dfcompress.synthesis.transfer_set import SYNTHETIC
from dfcompress.verbs import Target
from dfcompress.verbs._verb import verb

FILE = "model.onnx"
INT8, INT8_WEIGHTS = 8, (7, 8)
NAMES: Mapping[Target, str] = {"tensorrt": "TensorRT", "openvino": "OpenVINO"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED = 1024  # Maximum number of images on which the file and the model are compared.


@verb
def export(
    checkpoint: str | Path | Classifier,
    *,
    output: str | Path | None = None,
    target: Target = "onnxruntime",
    data: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a quantized or float model as ONNX, and compare the file with the model in onnxruntime.

    The ONNX model maps images `(N, C, H, W)` in [0, 1], for any N, to logits `(N, classes)`.

    - `checkpoint`: the model.
    - `output`: file to write. Default: `model.onnx` in the checkpoint's folder, or NAME.onnx beside the file NAME.pt.
      `overwrite`: replace an existing file.
    - `target`: runtime of the file. `openvino` requires weights of 7 or 8 bits, and activations of 8 bits or in float;
      `tensorrt` requires the same with no zero points (`quantize --bits 8w8a --signed`). Both run float layers, too.
    - `data`: images for the comparison, of which at most 1,024 are used. Default: the synthetic set that `quantize`
      left in the checkpoint's folder, else 256 images of noise with the mean and standard deviation of the card.

    Raises `BadInput` where a package is missing, the target cannot run the model, or `output` exists and `overwrite` is
    false, and `DfcompressError` where the model cannot be exported, or onnxruntime cannot load the file.
    """
    classifier = opened(checkpoint)
    require_packages()
    path = Path(output) if output else _beside(classifier)
    inputs = weights_files(classifier.path) if classifier.path else []
    check_output_file(path, example=FILE, overwrite=overwrite, inputs=inputs)
    return write_compared(classifier, path, _images(classifier, data), target=target)


def require_packages() -> None:
    """Raise `BadInput` where a package for the export is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"Export needs {', '.join(missing)}.", "Install them with: pip install 'dfcompress[onnx]'.")


def require_kernels(target: Target, bits: Mapping[str, tuple[int | None, int]], scheme: Scheme) -> None:
    """Raise `BadInput` where the target cannot run the layers.

    `bits`: bits of weights (None: not chosen yet) and of inputs of each layer. `scheme`: kinds of the grids;
    activations in float count as signed.
    """
    if target == "onnxruntime":
        return
    named = NAMES[target]
    for name, (weights, inputs) in bits.items():
        if weights not in INT8_WEIGHTS or inputs not in (INT8, FLOAT_BITS):
            found = f"weights of {weights or 'as yet unknown'} and inputs of {inputs} bits"
            raise BadInput(
                f"Layer {name} has {found}, and {named} has kernels for int8 alone.",
                "Use --bits 8w8a, or --target onnxruntime.",
            )
    if target == "openvino":
        return
    if {weights for weights, _ in bits.values()} & set(scheme.asymmetric):
        raise BadInput(
            "Weights have zero points, which TensorRT does not take.",
            "Quantize with --weight-grid symmetric, or use --target onnxruntime.",
        )
    if not scheme.signed and any(inputs == INT8 for _, inputs in bits.values()):
        raise BadInput(
            "Activations have zero points, which TensorRT does not take.",
            "Quantize with --signed, or use --target onnxruntime.",
        )


def rehearse(teacher: Classifier, bits: Mapping[str, Bits], scheme: Scheme) -> None:
    """Export a copy at these bits without calibration, to a temporary file.

    Raises `DfcompressError` where the network cannot be exported, or onnxruntime cannot load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        write_onnx(uncalibrated(teacher, bits, scheme), path)
        Session(path, EXACT)


def write_compared(
    classifier: Classifier, path: Path, images: Tensor, *, target: Target, beside: Classifier | None = None
) -> Exported:
    """Write the ONNX file `path` after comparing it with the classifier on `images` `(N, C, H, W)` in [0, 1].

    The file is timed against the float network of `beside`; without `beside`, a quantized classifier is timed against
    its own float network. A float network that is too large for ONNX is not timed.
    Raises `BadInput` as `require_kernels` does, and `DfcompressError` where onnxruntime cannot load the file.
    """
    layers = quantized_layers(classifier.network)
    signed = all(layer.input_grid is None or layer.input_grid.signed for layer in layers.values())
    asymmetric = {layer.weight_bits for layer in layers.values() if not layer.weight_grid.symmetric}
    bits = {name: (layer.weight_bits, layer.input_bits) for name, layer in layers.items()}
    require_kernels(target, bits, Scheme(signed, asymmetric))
    with tempfile.TemporaryDirectory() as folder, write_atomically(path) as written:
        reference = beside or (classifier if layers else None)
        fp32 = Path(folder) / FILE if reference and state_bytes(reference.network) < LARGEST else None
        if fp32 and reference:
            with in_float(reference.network):
                write_onnx(reference, fp32)
        write_onnx(classifier, written)
        return replace(compare(classifier, written, fp32, images, target=target), path=str(path))


def _beside(classifier: Classifier) -> Path:
    if classifier.path is None:
        raise BadInput(
            f"{classifier.name} was not read from a file, so there is no default place for the export.",
            "Name an output.",
        )
    return classifier.path / FILE if classifier.path.is_dir() else classifier.path.with_suffix(".onnx")


def _images(classifier: Classifier, data: str | Path | None) -> Tensor:
    """Images `(N, C, H, W)` in [0, 1] for the comparison, at most `CHECKED`."""
    made = classifier.path / SYNTHETIC if classifier.path else None
    if data is None and made is not None and (made / MANIFEST).exists():
        data = made
    if data is None:
        shape = (CHECKED // 4, *classifier.card.input_size)
        noise = torch.randn(shape, generator=generator("export")).to(classifier.mean.device)
        return classifier.denormalise(noise).clamp(0, 1).cpu()
    source = open_images(data, classifier.card)
    batches = source.batches(BATCH, every=max(1, len(source) // CHECKED))
    return torch.cat([images for images, _ in islice(batches, max(1, CHECKED // BATCH))])


def sampled(images: Tensor) -> Tensor:
    """At most `CHECKED` of the stored images, evenly spaced, as floats `(N, C, H, W)` in [0, 1]."""
    return as_float(images[:: -(-len(images) // CHECKED)])
