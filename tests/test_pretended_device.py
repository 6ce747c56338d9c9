"""Every verb on a device that pretends to be a GPU: it exits 0, replays its graph, and waits for nothing in a step."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE
from dfcompress.models.architectures import find
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.synthesis.recipe import settings_of
from dfcompress.synthesis.recipes import recipe_names

DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"
DEVICE = Path(__file__).with_name("pretended_device.py")
STEPS = 7  # Three before the capture, and some replays.
MADE = ["--images", "8", "--batch-size", "4", "--seed", "1", "--device", "gpu"]
TRAINED = ["--train-steps", "3", "--train-batch-size", "8", "--device", "gpu"]
OBJECTIVES = ["--objective", "kd", "--objective", "feature=1", "--objective", "attention=1"]


def pretend(commands, *, devices=1):
    """Run the commands, by name, in one process with so many devices: how each ended."""
    lines = [[*map(str, command), "-q"] for command in commands.values()]
    # torch warns so where the generators of all devices are saved.
    start = [sys.executable, "-W", "error:GPU reports that you have", DEVICE, str(devices)]
    run = subprocess.run(start, input=json.dumps(lines), capture_output=True, text=True, check=False)
    ended = dict(zip(commands, map(json.loads, run.stdout.splitlines()), strict=False))
    wrong = [name for name in commands if name not in ended or ended[name]["code"]]
    assert not wrong, f"{wrong[0]}: {run.stderr[-3000:]}"
    assert not {name: end["waits"] for name, end in ended.items() if end["waits"]}
    return ended


def shards(folder):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shard-*"))]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first 120 test images of MNIST."""
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = gzip.decompress((DEMO / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DEMO / "t10k-labels-idx1-ubyte.gz").read_bytes())
    np.savez(
        file,
        images=np.frombuffer(images, np.uint8, 120 * 784, 16).reshape(120, 1, 28, 28),
        labels=np.frombuffer(labels, np.uint8, 120, 8),
    )
    return file


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A teacher of other classes."""
    folder = tmp_path_factory.mktemp("another") / "model"
    teacher = load(DEMO)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    teacher.card = replace(teacher.card, class_names=tuple(f"other {number}" for number in range(10)))
    save(teacher, folder)
    return folder


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A teacher whose blocks mix patches."""
    folder = tmp_path_factory.mktemp("patched") / "model"
    teacher = load(DEMO)
    torch.manual_seed(0)
    save(Classifier(find("cifar_resnet20").make(10, 1), replace(teacher.card, architecture="cifar_resnet20")), folder)
    return folder


# Of each kind of step one or two; the others are built alike, and wait for a release.
KINDS = {"gaussian", "deepinversion", "ifhe", "dafl", "psaq-vit", "activation-records"}


@pytest.mark.parametrize(
    "names", [sorted(KINDS), pytest.param(sorted({*recipe_names()} - KINDS), marks=pytest.mark.release)]
)
def test_every_recipe_replays_its_graph_and_ends_in_the_bytes_of_launched_steps(names, digits, patched, tmp_path):
    records = tmp_path / "records.safetensors"
    commands = {"record": ["record", DEMO, "--data", digits, "--min-images", 2, "-o", records, "--device", "gpu"]}
    recipes = {name: name != "gaussian" for name in names}
    for name, has_steps in recipes.items():
        asked = [
            "invert",
            patched if name == "psaq-vit" else DEMO,
            "--recipe",
            name,
            *MADE,
            *(["--steps", STEPS] if has_steps else []),
        ]
        few = {"rounds": 2, "student_steps": 2, "student_batch_size": 8, "width": 2}
        asked += [f"--set={key}={value}" for key, value in few.items() if key in settings_of(name)]
        asked += ["--records", records] if name == "activation-records" else []
        for way in ("auto", "off"):
            commands[f"{name} {way}"] = [*asked, "--compile", way, "-o", tmp_path / f"{name}-{way}"]
    ended = pretend(commands)
    for name, has_steps in recipes.items():
        assert (ended[f"{name} auto"]["replays"] > 0) == has_steps, name
        assert ended[f"{name} off"]["replays"] == 0
        assert shards(tmp_path / f"{name}-auto") == shards(tmp_path / f"{name}-off") != []


def test_two_devices_of_one_process_each_capture_their_own_steps(tmp_path):
    """torch's own capture stream belongs to the device that was current first. A training saves one generator."""
    commands = {
        place: ["invert", DEMO, *MADE[:-1], place, "--steps", STEPS, "-o", tmp_path / place]
        for place in ("gpu:0", "gpu:1")
    }
    distilled = ["distill", DEMO, "--student", "half", "--probe-images", 0, "--data", tmp_path / "gpu:0", *TRAINED]
    commands["distill"] = [*distilled, "--train-batch-size", 4, "-o", tmp_path / "student"]
    ended = pretend(commands, devices=2)
    assert ended["gpu:0"]["replays"] == ended["gpu:1"]["replays"] > 0
    assert shards(tmp_path / "gpu:0") == shards(tmp_path / "gpu:1") != []


def test_a_training_replays_its_graph_and_ends_in_the_bytes_of_launched_steps(digits, another, tmp_path):
    """Where it has features, several teachers, dropout, learnt grids, and targets that are computed once."""
    images = tmp_path / "images"
    steps = ["--train-steps", STEPS, "--train-batch-size", 8, "--device", "gpu"]
    distilled = ["distill", DEMO, "--student", "half", "--probe-images", 0, "--data", images, *steps]
    unchanged = ["--train-set", "shift=0", "--train-set", "flip=false", "--train-set", "mixup=0"]
    trained = {
        "features": [*distilled, *OBJECTIVES, "--train-set", "dropout=0.3"],
        "asked once": [*distilled, *unchanged],
        "merge": ["merge", DEMO, another, "--student", "half", "--data", images, "--data", images, *steps],
        "lsq": ["quantize", DEMO, "--data", images, "--finetune", "lsq", *steps],
        "blocks": ["quantize", DEMO, "--data", images, "--finetune", "blocks", "--train-steps", 20, "--device", "gpu"],
    }
    trained["merge"] += ["--probe-images", 0]
    commands = {"invert": ["invert", DEMO, *MADE, "--images", 16, "--steps", 1, "-o", images]}
    for name, line in trained.items():
        for way in ("auto", "off"):
            commands[f"{name} {way}"] = [*line, "--compile", way, "-o", tmp_path / f"{name}-{way}"]
    ended = pretend(commands)
    for name in trained:
        replays = {way: ended[f"{name} {way}"]["replays"] for way in ("auto", "off")}
        # Each of five layers is a block, captured without the rounding penalty, for 4 steps, and with it.
        expected = 5 * (20 - 2 * STEPS_BEFORE_CAPTURE) if name == "blocks" else STEPS - STEPS_BEFORE_CAPTURE
        assert replays == {"auto": expected, "off": 0}, name
        auto, off = (tmp_path / f"{name}-{way}" / "model.safetensors" for way in ("auto", "off"))
        assert auto.read_bytes() == off.read_bytes(), name


def test_every_verb_runs(digits, another, tmp_path):
    images = tmp_path / "images"
    given = ["--data", images, "--eval-data", digits]
    distilled = ["distill", DEMO, "--student", "half", "--probe-images", 0, *given, *TRAINED]
    unchanged = ["--train-set", "shift=0", "--train-set", "flip=false", "--train-set", "mixup=0"]
    quantized = ["quantize", DEMO, *given, "--train-steps", 3, "--device", "gpu"]
    twice = ["--data", images, "--data", images]
    measured = ["--batch-size", 4, "--rounds", 1, "--device", "gpu"]
    commands = {
        "invert": ["invert", DEMO, *MADE, "--images", 16, "--steps", 1, "--verify", another, "-o", images],
        "record": ["record", DEMO, "--data", digits, "--kind", "bn-equivalent", "--device", "gpu", "-o"],
        "distill": [*distilled, *OBJECTIVES, "-o"],
        "distill, asked once": [*distilled, *unchanged, "-o"],
        "distill, planned": [*distilled, *OBJECTIVES, "--dry-run", "-o"],
        "distill by lamb": [*distilled, "--optimizer", "lamb", "--train-set", "weight_decay=0.01", "-o"],
        "merge": ["merge", DEMO, another, "--student", "half", *twice, *TRAINED, "--probe-images", 0, "-o"],
        "lsq": [*quantized, "--finetune", "lsq", "-o"],
        "lsq, planned": [*quantized, "--finetune", "lsq", "--dry-run", "-o"],
        "kd": [*quantized, "--finetune", "kd", "-o"],
        "blocks": [*quantized, "--finetune", "blocks", "-o"],
        "evaluate": ["evaluate", DEMO, tmp_path / "distill", "--data", digits, "--device", "gpu"],
        "export": ["export", tmp_path / "lsq", "-o"],
        "inspect": ["inspect", DEMO],
        "doctor": ["doctor"],
        "bench step": ["bench", "step", DEMO, *measured],
        "bench train": ["bench", "train", DEMO, *measured],
    }
    commands = {name: [*line, tmp_path / name] if line[-1] == "-o" else line for name, line in commands.items()}
    ended = pretend(commands)
    # The file that `export` writes is compared on the CPU.
    assert {name for name, end in ended.items() if end["elsewhere"]} == {"export"}
