"""`invert` on the released ResNet-20: what it leaves on disk, and what a SIGKILL may not change."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import odd_networks
import pytest
import torch
from PIL import Image
from torch import nn

from dfcompress import console
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import bn_divergence
from dfcompress.machine import memory
from dfcompress.machine.execution import Compute, Execution
from dfcompress.machine.memory import GROWTH, SHARE
from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.run import Clock
from dfcompress.synthesis import set_execution
from dfcompress.synthesis.batch_state import BatchState
from dfcompress.synthesis.recipe import Recipe, Synthesis
from dfcompress.synthesis.spec import resolve
from dfcompress.synthesis.trial_steps import try_step
from dfcompress.verbs import _plan
from dfcompress.verbs.distill import distill
from dfcompress.verbs.invert import invert

DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off")
EXECUTION = Execution("cpu", "fp32", False, 1, "")
SMALL = Synthesis(images=12, settings={"steps": 3, "batch_size": 8})


def digests(folder):
    shards = sorted(folder.glob("shard-*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


@pytest.fixture(scope="module")
def made(resnet20_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("invert") / "set"
    return invert(resnet20_file, output=folder, synthesis=SMALL, compute=EAGER), folder


def test_the_set_holds_as_many_images_as_asked_with_balanced_labels(made):
    result, folder = made
    synthetic = SyntheticSet(folder)
    assert result.images == len(synthetic) == 12
    assert synthetic.images.shape == (12, 3, 32, 32)
    assert synthetic.images.dtype == torch.uint8
    assert synthetic.labels.tolist() == [*range(10), 0, 1]


def test_the_manifest_says_what_made_the_images(made):
    manifest = SyntheticSet(made[1]).manifest
    assert manifest["recipe"]["name"] == "deepinversion"
    assert manifest["recipe"]["preset"] == "fast-cifar10"
    assert manifest["recipe"]["settings"]["steps"] == 3
    assert manifest["teacher"].startswith("12fca82f")
    assert manifest["execution"]["precision"] == "fp32"
    assert manifest["shards"] == [8, 4]


def test_there_is_a_picture_a_log_and_a_record(made):
    result, folder = made
    with Image.open(folder / "preview.png") as picture:
        assert picture.size[0] > 320
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in lines if "seconds" in line] == [0, 1]
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"]
    assert record["measurements"]["bn_divergence"] == result.bn_divergence


def test_the_same_call_gives_the_same_bytes(made, resnet20_file, tmp_path):
    invert(resnet20_file, output=tmp_path / "again", synthesis=SMALL, compute=EAGER)
    assert digests(tmp_path / "again") == digests(made[1])


def test_a_missing_shard_is_made_again_to_the_same_bytes(made, resnet20_file):
    folder = made[1]
    before = digests(folder)
    (folder / "shard-00001.safetensors").unlink()
    invert(resnet20_file, output=folder, synthesis=SMALL, compute=EAGER, resume=True)
    assert digests(folder) == before


def test_resuming_with_other_options_is_refused(made, resnet20_file):
    with pytest.raises(BadInput, match=r"was started with .*seed"):
        invert(resnet20_file, output=made[1], synthesis=SMALL, compute=replace(EAGER, seed=1), resume=True)


def test_a_folder_in_use_is_refused(made, resnet20_file):
    with pytest.raises(BadInput, match=r"not empty.*--resume.*--overwrite"):
        invert(resnet20_file, output=made[1], synthesis=SMALL, compute=EAGER)


def test_a_folder_of_somebody_else_is_never_overwritten(resnet20_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="was not made by dfcompress"):
        invert(resnet20_file, output=tmp_path, synthesis=SMALL, compute=EAGER, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_other_networks_can_classify_the_images(resnet20_file, tmp_path):
    result = invert(resnet20_file, output=tmp_path / "set", synthesis=SMALL, compute=EAGER, verify=[resnet20_file])
    (verified,) = result.verify
    assert (verified.checkpoint, verified.top1) == ("resnet20-12fca82f", result.teacher_top1)
    assert verified.bn_divergence == pytest.approx(result.bn_divergence, rel=1e-4)


def test_another_network_verifies_the_images_in_its_own_size(resnet20_file, tmp_path):
    """A linear layer takes images of one size alone."""
    card = ModelCard("flat", 10, (3, 40, 40), (0.5,) * 3, (0.25,) * 3)
    other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 10)), card)
    (found,) = invert(resnet20_file, output=tmp_path / "set", synthesis=SMALL, compute=EAGER, verify=[other]).verify
    assert 0 <= found.top1 <= 1
    assert found.bn_divergence is None


@pytest.mark.parametrize(("name", "expected"), [("resnet20_file", 0.0157), ("resnet44_file", 0.0218)])
def test_the_divergence_of_real_images_is_the_known_one(name, expected, request, cifar10_train_file):
    """J_KL of the 1,000 training images, BatchNorm layers only, whole set at once."""
    from dfcompress.data.real import open_images

    teacher = load(request.getfixturevalue(name))
    assert bn_divergence(teacher, open_images(cifar10_train_file, teacher.card).batches(250)) == pytest.approx(
        expected, abs=5e-5
    )


LONGER = Synthesis(images=12, settings={"steps": 40, "batch_size": 8})


@pytest.fixture(scope="module")
def undisturbed(resnet20_file, tmp_path_factory):
    """The shards of a set of two batches that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    invert(resnet20_file, output=folder, synthesis=LONGER, compute=EAGER)
    return digests(folder)


@pytest.mark.slow
def test_a_killed_synthesis_ends_in_the_same_bytes(undisturbed, resnet20_file, tmp_path):
    """SIGKILL a real process in its steps; it saves after each, so that the kill may meet it writing."""
    code = (
        "import sys; from dfcompress import run; run.SAVE_EVERY_SECONDS = 0.0\n"
        "from dfcompress.verbs.invert import invert, Synthesis; from dfcompress.machine.execution import Compute\n"
        f"invert({str(resnet20_file)!r}, output=sys.argv[1], synthesis={LONGER!r}, compute={EAGER!r})"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, folder])
    while not list(folder.glob("*.partial")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(0).uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(digests(folder)) < 2
    invert(resnet20_file, output=folder, synthesis=LONGER, compute=EAGER, resume=True)
    assert digests(folder) == undisturbed
    assert not list(folder.glob("*.partial"))


def test_ended_three_times_it_still_ends_in_the_same_bytes(undisturbed, killed_at_save, resnet20_file, tmp_path):
    """Twice in its first batch, once in its second."""
    for state, saves in (("shard-00000.partial", 10), ("shard-00000.partial", 20), ("shard-00001.partial", 5)):
        with killed_at_save(state, saves):
            resume = (tmp_path / "set").exists()
            invert(resnet20_file, output=tmp_path / "set", synthesis=LONGER, compute=EAGER, resume=resume)
    invert(resnet20_file, output=tmp_path / "set", synthesis=LONGER, compute=EAGER, resume=True)
    assert digests(tmp_path / "set") == undisturbed


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from dfcompress.cli import run
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(run(sys.argv[1:]))
"""


def test_a_disk_that_is_full_ends_the_run_and_leaves_nothing_half_written(resnet20_file, tmp_path):
    arguments = [resnet20_file, "--images", "16", "--batch-size", "8", "--steps", "2", "--compile", "off"]
    folder = tmp_path / "set"
    command = [sys.executable, "-c", FULL_DISK, "invert", *arguments, "-o", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"{folder}/shard-00000.safetensors cannot be written: File too large" in done.stderr
    assert "--resume" in done.stderr
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob("shard-*.safetensors"))
    again = invert(
        resnet20_file,
        output=folder,
        synthesis=Synthesis(images=16, settings={"steps": 2, "batch_size": 8}),
        compute=Compute(compile="off"),
        resume=True,
    )
    assert again.images == 16


def test_only_the_classes_asked_for_are_made(resnet20_file, tmp_path):
    asked = replace(SMALL, classes=("3", "7"))
    result = invert(resnet20_file, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    assert result.classes == [0, 0, 0, 6, 0, 0, 0, 6, 0, 0]
    assert SyntheticSet(tmp_path / "set").labels.tolist() == [3, 7] * 6


def test_the_picture_is_renewed_while_it_runs(resnet20_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dfcompress.synthesis.set_builder.write_preview", lambda folder, images: seen.append(len(images))
    )
    asked = replace(SMALL, groups=1, preview_every=2, settings={"steps": 4, "batch_size": 8})
    invert(resnet20_file, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    assert seen == [8, 8, 8, 8, 12]  # Steps 2 and 4 of two batches, and the end.


def test_metrics_hold_each_shard_once_with_its_health(made):
    lines = [json.loads(line) for line in (made[1] / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "seconds" in line]
    assert [line["shard"] for line in ends] == [0, 1]
    assert all(line["attempts"] == 1 and 0 <= line["health"]["teacher_top1"] <= 1 for line in ends)
    assert not list(made[1].glob("shard-*.jsonl"))


@pytest.fixture(scope="module")
def adaptive(resnet20_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive") / "set"
    settings = {"steps": 3, "batch_size": 8, "student_steps": 3, "student_batch_size": 8}
    asked = Synthesis(recipe="adaptive-deepinversion", preset="fast-cifar10", settings=settings, images=24)
    return invert(resnet20_file, output=folder, synthesis=asked, compute=EAGER), folder, asked


def test_an_adaptive_student_learns_between_rounds(adaptive):
    assert json.loads((adaptive[1] / "student.json").read_text())["seconds"] > 0
    steps = [json.loads(line)["step"] for line in (adaptive[1] / "student" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(6))  # Three after each of three rounds, but for the last.
    assert not list(adaptive[1].rglob("*.partial"))
    assert adaptive[0].images == 24


@pytest.mark.parametrize("lost", ["shard-00002.safetensors", "shard-00001.safetensors"])
def test_adaptive_work_resumes_to_the_same_bytes(adaptive, resnet20_file, lost):
    """The last shard competes with the student as it was saved; an earlier one needs an earlier student again."""
    _, folder, asked = adaptive
    before = digests(folder)
    (folder / lost).unlink()
    (folder / "run.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k != "measurements"})
    )
    invert(resnet20_file, output=folder, synthesis=asked, compute=EAGER, resume=True)
    assert digests(folder) == before


def test_a_later_round_competes_with_what_the_student_has_learned(adaptive, resnet20_file, tmp_path):
    """With a student that learns nothing the second round comes out otherwise, the first one alike."""
    settings = {**adaptive[2].settings, "student_lr": 1e-12}
    asked = replace(adaptive[2], settings=settings)
    invert(resnet20_file, output=tmp_path / "set", synthesis=asked, compute=EAGER)
    learned, idle = digests(adaptive[1]), digests(tmp_path / "set")
    assert learned["shard-00000.safetensors"] == idle["shard-00000.safetensors"]
    assert learned["shard-00001.safetensors"] != idle["shard-00001.safetensors"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """8 times the images in at most 16 MiB more, where the images alone have 42 MiB more."""
    card = ModelCard("lenet5_bn", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    save(Classifier(named("lenet5_bn").make(10, 3), card), tmp_path / "model")
    code = (
        "import resource, sys; from dfcompress.verbs.invert import invert, Synthesis\n"
        "from dfcompress.machine.execution import Compute\n"
        "for count in (1024, 8192):\n"
        "    made = Synthesis(recipe='gaussian', images=count, settings={'batch_size': 128})\n"
        f"    invert('model', output=str(count), synthesis=made, compute={EAGER!r})\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path).split()
    assert int(peaks[1]) - int(peaks[0]) < 16 * 1024


@pytest.fixture
def native_bf16(monkeypatch):
    """A processor for which auto is bf16."""
    monkeypatch.setattr("dfcompress.machine.device._cpu_multiplies_bf16", lambda: True)


def odd(name):
    card = ModelCard(name, odd_networks.CLASSES, odd_networks.SIZE, (0.5,) * 3, (0.25,) * 3)
    return Classifier(odd_networks.trained(name), card, name=name)


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize(("name", "precision"), [("prelu", "bf16"), ("scattered", "fp32")])
def test_the_precision_is_tried_before_images_are_made_and_stored_with_them(name, precision, tmp_path, capsys):
    auto, made = (
        Compute(device="cpu", precision="auto", compile="off"),
        Synthesis(images=8, settings={"steps": 2, "batch_size": 4}),
    )
    estimated = invert.plan(odd(name), synthesis=made, compute=auto).estimates()
    assert [estimate.execution.precision for estimate in estimated] == [precision]
    capsys.readouterr()
    console.configure(console.NORMAL)
    invert(odd(name), output=tmp_path / "set", synthesis=made, compute=auto)
    console.configure(console.QUIET)
    assert SyntheticSet(tmp_path / "set").manifest["execution"]["precision"] == precision
    assert capsys.readouterr().err.count("It runs in fp32.") == (precision == "fp32")


def test_a_precision_that_a_network_cannot_compute_in_is_refused_where_it_was_asked_for(tmp_path):
    bf16 = Compute(device="cpu", precision="bf16", compile="off")
    with pytest.raises(BadInput, match=r"scattered cannot be computed in bf16: .*--precision auto"):
        invert(odd("scattered"), output=tmp_path / "set", synthesis=SMALL, compute=bf16)
    assert not list(tmp_path.rglob("*.safetensors"))


TIGHT = Synthesis(images=12, settings={"steps": 3, "batch_size": 8})


@pytest.fixture
def room_for(monkeypatch):
    """A function that leaves memory for a step of so many images of the odd networks, and of what they are made of."""
    taken = try_step(resolve(odd("plain"), TIGHT).recipe, odd("plain"), EXECUTION, student=None, sampler=None)

    def leave(images):
        beside = set_execution.COPIES * 4 * 8 * math.prod(odd_networks.SIZE) + GROWTH * taken.beside
        room = int((beside + images * GROWTH * taken.each) / SHARE) + 1
        monkeypatch.setattr(memory, "free_bytes", lambda target: room)

    return leave


def test_a_batch_that_does_not_fit_is_made_in_chunks_that_a_resume_obeys(room_for, tmp_path, monkeypatch):
    """Killed between two steps, with the state just saved, and resumed where there is room for all images."""
    room_for(2)
    invert(odd("plain"), output=tmp_path / "whole", synthesis=TIGHT, compute=EAGER)
    manifest = SyntheticSet(tmp_path / "whole").manifest
    assert (manifest["batch_size"], manifest["execution"]["chunk"]) == (8, 2)

    class Killed(Exception):
        pass

    def save_and_die(state, path, real=BatchState.save):
        real(state, path)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Clock, "is_time_to_save", lambda clock: True)
        patched.setattr(BatchState, "save", save_and_die)
        with pytest.raises(Killed):
            invert(odd("plain"), output=tmp_path / "set", synthesis=TIGHT, compute=EAGER)
    room_for(1000)
    invert(odd("plain"), output=tmp_path / "set", synthesis=TIGHT, compute=EAGER, resume=True)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")
    invert(odd("plain"), output=tmp_path / "roomy", synthesis=TIGHT, compute=EAGER)
    assert SyntheticSet(tmp_path / "roomy").manifest["execution"]["chunk"] == 8
    assert digests(tmp_path / "roomy") != digests(tmp_path / "whole")


def test_where_not_one_image_fits_nothing_is_begun(room_for, tmp_path):
    room_for(0.9)
    with pytest.raises(BadInput, match=r"One image at a time needs [\d,]+ bytes of free memory, and [\d,]+ are free"):
        invert(odd("plain"), output=tmp_path / "set", synthesis=TIGHT, compute=EAGER)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_must_be_whole_and_does_not_fit_names_the_one_that_does(room_for, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "needs_whole_batch", True)
    room_for(5)
    with pytest.raises(BadInput, match=r"A batch of 8 images does not fit into memory.*Use --batch-size 4\."):
        invert(odd("plain"), output=tmp_path / "set", synthesis=TIGHT, compute=EAGER)
    room_for(8.5)
    invert(odd("plain"), output=tmp_path / "set", synthesis=TIGHT, compute=EAGER)


def test_a_dry_run_tells_the_chunk_and_the_memory_and_times_no_more(room_for, monkeypatch):
    timed = []
    monkeypatch.setattr(_plan, "seconds_per_step", lambda *given: timed.append(given[3]) or 0.5)
    room_for(2)
    (estimate,) = invert.plan(odd("plain"), synthesis=TIGHT, compute=EAGER).estimates()
    assert (estimate.execution.chunk, timed) == (2, [2])
    assert estimate.seconds == pytest.approx(0.5 * 4 * 3 * 2)
    small = estimate.memory_bytes
    room_for(8.5)
    (estimate,) = invert.plan(odd("plain"), synthesis=TIGHT, compute=EAGER).estimates()
    assert estimate.execution.chunk == 8
    assert 0 < estimate.memory_bytes - small < 2**24


@pytest.mark.release
def test_little_memory_does_not_kill_a_step_of_large_images(tmp_path):
    """A ResNet-18 at 224 px, batch 64, in a process that may take 1.2 GiB more addresses than it has at the start; the
    whole batch has 2.2 GB of tensors in fp32.
    """
    code = (
        "import resource, sys, torch, torchvision, dfcompress; from dfcompress.machine.memory import _field, Path\n"
        "from dfcompress import Classifier, Compute, ModelCard, Synthesis, invert\n"
        "torch.manual_seed(0); torch.set_num_threads(1); network = torchvision.models.resnet18().train()\n"
        "network(torch.randn(8, 3, 224, 224))\n"
        "card = ModelCard('torchvision:resnet18', 1000, (3, 224, 224), (0.5,) * 3, (0.25,) * 3)\n"
        "limit = 1024 * _field(Path('/proc/self/status'), 'VmSize') + 1200 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "made = Synthesis(recipe='bns', preset='paper-cifar10', images=64, "
        "settings={'steps': 1, 'copies': 1, 'batch_size': int(sys.argv[2])})\n"
        "invert(Classifier(network.eval(), card), output=sys.argv[1], synthesis=made, "
        "compute=Compute(device='cpu', precision='fp32', compile='off'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "set"), "64"], check=True, capture_output=True)
    assert SyntheticSet(tmp_path / "set").manifest["execution"]["chunk"] < 64


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_network_whose_layers_in_place_spoil_its_gradient_is_refused_by_plan_and_verb(precision, tmp_path):
    between = nn.Sequential(nn.Sigmoid(), nn.ELU(inplace=True))
    network = odd_networks.settled(odd_networks.Net(between), odd_networks.SIZE)
    teacher, compute = (
        Classifier(network, odd("plain").card, name="spoilt"),
        Compute(device="cpu", precision=precision, compile="off"),
    )
    with pytest.raises(BadInput, match=r"^spoilt cannot be differentiated: .*inplace operation.*inplace=False"):
        invert.plan(teacher, synthesis=SMALL, compute=compute).estimates()
    with pytest.raises(BadInput, match=r"^spoilt cannot be differentiated: .*inplace operation.*inplace=False"):
        invert(teacher, output=tmp_path / "set", synthesis=SMALL, compute=compute)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("images", "settings", "remedy"),
    [
        (8, {"batch_size": 8}, {"batch_size": 4}),
        (8, {"batch_size": 8}, {"images": 16}),
        (12, {"batch_size": 8, "round_batches": 2}, {"round_batches": 1}),
        (12, {"batch_size": 8, "round_batches": 2}, {"batch_size": 4}),
    ],
)
def test_images_of_one_round_say_that_no_update_takes_place(images, settings, remedy, resnet20_file, tmp_path, capsys):
    def notices(images, **settings):
        folder, usual = tmp_path / str(images), {"steps": 1, "student_steps": 1, "student_batch_size": 4}
        asked = Synthesis(
            recipe="adaptive-deepinversion", preset="fast-cifar10", settings={**usual, **settings}, images=images
        )
        invert(resnet20_file, output=folder, synthesis=asked, compute=EAGER, overwrite=True)
        return capsys.readouterr().err

    console.configure(console.NORMAL)
    try:
        before = notices(**{"images": images, **settings})
        after = notices(**{"images": images, **settings, **remedy})
    finally:
        console.configure(console.QUIET)
    assert "The student is never updated" in before
    ((name, value),) = remedy.items()
    named = {"batch_size": f"--batch-size {value}", "images": "more --images", "round_batches": "--set round_batches=1"}
    assert named[name] in before
    assert "The student is never updated" not in after
    assert "training: 1/1" in after  # The student took a step.


@pytest.mark.parametrize(("verb", "recipes"), [("invert", 1), ("distill", 3)])
def test_a_recipe_is_built_once_for_every_set(verb, recipes, tmp_path, monkeypatch):
    """A distillation makes three sets: by the chosen recipe, by the one that is mixed in, and the probe images."""
    built = []
    check = Recipe.__post_init__
    monkeypatch.setattr(Recipe, "__post_init__", lambda recipe: built.append(recipe) or check(recipe))
    small = Synthesis(recipe="bns-inception", images=4, settings={"steps": 1, "batch_size": 2})
    if verb == "invert":
        invert(DEMO, output=tmp_path / "run", synthesis=small, compute=EAGER)
    else:
        training = {"steps": 1, "batch_size": 2}
        distill(
            DEMO,
            student="half",
            output=tmp_path / "run",
            synthesis=small,
            compute=EAGER,
            training=training,
            probe_images=2,
        )
    assert len(built) == recipes
