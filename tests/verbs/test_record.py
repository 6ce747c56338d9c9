"""`record`, and what `invert` and `distill` make of its file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dfcompress.cli import run
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute, Execution
from dfcompress.models.checkpoint import load
from dfcompress.models.recorder import LOGITS, FusedRecorder, HookRecorder
from dfcompress.synthesis.recipe import Synthesis, choose
from dfcompress.synthesis.records import FIXED_DROPOUT, KINDS, SPECTRAL
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.gaussian import GaussianSampler
from dfcompress.synthesis.records.record_file import Description, Record
from dfcompress.synthesis.records.spectral import SpectralSampler
from dfcompress.synthesis.synthesizer import Synthesizer
from dfcompress.verbs.distill import DISTILLATION, distill
from dfcompress.verbs.inspect import inspect
from dfcompress.verbs.invert import invert
from dfcompress.verbs.record import record

EAGER = Compute(device="cpu", precision="fp32", compile="off")
FEW = Synthesis(images=12, settings={"steps": 4, "batch_size": 8})


@pytest.fixture(scope="session")
def released(lenet_folder, images_file, tmp_path_factory):
    """A record of every kind of the same LeNet-5, by kind."""
    folder = tmp_path_factory.mktemp("records")
    files = {kind: folder / f"{kind}.records.safetensors" for kind in KINDS}
    for kind, file in files.items():
        if kind == FIXED_DROPOUT:
            continue
        # Of all layers, the classes' means alone would be over a tenth of these few images.
        layers = ["fc*", LOGITS] if kind in SPECTRAL else []
        keeping = RecordSettings(kind=kind, layers=layers, per_class=2, covariance="block:64")
        record(lenet_folder, data=images_file, settings=keeping, output=file)
    return files


@pytest.fixture(scope="session")
def activations(lenet_folder, images_file):
    """Outputs of every layer for all images, in one piece."""
    lenet = load(lenet_folder)
    names = ["conv1", "conv2", "fc1", "fc2", LOGITS]
    images, labels = (
        torch.cat(parts) for parts in zip(*open_images(images_file, lenet.card).batches(100), strict=True)
    )
    recorder = HookRecorder(lenet.network, outputs=names)
    with torch.no_grad():
        outputs = recorder(lenet.normalise(images)).outputs
    return {name: output.flatten(1) for name, output in outputs.items()}, labels, images


def test_one_pass_keeps_what_two_passes_find(released, activations):
    tensors = load_file(released["all-layers"])
    outputs, labels, images = activations
    for layer, values in outputs.items():
        scaled = values / 8 if layer == LOGITS else values
        for label in (0, 7):
            own = scaled[labels == label].double()
            torch.testing.assert_close(tensors[f"mean.{layer}"][label].double(), own.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["pixels.mean"], images.mean((0, 2, 3)))
    torch.testing.assert_close(tensors["pixels.std"], images.std((0, 2, 3)))


def test_what_is_said_is_what_is_in_the_file(lenet_folder, images_file, tmp_path):
    made = record(lenet_folder, data=images_file, settings=RecordSettings(kind="top-layer"), output=tmp_path / "x")
    assert made.bytes == (tmp_path / "x").stat().st_size
    assert made.units == {LOGITS: 10}
    assert made.classes == [30] * 10
    assert made.data_bytes == 300 * 32 * 32


def test_a_dry_run_tells_the_size_and_writes_nothing(lenet_folder, images_file, tmp_path):
    planned = record(lenet_folder, data=images_file, output=tmp_path / "x", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    made = record(lenet_folder, data=images_file, output=tmp_path / "x")
    assert 0 <= made.bytes - planned.bytes < 3000  # The description.


def test_layers_are_chosen_by_pattern(lenet_folder, images_file, tmp_path):
    keeping = RecordSettings(kind="bn-equivalent", layers=["conv*"])
    assert set(record(lenet_folder, data=images_file, settings=keeping, output=tmp_path / "x").units) == {
        "conv1",
        "conv2",
    }
    with pytest.raises(BadInput, match="matches no layer"):
        record(lenet_folder, data=images_file, settings=RecordSettings(layers=["conf*"]), output=tmp_path / "y")


def test_a_class_of_few_images_is_refused_unless_classes_are_pooled(lenet_folder, images_file, tmp_path):
    with pytest.raises(BadInput, match="Class 0 has 30 images, fewer than --min-images 31"):
        record(lenet_folder, data=images_file, settings=RecordSettings(min_images=31), output=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    keeping = RecordSettings(kind="top-layer", class_independent=True, min_images=31)
    record(lenet_folder, data=images_file, settings=keeping, output=tmp_path / "x")


def test_a_network_without_dropout_has_no_filters_to_fix(lenet_folder, images_file, tmp_path):
    with pytest.raises(BadInput, match="no dropout layer"):
        record(lenet_folder, data=images_file, settings=RecordSettings(kind=FIXED_DROPOUT), output=tmp_path / "x")


def test_where_it_cannot_be_written_is_refused_before_any_work(lenet_folder, images_file, tmp_path):
    (tmp_path / "there").write_text("")
    for output, message in [("there", "exists"), (".", "is a folder"), ("no/where", "there is no folder")]:
        with pytest.raises(BadInput, match=message):
            record(lenet_folder, data=images_file, output=tmp_path / output)


def test_synthetic_images_are_no_training_images(lenet_folder, released, tmp_path):
    records = released["bn-equivalent"]
    invert(lenet_folder, output=tmp_path / "set", synthesis=replace(FEW, records=records), compute=EAGER)
    with pytest.raises(BadInput, match="is a synthetic set"):
        record(lenet_folder, data=tmp_path / "set", output=tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "all"}, "no kind of record"),
        ({"covariance": "block:x"}, "--covariance"),
        ({"coefficients": 0.0}, "--coefficients"),
        ({"temperature": 0.0}, "--temperature"),
        ({"per_class": 0}, "--per-class"),
        ({"kind": "spectral-all", "class_independent": True}, "does not pool"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        RecordSettings(**options)


def test_a_folder_of_mnist_is_recorded_from_its_training_part(lenet_folder, mnist_folder, tmp_path):
    made = record(
        lenet_folder, data=mnist_folder, settings=RecordSettings(kind="top-layer"), output=tmp_path / "x", dry_run=True
    )
    assert made.images == 60_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all-layers", "spectral-all", "bn-equivalent"])
def test_two_processes_make_the_record_of_one_up_to_rounding(kind, pair, lenet_folder, tmp_path):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (1200, 1, 32, 32), dtype=np.uint8)  # Three batches: one process sees two.
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(1200) % 10)
    asked = ["--data", tmp_path / "data.npz", "--kind", kind, "--covariance", "block:32", "--device", "cpu"]
    if kind in SPECTRAL:
        asked += ["--layers", "fc*", "--layers", "logits"]
    asked = ["record", lenet_folder, *asked, "-q", "-o"]
    assert run([*map(str, asked), str(tmp_path / "one")]) == 0
    ended = pair.run(*asked, tmp_path / "two")
    assert [code for code, _ in ended] == [0, 0], ended
    single, both = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert single.keys() == both.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(both[name].double(), tensor.double(), rtol=1e-3, atol=2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "one", "two"]


@pytest.mark.parametrize("kind", ["top-layer", "all-layers", "spectral-all", "spectral-pairs"])
def test_images_come_nearer_to_what_every_kind_asks_for(kind, released, lenet_folder, tmp_path):
    alone = {"steps": 30, "batch_size": 16, "pixels": 0, "tv": 0, "jitter": 0}
    steps = Synthesis(images=16, settings=alone, records=released[kind])
    invert(lenet_folder, output=tmp_path / "set", synthesis=steps, compute=EAGER)
    lines = [json.loads(line) for line in (tmp_path / "set" / "metrics.jsonl").read_text().splitlines()]
    distances = [line["activation_distance"] for line in lines]
    assert distances[-1] < 0.7 * distances[0]
    manifest = SyntheticSet(tmp_path / "set").manifest
    assert manifest["recipe"]["name"] == "activation-records"
    assert manifest["record"] == hashlib.sha256(released[kind].read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "preset", "remedy"),
    [
        ("spectral-all", "paper", "paper-spectral"),
        ("spectral-pairs", "paper", "paper-spectral"),
        ("all-layers", "paper-spectral", "paper"),
    ],
)
def test_published_settings_of_another_family_are_refused(kind, preset, remedy, released, lenet_folder, tmp_path):
    asked = Synthesis(images=4, preset=preset, settings={"steps": 1, "batch_size": 4}, records=released[kind])
    with pytest.raises(BadInput, match=f"of kind {kind}") as refused:
        invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    assert refused.value.remedy == f"Use --preset {remedy}."
    assert not (tmp_path / "set").exists()
    invert(lenet_folder, output=tmp_path / "set", synthesis=replace(asked, preset=remedy), compute=EAGER)
    assert SyntheticSet(tmp_path / "set").manifest["recipe"]["preset"] == remedy


def test_images_start_from_the_pixels_of_the_data(released, lenet_folder, tmp_path):
    barely = {"steps": 1, "lr": "1e-9", "batch_size": 64}
    asked = Synthesis(images=64, preset="paper", settings=barely, records=released["top-layer"])
    invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    images, tensors = SyntheticSet(tmp_path / "set").images.float(), load_file(released["top-layer"])
    assert images.mean().item() == pytest.approx(tensors["pixels.mean"].item(), abs=0.005)
    assert images.std().item() == pytest.approx(tensors["pixels.std"].item(), abs=0.005)


def test_filters_are_held_and_scaled_as_in_training(hinton, tmp_path):
    about = Description("all-layers-dropout", (), 1, (1,) * 10, hinton.identity()["sha256"], temperature=8.0)
    sampler = GaussianSampler(Record(about, {"pixels.mean": torch.zeros(1), "pixels.std": torch.ones(1)}), hinton)
    asked = sampler.sample(torch.zeros(3, dtype=torch.long), torch.Generator().manual_seed(0))
    assert [tuple(each.shape) for each in asked.filters] == [(3, 784), (3, 1200), (3, 1200)]
    for each, rate in zip(asked.filters, (0.2, 0.5, 0.5), strict=True):
        assert set(each.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
        assert (each == 0).float().mean().item() == pytest.approx(rate, abs=0.05)
        assert torch.equal(each[0], each[2])
    images = torch.randn(3, 1, 28, 28)
    first, second, third = asked.filters
    hidden = torch.relu(hinton.network.fc1(images.flatten(1) * first)) * second
    expected = hinton.network.fc3(torch.relu(hinton.network.fc2(hidden)) * third)
    logits = FusedRecorder(hinton.network, dropout=True)(images, asked.filters).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.slow
def test_the_compiled_step_of_fixed_filters_is_the_eager_one(hinton, tmp_path):
    random = np.random.default_rng(1)
    np.savez(
        tmp_path / "d.npz", images=random.integers(0, 256, (200, 1, 28, 28), dtype=np.uint8), labels=np.arange(200) % 10
    )
    keeping = RecordSettings(kind="all-layers-dropout", covariance="diagonal")
    record(hinton, data=tmp_path / "d.npz", settings=keeping, output=tmp_path / "r")
    sampler = GaussianSampler(Record.load(tmp_path / "r", hinton), hinton)
    recipe = choose("activation-records", "fast-all-layers", {"steps": 5, "batch_size": 8}).recipe
    made = [
        Synthesizer(recipe, hinton, Execution("cpu", "fp32", compiled, 1, ""), sampler=sampler).batch(
            0, torch.arange(8)
        )
        for compiled in (False, True)
    ]
    torch.testing.assert_close(made[0].images, made[1].images, rtol=1e-3, atol=1e-3)


def test_a_record_beside_the_checkpoint_is_found_and_told(released, lenet_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(lenet_folder, model)
    shutil.copy(released["top-layer"], model / "model.records.safetensors")
    few = ["--images", "8", "--steps", "2", "--batch-size", "8", "--compile", "off", "--device", "cpu"]
    assert run(["invert", str(model), *few, "-o", str(tmp_path / "set")]) == 0
    told = capsys.readouterr().err
    assert told.count("model.records.safetensors: top-layer of 300 images") == 1
    assert run(["invert", str(model), *few, "--no-records", "-o", str(tmp_path / "none")]) == 2
    assert "no BatchNorm" in capsys.readouterr().err


def test_a_set_is_not_resumed_with_another_record(released, lenet_folder, tmp_path):
    first, second = (replace(FEW, records=released[kind]) for kind in ("top-layer", "all-layers"))
    invert(lenet_folder, output=tmp_path / "set", synthesis=first, compute=EAGER)
    with pytest.raises(BadInput, match="was started with"):
        invert(lenet_folder, output=tmp_path / "set", synthesis=second, compute=EAGER, resume=True)


def test_a_lost_shard_comes_back_as_it_was(released, lenet_folder, tmp_path):
    asked = replace(FEW, records=released["spectral-pairs"])
    invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("shard-*.safetensors")}
    assert len(before) == 2
    (tmp_path / "set" / "shard-00001.safetensors").unlink()
    invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").glob("shard-*.safetensors")} == before


def test_recorded_statistics_serve_the_recipes_of_batchnorm(released, lenet_folder, tmp_path):
    made = invert(
        lenet_folder, output=tmp_path / "set", synthesis=replace(FEW, records=released["bn-equivalent"]), compute=EAGER
    )
    assert SyntheticSet(tmp_path / "set").manifest["recipe"]["name"] == "deepinversion"
    assert made.bn_divergence is not None


@pytest.mark.parametrize("kind", [None, "bn-equivalent"])
def test_a_recipe_without_its_record_is_refused(kind, released, lenet_folder, tmp_path):
    asked = replace(FEW, recipe="activation-records", records=kind and released[kind])
    with pytest.raises(BadInput, match="needs a record of activations"):
        invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    assert not (tmp_path / "set").exists()


def test_a_network_without_batchnorm_or_record_is_refused(lenet_folder, tmp_path):
    with pytest.raises(BadInput, match="no BatchNorm layer"):
        invert(lenet_folder, output=tmp_path / "set", synthesis=FEW, compute=EAGER)


def test_pooled_classes_intend_no_class(lenet_folder, images_file, tmp_path):
    record(
        lenet_folder,
        data=images_file,
        settings=RecordSettings(kind="top-layer", class_independent=True),
        output=tmp_path / "r",
    )
    made = invert(lenet_folder, output=tmp_path / "set", synthesis=replace(FEW, records=tmp_path / "r"), compute=EAGER)
    assert made.teacher_top1 is None


def test_distill_takes_records_and_makes_its_own_images(released, lenet_folder, tmp_path):
    result = distill(
        lenet_folder,
        student="lenet5_half",
        output=tmp_path / "student",
        synthesis=replace(FEW, records=released["all-layers"]),
        training=replace(DISTILLATION, steps=3, batch_size=4),
        compute=EAGER,
    )
    assert load(result.checkpoint).card.architecture == "lenet5_half"
    assert SyntheticSet(tmp_path / "student" / "synthetic").manifest["record"]


def test_a_record_that_the_recipe_does_not_use_is_told_and_changes_nothing(released, lenet_folder, tmp_path, capsys):
    few = ["--recipe", "deepdream", "--images", "8", "--steps", "2", "--batch-size", "8", "--compile", "off"]
    for name, records in (("with", ["--records", str(released["all-layers"])]), ("without", [])):
        assert run(["invert", str(lenet_folder), *few, *records, "-o", str(tmp_path / name)]) == 0
    assert "does not use the record" in capsys.readouterr().err
    with_record, without = (SyntheticSet(tmp_path / name).read_shard(0)[0] for name in ("with", "without"))
    assert torch.equal(with_record, without)


def test_a_decoded_record_does_not_depend_on_the_number_of_threads(released, lenet_folder):
    lenet = load(lenet_folder)
    before, asked = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sampler = SpectralSampler(Record.load(released["spectral-pairs"], lenet), lenet)
        asked.append(sampler.sample(torch.arange(10), torch.Generator().manual_seed(0)))
    torch.set_num_threads(before)
    assert all(torch.equal(a.values, b.values) for a, b in zip(*(each.targets.values() for each in asked), strict=True))


def test_records_and_no_records_exclude_each_other(released, lenet_folder, tmp_path, capsys):
    assert run(["invert", str(lenet_folder), "--records", str(released["top-layer"]), "--no-records"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_overwriting_does_not_delete_the_record(released, lenet_folder, tmp_path):
    inside = tmp_path / "set" / "r.records.safetensors"
    asked = replace(FEW, records=released["top-layer"])
    invert(lenet_folder, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    shutil.copy(released["top-layer"], inside)
    with pytest.raises(BadInput, match="would delete"):
        invert(
            lenet_folder, output=tmp_path / "set", synthesis=replace(FEW, records=inside), compute=EAGER, overwrite=True
        )
    assert inside.exists()


def test_inspect_tells_of_the_record_beside_the_model(released, lenet_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(lenet_folder, model)
    assert inspect(model).record is None
    shutil.copy(released["top-layer"], model / "model.records.safetensors")
    found = inspect(model)
    assert found.record == "top-layer"
    assert {ability.verb: ability.possible for ability in found.can}["invert"]
    (model / "model.records.safetensors").write_bytes(b"damaged")
    assert inspect(model).record.startswith("unusable")
