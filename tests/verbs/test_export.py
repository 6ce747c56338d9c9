"""Networks of many kinds go through quantize → pack → load → ONNX → onnxruntime and keep their answers."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from uneven_networks import UNEVEN, uneven

from dfcompress.cli import run
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.evaluation import onnx_check
from dfcompress.evaluation.onnx_check import Exported, Session
from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers
from dfcompress.models.grids import WIDTHS, Scheme
from dfcompress.models.saving import save
from dfcompress.models.tensor_grids import as_kernels_compute, quantize_tensors
from dfcompress.quantization import onnx as onnx_writer
from dfcompress.quantization.bits import Bits, assign, layers_of, parse_bits
from dfcompress.quantization.ranges import calibrate, fit_weights
from dfcompress.verbs import export as export_module
from dfcompress.verbs.evaluate import evaluate
from dfcompress.verbs.export import export, rehearse, require_kernels, require_packages

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
    monkeypatch.setattr(export_module, "CHECKED", 256)
    monkeypatch.setattr(onnx_check, "ROUNDS", 1)


def with_statistics(classifier: Classifier, images: Tensor) -> Classifier:
    """Random weights whose BatchNorms have the statistics that the images give."""
    for module in classifier.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.5
    with torch.no_grad():
        classifier.train()
        for _ in range(8):
            classifier(images)
    return classifier.frozen()


def classifier_of(architecture: str, size: int, channels: int = 3, classes: int = 10) -> Classifier:
    torch.manual_seed(0)
    network = named(architecture).make(classes, channels)
    card = ModelCard(architecture, classes, (channels, size, size), (0.45,) * channels, (0.25,) * channels)
    return with_statistics(Classifier(network, card), pictures(channels, size, 32))


def pictures(channels: int, size: int, count: int) -> Tensor:
    """Smooth random images."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def quantized(
    classifier: Classifier, bits: str, *, ends: int | None = 8, signed: bool = False, asymmetric: Collection[int] = ()
) -> Classifier:
    student = copy.deepcopy(classifier)
    asked = assign(layers_of(classifier).quantizable, parse_bits(bits), ends=ends, layer_bits={})
    widths = {name: (each.weights, each.activations) for name, each in asked.items()}
    quantize_layers(student.network, widths, asymmetric=asymmetric)
    fit_weights(student, rule="mse")
    channels, size, _ = classifier.card.input_size
    calibrate(student, [pictures(channels, size, 32)], signed=signed)
    freeze(student.network)
    return student


def through(classifier: Classifier, folder: Path) -> tuple[Classifier, Exported]:
    """Packed, loaded and exported."""
    save(classifier, folder)
    loaded = load(folder)
    return loaded, export(loaded, output=folder / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        pytest.param("mobilenet_v2", 32, marks=pytest.mark.release),
        pytest.param("resnet18", 32, marks=pytest.mark.release),
        pytest.param("timm:efficientnet_lite0", 32, marks=pytest.mark.release),
        ("squeezenet1_1", 48),
        pytest.param("mobilenet_v3_small", 32, marks=pytest.mark.release),
    ],
)
@torch.no_grad()
def test_a_network_goes_through_the_whole_chain(architecture, size, tmp_path):
    classifier = classifier_of(architecture, size)
    student = quantized(classifier, "4w8a")
    loaded, exported = through(student, tmp_path)
    images = pictures(3, size, 8)
    assert torch.equal(loaded(images), student(images))
    assert exported.equal >= 0.98 * exported.images
    assert exported.median_difference < 0.02 * student(images).std()
    assert exported.bytes < 0.25 * 4 * sum(parameter.numel() for parameter in classifier.network.parameters())


@pytest.mark.parametrize(
    "name", [next(iter(UNEVEN)), *(pytest.param(n, marks=pytest.mark.slow) for n in [*UNEVEN][1:])]
)
@torch.no_grad()
def test_uneven_widths_go_through_the_whole_chain_to_an_evaluation(name, tmp_path):
    classifier = uneven(name)
    student = quantized(classifier, "4w4a", ends=None)
    loaded, exported = through(student, tmp_path / "student")
    images = pictures(classifier.card.input_size[0], 32, 64)
    assert torch.equal(loaded(images), student(images))
    assert exported.equal >= 0.98 * exported.images
    save(classifier, tmp_path / "teacher")
    pixels = (images * 255).round().byte()
    labels = classifier(pixels / 255).argmax(1)
    np.savez(tmp_path / "images.npz", images=pixels.numpy(), labels=labels.numpy())
    found = evaluate([tmp_path / "teacher", tmp_path / "student"], data=tmp_path / "images.npz", device="cpu")
    teacher, student_row = found.results
    assert teacher.correct == 64
    assert student_row.correct == (loaded(pixels / 255).argmax(1) == labels).sum()


SYMMETRIC = [(bits, ()) for bits in ("2w2a", "2w4a", "4w2a", "3w3a", "4w4a", "5w6a", "8w8a", "4w32a")]
ASYMMETRIC = [(bits, WIDTHS) for bits in ("2w4a", "3w8a", "4w4a", "5w8a", "8w8a")]


@pytest.mark.parametrize(("bits", "asymmetric"), [*SYMMETRIC, *ASYMMETRIC])
def test_every_width_is_exported_and_answers_alike(bits, asymmetric, tmp_path):
    student = quantized(classifier_of("lenet5_bn", 32), bits, ends=None, asymmetric=asymmetric)
    _, exported = through(student, tmp_path)
    assert exported.images == 64
    assert exported.equal >= 63
    # Sums are taken in another order, so that a few values fall on the other side of a grid's edge.
    assert exported.median_difference < 0.02 * student(pictures(3, 32, 32)).std()
    assert exported.milliseconds > 0 < exported.milliseconds_fp32


class Bounded(nn.Module):
    """Operations that bound activations, before quantized layers at once or with other operations between."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(ins, 8, 3, padding=1) for ins in (3, 8, 8, 8))
        self.six, self.hard, self.pool = nn.ReLU6(), nn.Hardtanh(-2, 2), nn.MaxPool2d(2)
        self.head, self.more = nn.Linear(8 * 4 * 4, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.six(self.convs[0](images))
        features = self.hard(self.convs[1](features)).clamp(min=-1)
        features = self.pool(self.six(self.convs[2](features)))
        features = self.pool(self.convs[3](features)).clamp(max=1.5)
        return self.more(self.six(self.head(features.flatten(1)))).clamp(-50, 50)


@pytest.mark.parametrize(("bits", "kind"), [("4w4a", "UINT4"), ("4w4a", "INT4"), ("4w2a", "UINT2"), ("4w3a", "UINT8")])
@torch.no_grad()
def test_bounded_activations_go_into_quantizers_of_few_bits(bits, kind, tmp_path):
    """A ReLU6 before a 4-bit quantizer made a file that onnxruntime cannot load."""
    torch.manual_seed(0)
    classifier = Classifier(Bounded(), ModelCard("bounded", 4, (3, 16, 16), (0.5,) * 3, (0.1,) * 3)).frozen()
    student = quantized(classifier, bits, ends=None, signed=kind.startswith("INT"))
    exported = export(student, output=tmp_path / "model.onnx")
    assert exported.equal >= 0.98 * exported.images
    assert exported.median_difference < 0.02 * student(pictures(3, 16, 8)).std()
    graph = onnx.load(tmp_path / "model.onnx").graph
    zeros = {constant.data_type for constant in zero_points(graph)}
    assert zeros == {getattr(onnx.TensorProto, kind)}


def zero_points(graph) -> list:
    """Of all QuantizeLinear, as tensors."""
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in graph.initializer}
    return [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize(("asymmetric", "kind"), [((), "INT"), (WIDTHS, "UINT")])
def test_integers_are_stored_at_their_true_width(asymmetric, kind, tmp_path):
    classifier = classifier_of("lenet5_bn", 32)
    sizes = {}
    for bits in ("2w8a", "4w8a", "8w8a"):
        _, exported = through(quantized(classifier, bits, ends=None, asymmetric=asymmetric), tmp_path / bits)
        sizes[bits] = exported.bytes
        assert exported.bytes_ratio < 1.1
        model = onnx.load(exported.path)
        kinds = {each.data_type for each in model.graph.initializer if each.name.endswith("integers")}
        assert kinds == {getattr(onnx.TensorProto, f"{kind}{bits[0]}")}
        zero_points = [each for each in model.graph.initializer if each.name.endswith("zero_point")]
        assert {each.data_type for each in zero_points} == (kinds if asymmetric else set())
        assert len(zero_points) == (5 if asymmetric else 0)
        onnx.checker.check_model(model, full_check=True)
    weights = sum(p.numel() for p in classifier.network.parameters() if p.dim() > 1)
    assert sizes["8w8a"] - sizes["4w8a"] == pytest.approx(weights / 2, rel=0.01)
    assert sizes["4w8a"] - sizes["2w8a"] == pytest.approx(weights / 4, rel=0.01)


def test_the_file_tells_no_path_folds_batchnorm_and_takes_any_number_of_images(tmp_path):
    _, exported = through(quantized(classifier_of("cifar_resnet20", 32), "4w4a"), tmp_path)
    content = Path(exported.path).read_bytes()
    for part in (str(tmp_path), str(Path(export_module.__file__).parents[2]), "site-packages", ".py"):
        assert part.encode() not in content
    model = onnx.load(exported.path)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [each.name for each in model.graph.input] == ["images"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        assert session.run(None, {"images": pictures(3, 32, count).numpy()})[0].shape == (count, 10)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["input_size"]) == [3, 32, 32]
    assert "[0, 1]" in told["input"]


def test_a_float_model_is_exported_too(tmp_path):
    _, exported = through(classifier_of("lenet5_bn", 32, channels=1), tmp_path)
    assert exported.equal == exported.equal_rewritten == exported.images
    assert exported.milliseconds > 0
    assert exported.milliseconds_fp32 is None, "it would be timed against itself"
    assert exported.largest_difference < 1e-3


def test_a_float_network_too_large_for_onnx_is_no_reference_and_is_refused(tmp_path, monkeypatch):
    """As RegNetY-128GF: 2.6 GB in fp32, and 0.65 GB with weights of 8 bits."""
    teacher = classifier_of("lenet5_bn", 32, channels=1)
    save(quantized(teacher, "8w8a"), tmp_path / "packed")
    monkeypatch.setattr(export_module, "LARGEST", 100_000)
    monkeypatch.setattr(onnx_writer, "LARGEST", 100_000)
    exported = export(tmp_path / "packed", output=tmp_path / "packed.onnx")
    assert exported.equal == exported.images
    assert exported.milliseconds_fp32 is None
    with pytest.raises(DfcompressError, match=r"takes 24.,... bytes, and an ONNX file can hold 2 GiB"):
        export(teacher, output=tmp_path / "float.onnx")
    assert not (tmp_path / "float.onnx").exists()


@pytest.mark.parametrize("placed", [False, True], ids=["layer inputs", "all tensors"])
def test_tensorrt_takes_signed_eight_bits(placed, tmp_path):
    classifier = classifier_of("cifar_resnet20", 32)
    student = int8_on_all_tensors(classifier, signed=True) if placed else quantized(classifier, "8w8a", signed=True)
    save(student, tmp_path)
    exported = export(tmp_path, target="tensorrt")
    assert exported.equal >= 63
    model = onnx.load(exported.path)
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.name == "value"]
    points = [each for each in [*model.graph.initializer, *constants] if each.data_type in (2, 3) and not each.dims]
    assert points
    assert all(each.data_type == onnx.TensorProto.INT8 for each in points)
    assert all(onnx.numpy_helper.to_array(each) == 0 for each in points)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("4w8a", "kernels for int8 alone"),
        ("8w8a", "Activations have zero points, which TensorRT does not take"),
        ("8w8a, asymmetric", "Weights have zero points.*--weight-grid symmetric"),
    ],
)
def test_tensorrt_refuses_the_rest_with_the_reason(bits, message, tmp_path):
    width, _, asymmetric = bits.partition(", ")
    kinds = WIDTHS if asymmetric else ()
    save(quantized(classifier_of("cifar_resnet20", 32), width, signed=bool(kinds), asymmetric=kinds), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=message):
        export(tmp_path, target="tensorrt")
    assert sorted(tmp_path.iterdir()) == before


def test_the_model_itself_is_never_replaced(tmp_path):
    save(classifier_of("lenet5_bn", 32, channels=1), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="is the model itself"):
        export(tmp_path, output=tmp_path / "model.safetensors", overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    save(classifier_of("lenet5_bn", 32, channels=1), tmp_path)
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(BadInput, match="exists"):
        export(tmp_path)
    assert (tmp_path / "model.onnx").read_text() == "mine"
    export(tmp_path, overwrite=True)
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_file_that_onnxruntime_refuses_is_not_left(tmp_path, monkeypatch):
    save(classifier_of("lenet5_bn", 32, channels=1), tmp_path)
    before = sorted(tmp_path.iterdir())

    def refuse(*arguments: object, **options: object) -> None:
        raise DfcompressError("onnxruntime cannot load it", "Use the model without ONNX.")

    monkeypatch.setattr(onnx_check, "Session", refuse)
    with pytest.raises(DfcompressError, match="cannot load"):
        export(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_packages_nothing_is_begun(monkeypatch):
    monkeypatch.setattr(export_module, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(BadInput, match=r"needs no_such_package\. Install them with: pip install 'dfcompress\[onnx\]'"):
        require_packages()


def test_an_unknown_target_is_refused():
    with pytest.raises(BadInput, match=r"target='tflite' is not a valid argument of export. Give 'onnxruntime'"):
        export("model.pt", target="tflite")


def test_what_the_exporter_cannot_trace_is_one_sentence(tmp_path):
    class Undecided(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, images):
            return self.layer(images.flatten(1)) * (2 if images.mean() > 0.123 else 1)

    classifier = Classifier(Undecided(), ModelCard("test", 4, (3, 2, 2), (0.5,) * 3, (0.5,) * 3), name="odd").frozen()
    with pytest.raises(DfcompressError, match="odd cannot be exported"):
        rehearse(classifier, {"layer": Bits(4, 8)}, Scheme())


def test_float_activations_suit_tensorrt_signed_or_not():
    require_kernels("tensorrt", {"conv": (8, 32)}, Scheme())


class Twice(nn.Module):
    """One convolution under two names, run by both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first = self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(images))).mean((2, 3)))


def test_a_layer_under_two_names_is_exported_once_at_its_width(tmp_path):
    torch.manual_seed(0)
    card = ModelCard("twice", 10, (3, 16, 16), (0.45,) * 3, (0.25,) * 3)
    student = quantized(Classifier(Twice(), card, name="twice").frozen(), "4w8a")
    measured = export(student, output=tmp_path / "model.onnx")
    assert measured.equal == measured.images
    kept = [tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if "integers" in tensor.name]
    assert [tensor.data_type for tensor in kept].count(onnx.TensorProto.INT4) == 1
    assert len(kept) == 3


def int8_on_all_tensors(classifier: Classifier, *, signed: bool = False, weights: int = 8) -> Classifier:
    student = copy.deepcopy(classifier)
    as_kernels_compute(student)
    layers = layers_of(student).quantizable
    assert quantize_tensors(student, layers) == []
    quantize_layers(student.network, dict.fromkeys(layers, (weights, 8)))
    fit_weights(student, rule="mse")
    channels, size, _ = classifier.card.input_size
    calibrate(student, [pictures(channels, size, 32)], signed=signed)
    freeze(student.network)
    return student


def operations_after_rewriting(path: Path, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a file with default options, by how often."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


# The floating-point operations of an image's way in and out, and those that no kernel for integers takes.
AROUND = {"Sub", "Div", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Flatten"}


@pytest.mark.parametrize(
    ("architecture", "size", "others"),
    [
        ("cifar_resnet20", 32, {"Slice", "Pad", "GlobalAveragePool"}),
        pytest.param("resnet18", 32, {"NhwcMaxPool"}, marks=pytest.mark.release),
        pytest.param("mobilenet_v2", 32, set(), marks=pytest.mark.release),
        pytest.param("timm:tf_efficientnet_lite0", 64, set(), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_with_grids_on_all_tensors_default_options_leave_kernels_for_integers_alone(
    architecture, size, others, tmp_path
):
    student = int8_on_all_tensors(classifier_of(architecture, size))
    loaded, exported = through(student, tmp_path)
    images = pictures(3, size, 8)
    assert torch.equal(loaded(images), student(images))
    assert exported.equal >= 0.98 * exported.images
    assert exported.equal_unsaturated >= 0.98 * exported.images
    operations = operations_after_rewriting(Path(exported.path), tmp_path)
    assert {each for each in operations if not each.startswith(("QLinear", "QGemm"))} <= AROUND | others
    assert operations["QLinearConv"] == sum(isinstance(layer, nn.Conv2d) for layer in student.network.modules())


@torch.no_grad()
def test_sums_of_seven_bit_weights_saturate_on_no_processor(tmp_path):
    student = int8_on_all_tensors(classifier_of("lenet5_bn", 32), weights=7)
    _, exported = through(student, tmp_path)
    for equal in (exported.equal_rewritten, exported.equal_unsaturated, exported.equal):
        assert equal >= 0.98 * exported.images
    assert operations_after_rewriting(Path(exported.path), tmp_path)["QLinearConv"] == 2


def test_equal_zero_points_are_kept_once_for_each_weight(tmp_path):
    student = int8_on_all_tensors(classifier_of("cifar_resnet20", 32))
    _, exported = through(student, tmp_path)
    assert exported.equal_unsaturated, "onnxruntime loads no file in which weights share them"
    weights = [node for node in onnx.load(exported.path).graph.node if node.input[0].endswith(".integers")]
    assert len(weights) == 20 == len({node.input[2] for node in weights})


def test_a_comparison_of_an_earlier_version_is_read(tmp_path):
    _, exported = through(classifier_of("lenet5_bn", 32, channels=1), tmp_path)
    told = exported.to_json()
    del told["equal_unsaturated"]
    assert Exported(**told) == exported
    assert not exported.saturates


def test_where_default_options_saturate_the_command_says_what_to_set(monkeypatch, tmp_path, capsys):
    student = int8_on_all_tensors(classifier_of("lenet5_bn", 32))
    save(student, tmp_path)
    monkeypatch.setattr(onnx_check, "_usual", lambda path: lambda images: -Session(path)(images))
    assert run(["export", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search("as sums saturate on this processor; with session.x64quantprecision=1: 6[0-4];", said)


@torch.no_grad()
def test_openvino_answers_alike(tmp_path):
    openvino = pytest.importorskip("openvino")
    student = int8_on_all_tensors(classifier_of("lenet5_bn", 32), weights=7)  # Those of 8 saturate without VNNI.
    _, exported = through(student, tmp_path)
    compiled = openvino.Core().compile_model(exported.path, "CPU")
    images = pictures(3, 32, 64)
    answers = torch.from_numpy(compiled(images.numpy())[0])
    expected = student(images)
    assert (answers.argmax(1) == expected.argmax(1)).sum() >= 63
    assert (answers - expected).abs().median() < 0.02 * expected.std()
