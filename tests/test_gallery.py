"""Other people's networks through the whole tool: saved, inspected, inverted, quantized, packed, exported, answered.

One small network for each layer that is out of the ordinary (`odd_networks.py`), and some architectures that are known
by name, at tiny sizes and at the precision that the machine prefers.
"""

from __future__ import annotations

import json
from pathlib import Path

import odd_networks
import pytest
import torch

from dfcompress import console
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.evaluation import onnx_check
from dfcompress.machine.execution import Compute
from dfcompress.models.architectures import named
from dfcompress.models.checkpoint import load
from dfcompress.quantization.calibration import Calibration
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.verbs import export as export_module
from dfcompress.verbs.export import export
from dfcompress.verbs.inspect import inspect
from dfcompress.verbs.invert import invert
from dfcompress.verbs.quantize import quantize

pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

AUTO = Compute(device="cpu", precision="auto", compile="off")
MADE = Synthesis(images=16, settings={"steps": 2, "batch_size": 8})
# Of the layers with weights, those that are not quantized.
IN_FLOAT = {
    "attention": {"between.module.attention": "MultiheadAttention"},
    "transformer": {"between.module.self_attn": "MultiheadAttention"},
    "conv1d": {"between.conv": "Conv1d"},
    "deconv": {"between": "ConvTranspose2d"},
    "timm_subclasses": {"between": "Conv2dSame"},
    "scaled_weights": {"between": "ScaledStdConv2d"},
}
# BatchNorms that see the outputs of several layers: in front of each of four layers, of the transition and at the end.
UNFOLDED = {"densenet": 6, "rows_of_tokens": 1}
UNUSED = {"spare": {"spare": 4 * (50 * 50 + 50)}, "auxiliary": {"auxiliary": 4 * (8 * 4 + 4)}}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(export_module, "CHECKED", 64)
    monkeypatch.setattr(onnx_check, "ROUNDS", 1)


@pytest.fixture
def said(capsys):
    """What was said on the error stream so far."""
    console.configure(console.NORMAL)
    yield lambda: capsys.readouterr().err
    console.configure(console.QUIET)


@pytest.mark.parametrize("name", odd_networks.NETWORKS)
def test_a_network_of_an_odd_layer_goes_through(name, tmp_path, said):
    file, arch = tmp_path / "net.pt", f"{odd_networks.__file__}:{name}"
    torch.save(odd_networks.trained(name).state_dict(), file)
    left, unused, batchnorms = go_through(file, arch, odd_networks.SIZE, tmp_path / "out")
    assert left == IN_FLOAT.get(name, {})
    assert unused == UNUSED.get(name, {})
    notices = said()
    for layer, kind in left.items():
        assert f"Layer {layer} is a {kind}, which cannot be quantized" in notices
    for module, count in unused.items():
        assert f"Evaluation does not use {module} ({count:,} bytes)" in notices
    if name != "scattered":  # The only one that autocast cannot help, where the processor has bf16.
        assert "It runs in fp32." not in notices
    assert batchnorms == UNFOLDED.get(name, 0)


LARGE = (pytest.param(name, marks=pytest.mark.release) for name in ("mobilenet_v2", "shufflenet_v2_x0_5"))
KNOWN = (*LARGE, "timm:test_efficientnet")


@pytest.mark.parametrize("name", KNOWN)
def test_a_network_that_is_known_by_name_goes_through(name, tmp_path):
    torch.manual_seed(0)
    size = (3, 32, 32)
    network = odd_networks.settled(named(name).make(odd_networks.CLASSES, 3), size)
    file = tmp_path / "net.pt"
    torch.save(network.state_dict(), file)
    left, unused, batchnorms = go_through(file, name, size, tmp_path / "out")
    assert (left, unused, batchnorms) == ({}, {}, 0)


def go_through(
    file: Path, arch: str, size: tuple[int, int, int], output: Path
) -> tuple[dict[str, str], dict[str, int], int]:
    """What is left in float, what is not used, and how many BatchNorms there are in the ONNX file."""
    teacher = load(file, arch=arch, input_size=size)
    told = inspect(teacher)
    assert (told.classes, told.input_size) == (odd_networks.CLASSES, size)
    invert(teacher, output=output / "images", synthesis=MADE, compute=AUTO)
    assert SyntheticSet(output / "images").images.float().std() > 0
    quantize(
        teacher,
        bits="4w4a",
        data=output / "images",
        output=output / "packed",
        finetune="lsq",
        training={"steps": 2, "batch_size": 8},
        calibration=Calibration(steps=1),
        compute=AUTO,
    )
    packed = load(output / "packed", arch=arch)
    assert packed(torch.rand(2, *size)).isfinite().all()
    exported = export(packed, output=output / "model.onnx")
    assert exported.equal >= 0.95 * exported.images
    report = json.loads((output / "packed" / "quantization.json").read_text())
    assert all(row["signal_to_noise"] is None or row["signal_to_noise"] > 0 for row in report["layers"])
    operations = [node.op_type for node in onnx.load(output / "model.onnx").graph.node]
    return report["left_in_float"], report["unused_bytes"], operations.count("BatchNormalization")
