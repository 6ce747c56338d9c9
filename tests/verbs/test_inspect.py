"""`inspect` says what a checkpoint is, and what can be done with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

import dfcompress
from dfcompress.cli import run
from dfcompress.errors import BadInput
from dfcompress.models.architectures import find, named
from dfcompress.models.checkpoint import load
from dfcompress.verbs.export import export
from dfcompress.verbs.inspect import NEEDS, inspect


def _saved(name: str, path, *, classes: int = 10):
    torch.save(find(name).make(classes, find(name).channels).state_dict(), path)
    return path


def test_the_shared_resnet20_is_described(resnet20_file):
    found = inspect(resnet20_file)
    assert (found.architecture, found.classes, found.input_size) == ("cifar_resnet20", 10, (3, 32, 32))
    assert (found.parameters, found.batchnorm_layers, found.bytes) == (269_722, 19, 1_099_231)
    assert found.sha256.startswith("12fca82f")
    # A block adds its input of 16 × 32 × 32 values in fp32 to three more such tensors.
    assert 3 * 65_536 <= found.image_bytes <= 6 * 65_536
    assert found.normalisation.consistent
    assert [(ability.verb, ability.possible) for ability in found.can] == [
        ("invert", True),
        ("distill", True),
        ("merge", True),
        ("quantize", True),
        ("prune", True),
        ("extend", True),
        ("record", True),
        ("evaluate", True),
        ("compare", True),
        ("export", True),
        ("bench_step", True),
        ("bench_train", True),
        ("bench_generator", True),
    ]


def test_every_verb_that_takes_a_model_is_judged():
    verbs = [name for name, home in dfcompress._HOME.items() if home == f"verbs.{name}"]
    first = {name: next(iter(signature(getattr(dfcompress, name)).parameters), "") for name in verbs}
    assert set(NEEDS) | {"inspect"} == {name for name in verbs if first[name].startswith("checkpoint")}


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("cifar_resnet20", 40_551_040),  # 40.8 M with BatchNorm and pooling counted
        ("resnet18", 1_814_073_344),
        ("lenet5", 117_600 + 240_000 + 48_000 + 10_080 + 840),
    ],
)
def test_multiply_accumulates_are_the_known_ones(name, macs, tmp_path):
    path = _saved(name, tmp_path / "net.pt", classes=1000 if name == "resnet18" else 10)
    assert inspect(path).macs == macs


def test_json_has_the_promised_fields(resnet20_file):
    values = json.loads(json.dumps(inspect(resnet20_file).to_json()))
    promised = {"architecture", "classes", "input_size", "parameters", "macs", "batchnorm_layers"}
    assert promised <= values.keys()
    assert values["card"]["origin"]["mean"] == "recognised"


@pytest.mark.parametrize(
    ("name", "why"),
    [("lenet5_bn", "never trained: running means are all 0 and variances all 1"), ("lenet5", "no BatchNorm layer")],
)
def test_an_unfit_model_is_described_with_the_reason(name, why, tmp_path):
    found = inspect(_saved(name, tmp_path / "net.pt"))
    abilities = {ability.verb: ability for ability in found.can}
    assert not abilities["invert"].possible
    assert why in abilities["invert"].why
    assert abilities["distill"].possible
    assert abilities["distill"].why.startswith("needs --data or --records, as it")
    assert not abilities["bench_step"].possible
    assert all(not abilities[verb].why for verb in ("record", "evaluate", "export", "bench_train"))
    assert found.normalisation is None


def test_the_card_is_written_only_when_asked_for(tmp_path):
    path = _saved("lenet5_bn", tmp_path / "net.pt")
    assert inspect(path).card_file is None
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]
    found = inspect(path, write_card=True)
    assert found.card_file == str(tmp_path / "net.card.json")
    assert load(path).card.origin["mean"] == "read"


def test_dead_channels_are_counted_and_negative_variances_are_refused(tmp_path):
    network = find("cifar_resnet20").make(10, 3)
    network.bn1.running_var[:3] = torch.tensor([0.0, 5.6e-45, 1e-6])
    network.layer2[1].bn2.running_var[4] = 0.0
    torch.save(network.state_dict(), tmp_path / "dead.pt")
    assert inspect(tmp_path / "dead.pt").dead_channels == 3
    network.layer2[1].bn2.running_var[4] = -0.5
    torch.save(network.state_dict(), tmp_path / "negative.pt")
    with pytest.raises(BadInput, match=r"layer2\.1\.bn2 has a running variance of -0\.5"):
        inspect(tmp_path / "negative.pt")


NETS = Path(__file__).resolve().parents[1] / "models" / "factories.py"


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("plain", "logits"),
        ("softmax_module", "the logits before its softmax"),
        ("softmax", "the logarithms of its probabilities, which are logits"),
    ],
)
def test_the_answer_that_is_used_is_named(name, answers, tmp_path):
    torch.save(load_factory(name).state_dict(), tmp_path / "net.pt")
    found = inspect(load(tmp_path / "net.pt", arch=f"{NETS}:{name}", input_size=(3, 16, 16)))
    assert found.answers == answers
    assert {ability.verb for ability in found.can if not ability.possible} == {
        "invert",
        "bench_step",
        "bench_generator",
    }


@pytest.mark.parametrize(
    ("name", "classes", "why"),
    [
        ("sigmoid", 1, "it answers with one column, and two or more classes are needed"),
        ("labels", 10, "it answers with values in [0, 1] that do not add up to 1, as a network of several labels per "),
    ],
)
def test_a_network_without_exclusive_classes_is_described_and_exported_alone(name, classes, why, tmp_path):
    torch.save(load_factory(name).state_dict(), tmp_path / "net.pt")
    path, options = str(tmp_path / "net.pt"), ["--arch", f"{NETS}:{name}", "--input-size", "3x16x16"]
    assert run(["inspect", path, *options]) == 0
    found = inspect(load(path, arch=f"{NETS}:{name}", input_size=(3, 16, 16)))
    assert found.classes == classes
    assert [ability.verb for ability in found.can if ability.possible] == ["export"]
    assert all(ability.why.startswith(why) for ability in found.can if not ability.possible)
    images = tmp_path / "images.npz"
    np.savez(images, images=np.zeros((4, 3, 16, 16), np.uint8), labels=[0] * 4)
    verbs = [
        ["invert", "-o", "out"],
        ["distill", "--student", "lenet5", "-o", "out"],
        ["quantize", "--data", str(images), "-o", "out"],
        ["record", "--data", str(images)],
        ["evaluate", "--data", str(images)],
    ]
    for verb, *others in verbs:
        assert run([verb, path, *options, *others]) == 2, verb
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images.npz", "net.pt"]


def test_a_network_of_one_column_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.save(load_factory("sigmoid").state_dict(), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{NETS}:sigmoid", input_size=(3, 16, 16))
    assert export(classifier, output=tmp_path / "out.onnx").largest_difference < 1e-5


def load_factory(name: str) -> torch.nn.Module:
    """The network of a factory beside the tests of models."""
    return named(f"{NETS}:{name}").make(0, 3)


def test_names_that_a_terminal_cannot_show_are_replaced(tmp_path):
    """Letters that its encoding has not, and characters that steer it."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["chó", "\x1b[2Jcat", *map(str, range(8))]), encoding="utf-8")
    line = ["inspect", str(_saved("cifar_resnet20", tmp_path / "net.pt")), "--class-names", str(names)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "dfcompress", *line], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert r"ch\xf3, ?[2Jcat, 0" in done.stdout
