"""Files from strangers: every layout of released weights is read, and nothing hostile runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.architectures import find
from dfcompress.models.safe_reading import file_bytes, read, serialised, sha256, weights_file


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return find("lenet5_bn").make(10, 1).eval()


def _same(found: dict[str, torch.Tensor], network: nn.Module) -> bool:
    expected = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt"])
def test_every_pickled_extension_is_read(suffix, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / f"net{suffix}")
    assert _same(read(tmp_path / f"net{suffix}").tensors, network)


def test_safetensors_is_read_whatever_its_extension(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "net.bin")
    assert _same(read(tmp_path / "net.bin").tensors, network)


def test_the_format_before_zip_is_read(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert _same(read(tmp_path / "net.pth").tensors, network)


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "ema", "my_net"]
)
def test_nested_weights_are_found(key, network, tmp_path):
    torch.save({"epoch": 3, "best": torch.tensor(0.9), key: network.state_dict()}, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, network)


def test_the_weights_come_before_their_average(network, tmp_path):
    average = {name: value * 0 for name, value in network.state_dict().items()}
    torch.save({"ema": average, "state_dict": network.state_dict()}, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, network)


def test_half_precision_weights_become_fp32(network, tmp_path):
    torch.save({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "net.pt")
    tensors = read(tmp_path / "net.pt").tensors
    assert tensors["conv1.weight"].dtype == torch.float32
    assert torch.equal(tensors["conv1.weight"], network.get_parameter("conv1.weight").half().float())


def test_weights_saved_on_a_gpu_are_read_on_a_machine_without_one(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "cpu.pt")
    with zipfile.ZipFile(tmp_path / "cpu.pt") as cpu, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as gpu:
        for name in cpu.namelist():
            # The device is a string of the pickle, X + length + text.
            content = cpu.read(name)
            gpu.writestr(name, content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert _same(read(tmp_path / "gpu.pt").tensors, network)


def test_training_arguments_beside_the_weights_do_no_harm(network, tmp_path):
    torch.save({"state_dict": network.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, network)


def test_a_pickled_module_of_ours_is_read_as_data(network, tmp_path):
    torch.save(network, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, network)


def test_a_pickled_module_of_the_old_format_is_refused_for_its_source_code(network, tmp_path):
    torch.save(network, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="carries source code"):
        read(tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "convnext_tiny"])
def test_pickled_modules_of_torchvision_are_read_as_data(name, tmp_path):
    module = find(name).make(10, 3)
    torch.save({"model": module}, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, module)


class Hooked(nn.Linear):
    pass


def test_hooks_that_a_pickled_module_brings_are_not_called(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    # functional.conv2d is on the short list; called as a hook of state_dict() it would raise.
    module._state_dict_hooks[0] = nn.functional.relu
    torch.save(module, tmp_path / "net.pt")
    assert sorted(read(tmp_path / "net.pt").tensors) == ["0.bias", "0.weight"]


class Malicious:
    """Unpickled by plain pickle, it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.proof}",)


def _zip_pickle(value: object, path: Path) -> None:
    torch.save(value, path)


def _old_pickle(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def _plain_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def _newest_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [_zip_pickle, _old_pickle, _plain_pickle, _newest_pickle])
def test_a_malicious_pickle_is_refused_and_does_nothing(write, tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "net.pt"
    write({"state_dict": {"weight": torch.zeros(2, 2)}, "payload": Malicious(proof)}, path)
    with pytest.raises(BadInput):
        read(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists(), "the payload does work where it is executed"


@pytest.mark.parametrize("write", [_zip_pickle, _old_pickle])
def test_the_refusal_names_what_the_pickle_asked_for(write, tmp_path):
    write({"payload": Malicious(tmp_path / "proof")}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=rf"asks for {os.system.__module__}\.system"):
        read(tmp_path / "net.pt")


def test_a_pickled_class_of_a_stranger_is_refused_by_name(tmp_path):
    torch.save(Hooked(2, 2), tmp_path / "net.pt")
    with pytest.raises(BadInput, match=rf"{__name__}\.Hooked"):
        read(tmp_path / "net.pt")


def test_a_torchscript_archive_is_refused_as_the_program_it_is(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript will go, in words that change
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "net.pt")
    with pytest.raises(BadInput, match="TorchScript"):
        read(tmp_path / "net.pt")


def _bytes(content: bytes) -> Callable[[Path, nn.Module], None]:
    return lambda path, network: path.write_bytes(content) and None


def _truncated(path: Path, network: nn.Module, *, zipped: bool) -> None:
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated_safetensors(path: Path, network: nn.Module) -> None:
    save_file(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign_zip(path: Path, network: nn.Module) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


def _with_value(value: float) -> Callable[[Path, nn.Module], None]:
    def write(path: Path, network: nn.Module) -> None:
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        state["fc1.weight"][3, 5] = value
        torch.save(state, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_bytes(b""), "is empty"),
        (_bytes(b"<html>404 Not Found</html>"), "is not a checkpoint: it begins with '<html>404 Not Found"),
        (_bytes(b"\xaeQ\xb7\x05\xd0;v\xd8"), "is not a checkpoint: it begins with the bytes ae 51 b7 05."),
        (_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is not a checkpoint: it begins with 'version https"),
        (lambda path, network: _truncated(path, network, zipped=True), "is cut short or damaged"),
        (lambda path, network: _truncated(path, network, zipped=False), "is cut short or damaged"),
        (_truncated_safetensors, "is cut short or damaged"),
        (_foreign_zip, "is a zip file that torch.save did not write"),
        (lambda path, network: torch.save({"epoch": 3}, path), "holds no state dict"),
        (lambda path, network: torch.save([1, 2], path), "holds no state dict"),
        (_with_value(float("nan")), "fc1.weight holds NaN or infinity"),
        (_with_value(float("inf")), "fc1.weight holds NaN or infinity"),
        (lambda path, network: torch.save({"w": torch.eye(3).to_sparse()}, path), "w is torch.sparse_coo"),
    ],
)
def test_what_cannot_be_read_is_named(write, message, network, tmp_path):
    write(tmp_path / "net.pt", network)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput) as refused:
        read(tmp_path / "net.pt")
    assert message in refused.value.problem
    assert refused.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_file_and_a_folder_without_a_model_are_named(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read(tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"a folder without model\.safetensors"):
        read(tmp_path)


def test_files_of_ours_that_are_no_models_are_called_what_they_are(tmp_path):
    (tmp_path / "run.json").write_text('{"verb": "quantize", "options": {}}')
    with pytest.raises(BadInput, match=r"a run that is not finished.*--resume"):
        read(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07")
    with pytest.raises(BadInput, match="is an ONNX file"):
        read(tmp_path / "model.onnx")
    np.savez(tmp_path / "test.npz", images=np.zeros((1, 1, 2, 2)))
    with pytest.raises(BadInput, match=r"holds arrays and no model.*--eval-data"):
        read(tmp_path / "test.npz")


def test_the_bytes_of_a_file_depend_on_its_content_alone(tmp_path):
    """The library itself writes metadata in any order, so one run in two would end in other bytes."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}
    metadata = {"format": "pt", "dfcompress": '{"name": "Ä \\u007f"}', "quantization": "{}"}
    written = {serialised(tensors, dict(order)) for order in permutations(metadata.items()) for _ in range(4)}
    assert len(written) == 1
    (tmp_path / "file.safetensors").write_bytes(written.pop())
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def _sharded(tensors: dict[str, torch.Tensor], folder: Path, *, pickled: bool = False) -> dict[str, str]:
    """Write a folder of two shards as `save_pretrained` does; returns the map of its index."""
    name, suffix = ("pytorch_model.bin", "bin") if pickled else ("model.safetensors", "safetensors")
    stem, names = name.removesuffix(f".{suffix}"), list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = {part: f"{stem}-0000{number}-of-00002.{suffix}" for number, part in enumerate(map(tuple, parts), 1)}
    for part, shard in shards.items():
        content = {name: tensors[name] for name in part}
        torch.save(content, folder / shard) if pickled else save_file(content, folder / shard)
    weight_map = {name: shard for part, shard in shards.items() for name in part}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_shards_is_read_as_one_model(pickled, network, tmp_path):
    shards = set(_sharded(network.state_dict(), tmp_path, pickled=pickled).values())
    assert _same(read(tmp_path).tensors, network)
    content = b"".join((tmp_path / shard).read_bytes() for shard in sorted(shards))
    assert file_bytes(tmp_path) == len(content)
    assert sha256(tmp_path) == hashlib.sha256(content).hexdigest()
    assert weights_file(tmp_path).suffix == (".bin" if pickled else ".safetensors")


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("model-00003-of-00002.safetensors", r"the shard model-00003-of-00002\.safetensors, which is missing"),
        ("../outside.safetensors", "no such file beside it"),
        ("/etc/passwd", "no such file beside it"),
        ("..", "no such file beside it"),
        ("a\\b", "no such file beside it"),
        (3, "no such file beside it"),
    ],
)
def test_shards_elsewhere_and_missing_ones_are_refused(shard, message, network, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(network.state_dict(), tmp_path / "outside.safetensors")
    weight_map = _sharded(network.state_dict(), folder)
    weight_map["fc1.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadInput, match=message):
        read(folder)


def test_a_missing_shard_put_beside_the_others_is_found(network, tmp_path):
    shard = sorted(set(_sharded(network.state_dict(), tmp_path).values()))[1]
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="Download it into the same folder"):
        read(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / shard)
    assert _same(read(tmp_path).tensors, network)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_an_index_without_shards_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadInput, match=r"index\.json"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(network, tmp_path):
    shards = sorted(set(_sharded(network.state_dict(), tmp_path).values()))
    save_file(network.state_dict(), tmp_path / shards[1])
    with pytest.raises(BadInput, match=r"holds .* in two shards"):
        read(tmp_path)


def test_what_becomes_infinite_in_fp32_is_named(tmp_path):
    torch.save({"w": torch.full((2, 2), 1e300, dtype=torch.float64)}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match="w holds NaN or infinity"):
        read(tmp_path / "net.pt")


def test_a_program_of_torch_export_is_refused_as_what_it_is(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "net.pt2")
    with pytest.raises(BadInput, match=r"is a program of torch\.export"):
        read(tmp_path / "net.pt2")
