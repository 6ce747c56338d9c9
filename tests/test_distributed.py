"""Several real processes: the same bytes from any number of them, and no one waits for the dead."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pair import launched
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore

from dfcompress import cli, distributed
from dfcompress.distributed import World, first_host, tasks_per_node, world
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Execution
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.synthesis import set_execution
from dfcompress.synthesis.labels import Labels
from dfcompress.synthesis.recipe import Synthesis, choose
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.training import parallel

# On the CPU, because a machine may have fewer GPUs than there are processes here.
EAGER = ["--compile", "off", "--precision", "fp32", "--device", "cpu"]
TINY = ["--images", "28", "--batch-size", "4", "--steps", "9", *EAGER]


def digests(folder):
    shards = sorted(folder.glob("shard-*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


# Saves after every step, sleeps in each, and believes after 3 seconds that a process is gone, not after 10.
DYING = """
import sys, time
from dfcompress import cli, distributed, run
from dfcompress.synthesis.synthesizer import Synthesizer

def slowly(synthesizer, work, step=Synthesizer.step):
    time.sleep(0.15)
    step(synthesizer, work)

Synthesizer.step = slowly
run.SAVE_EVERY_SECONDS, distributed.LOST_AFTER_SECONDS = 0.0, 3.0
sys.exit(cli.run(sys.argv[1:]))
"""


def torchrun(count, *arguments):
    """A command in `count` processes of torchrun: its exit code and what it says on its error stream."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, "-m", "dfcompress", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


def doomed(*arguments):
    """Two processes of a command, one of which will be killed."""
    return launched(2, ["-c", DYING, *map(str, arguments)])


def alone(*arguments):
    """A command in this process."""
    assert cli.run([*map(str, arguments)]) == 0


def wait_for(sign, process):
    """Until `sign()`, or until the process has ended."""
    while not sign() and process.poll() is None:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def shards_of_one(resnet20_file, tmp_path_factory):
    """The shards that one process makes, by the number of batches side by side."""
    made = {}
    for groups in ("1", "2"):
        folder = tmp_path_factory.mktemp("alone") / "set"
        alone("invert", resnet20_file, *TINY, "--groups", groups, "-q", "-o", folder)
        made[groups] = digests(folder)
    return made


def require_both(folder):
    """Raise where one process made all shards."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert len({line["process"] for line in lines if "process" in line}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["1", "2"])
def test_two_processes_make_the_shards_of_one(groups, pair, shards_of_one, resnet20_file, tmp_path):
    folder = tmp_path / "set"
    ended = pair.run("invert", resnet20_file, *TINY, "--groups", groups, "-o", folder)
    assert [code for code, _ in ended] == [0, 0], ended
    assert digests(folder) == shards_of_one[groups]
    assert not list(folder.glob("*.partial"))
    require_both(folder)


@pytest.mark.release
def test_four_processes_of_torchrun_make_the_shards_of_one(shards_of_one, resnet20_file, tmp_path):
    folder = tmp_path / "set"
    code, errors = torchrun(4, "invert", resnet20_file, *TINY, "--groups", "1", "-o", folder)
    assert code == 0, errors
    assert digests(folder) == shards_of_one["1"]
    require_both(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_run_with_one_message(dead, resnet20_file, tmp_path):
    folder = tmp_path / "set"
    long = [*TINY[:4], "--steps", "100000", *EAGER, "--groups", "1"]
    processes = doomed("invert", resnet20_file, *long, "-o", folder)
    wait_for(lambda: len(list(folder.glob("shard-*.partial"))) == 2, processes[0])  # Both are in their steps.
    processes[dead].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[1 - dead].communicate(timeout=60)
    processes[dead].communicate()
    assert time.monotonic() - killed < 30
    assert processes[1 - dead].returncode == 1
    assert errors.count("dfcompress: ") == 1
    assert f"process {dead} of 2 is gone" in errors


@pytest.mark.slow
def test_resuming_after_a_death_ends_in_the_same_bytes(shards_of_one, resnet20_file, tmp_path):
    """One of two processes dies after the first shard; one process finishes the rest."""
    asked = ["invert", resnet20_file, *TINY, "--groups", "1", "-q", "-o", tmp_path / "set"]
    leader, other = doomed(*asked)
    wait_for(lambda: list((tmp_path / "set").glob("shard-*.safetensors")), leader)
    other.kill()
    for process in (leader, other):
        process.communicate(timeout=60)
    assert leader.returncode == 1
    assert 0 < len(digests(tmp_path / "set")) < len(shards_of_one["1"])
    alone(*asked, "--resume")
    assert digests(tmp_path / "set") == shards_of_one["1"]


@pytest.mark.slow
def test_a_usage_error_is_printed_once_under_torchrun(resnet20_file, tmp_path):
    (tmp_path / "mine.txt").write_text("not to be touched")
    code, errors = torchrun(2, "invert", resnet20_file, *TINY, "-o", tmp_path)
    assert code != 0
    assert errors.count("is not empty") == 1
    assert (tmp_path / "mine.txt").read_text() == "not to be touched"


DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"
TRAINED = ["--train-steps", "12", "--train-batch-size", "16", *EAGER, "-q"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A set of 64 images that cost nothing to make."""
    folder = tmp_path_factory.mktemp("noise") / "set"
    alone("invert", DEMO, "--recipe", "gaussian", "--images", "64", "-q", "-o", folder)
    return folder


def another_teacher(folder):
    """A teacher of other classes: the demo's card, other weights."""
    teacher = load(DEMO)
    torch.manual_seed(1)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher.card = replace(teacher.card, class_names=tuple(f"other {number}" for number in range(10)))
    save(teacher, folder)
    return folder


def trained_steps(folder):
    """Where a saved training is."""
    path = folder / "training.partial"
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


def losses(folder, name):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


PUBLISHED = ["--calibrate", "minmax", "--weight-ranges", "minmax", "--no-correction"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "asked", "loss"),
    [
        ("distill", ["--student", "lenet5_bn_half", "--train-lr", "0.01"], "kd"),
        (
            "distill",
            ["--student", "lenet5_bn_half", "--objective", "kd", "--objective", "feature=10", "--train-lr", "0.01"],
            "feature",
        ),
        ("merge", ["--student", "lenet5_bn", "--train-lr", "0.01"], "logits/1"),
        ("merge", ["--student", "lenet5_bn", "--method", "paper", "--train-lr", "0.01"], "block/1"),
        (
            "quantize",
            ["--bits", "8w8a", "--train-lr", "0.001", "--finetune", "kd", "--objective", "kd", *PUBLISHED],
            "kd",
        ),
        ("quantize", ["--bits", "8w8a", "--train-lr", "0.001", "--finetune", "kd", *PUBLISHED], "kd"),
        ("quantize", ["--bits", "3w32a", "--train-lr", "0.001", "--finetune", "kd"], "kd"),
        ("quantize", ["--bits", "3w32a", "--train-lr", "0.0003", "--finetune", "lsq"], "kd"),
    ],
)
def test_two_processes_train_as_one_does(verb, asked, loss, pair, noise, tmp_path):
    """The same loss curve up to rounding, through BatchNorm, whose statistics are of the whole batch.

    Rates are small: at the usual 0.1 a unit at the kink of its ReLU goes the other way on some processors, and the
    curves part from there.
    """
    teachers, data = [DEMO], ["--data", noise]
    if verb == "merge":
        teachers, data = [DEMO, another_teacher(tmp_path / "another")], 2 * data
    unseen = [] if verb == "quantize" else ["--probe-images", "0"]
    asked = [*teachers, *asked, *data, *unseen, *TRAINED]
    alone(verb, *asked, "-o", tmp_path / "one")
    for code, errors in pair.run(verb, *asked, "-o", tmp_path / "two"):
        assert code == 0, errors
        assert "Warning" not in errors
    # With quantized activations a rounding apart becomes a level apart after some steps; without, it does not.
    compared = slice(6 if "8w8a" in asked else None)
    wanted, shared = (losses(tmp_path / name, loss)[compared] for name in ("one", "two"))
    assert shared == pytest.approx(wanted, rel=1e-3 if verb == "quantize" else 1e-5)
    if verb == "quantize":  # So may a weight be.
        return
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


NEVER_CALLED = """
from torch import nn

class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(900, 10))
        self.spare = nn.Linear(4, 10)

    def forward(self, images):
        return nn.Sequential(*list(self)[:5])(images)
"""


@pytest.mark.slow
def test_two_processes_train_a_network_with_weights_that_it_never_calls(pair, noise, tmp_path):
    """Auxiliary heads of a network under repair, for one; torch waits for gradients of all parameters unless told."""
    (tmp_path / "net.py").write_text(NEVER_CALLED)
    namespace: dict = {"__name__": "net"}
    torch.manual_seed(0)
    exec(NEVER_CALLED, namespace)
    torch.save(namespace["Network"]().state_dict(), tmp_path / "net.pt")
    of_it = [
        "--arch",
        f"{tmp_path / 'net.py'}:Network",
        "--input-size",
        "1x32x32",
        "--bits",
        "3w32a",
        "--first-last-bits",
        "same",
    ]
    asked = [tmp_path / "net.pt", *of_it, "--finetune", "kd", "--data", noise, *TRAINED]
    alone("quantize", *asked, "-o", tmp_path / "one")
    ended = pair.run("quantize", *asked, "-o", tmp_path / "two")
    assert [code for code, _ in ended] == [0, 0], ended
    wanted, shared = (losses(tmp_path / name, "kd") for name in ("one", "two"))
    assert shared == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_two_processes_resume_a_training_to_the_same_bits(pair, noise, tmp_path):
    """SIGKILL one of two in the middle of the training; both again end where an undisturbed run does."""
    student = ["--student", "lenet5_bn_half", "--probe-images", "0", "--train-steps", "150", *TRAINED[2:]]
    asked = ["distill", DEMO, "--data", noise, *student]
    assert [code for code, _ in pair.run(*asked, "-o", tmp_path / "whole")] == [0, 0]
    folder = tmp_path / "killed"
    leader, other = doomed(*asked, "-o", folder)
    wait_for(lambda: trained_steps(folder) >= 20, leader)
    other.send_signal(signal.SIGKILL)
    for process in (leader, other):
        process.communicate(timeout=60)
    assert leader.returncode == 1
    assert 20 <= trained_steps(folder) < 150
    assert [code for code, _ in pair.run(*asked, "-o", folder, "--resume")] == [0, 0]
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_batches_that_cannot_be_shared_out_are_refused(pair, noise, tmp_path):
    asked = [DEMO, "--student", "lenet5_bn_half", "--data", noise, "--probe-images", "0", *TRAINED]
    leader, _ = pair.run("distill", *asked, "--train-batch-size", "15", "-o", tmp_path / "two")
    assert leader.code == 2
    assert "do not divide among 2 processes" in leader.errors


def test_statistics_of_a_shared_batch_are_those_of_the_whole(monkeypatch):
    """Two halves, exchanged by hand: outputs and gradients of torch's BatchNorm over both."""
    features = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, shared = nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3).train()
    halves = features.clone().requires_grad_(True)
    seen = features.clone().requires_grad_(True)
    (whole(seen) * features.cos()).sum().backward()
    # Every process holds one half; here both are in one, so that a mean over processes is the mean over halves.
    monkeypatch.setattr(parallel, "world", lambda: World(0, 2))
    monkeypatch.setattr(parallel, "mean", lambda values, everyone: values)
    with parallel.synchronised(shared, World(0, 2)):
        (shared(halves) * features.cos()).sum().backward()
    torch.testing.assert_close(halves.grad, seen.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.running_mean, whole.running_mean)
    assert type(shared) is nn.BatchNorm2d


# Beats follow each other closely, so that the end finds the thread in the store.
WORKING = """
import threading
from dfcompress import distributed
distributed.BEAT_SECONDS = 1e-5
everyone = distributed.world()
with everyone.session():
    assert everyone.all_gather(everyone.rank) == [0, 1]
assert threading.active_count() == 1
"""


@pytest.mark.slow
def test_no_thread_is_left_that_could_end_the_interpreter():
    for process in (processes := launched(2, ["-c", WORKING])):
        _, errors = process.communicate(timeout=120)
        assert not errors
    assert [process.returncode for process in processes] == [0, 0]


THIRD = """
import os, signal, time
from dfcompress import distributed
distributed.LOST_AFTER_SECONDS = 3.0
everyone = distributed.world()
with everyone.session():
    everyone.barrier()
    if everyone.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.slow
def test_of_three_processes_one_says_which_is_gone():
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in launched(3, ["-c", THIRD])]
    assert [code for _, code in ended] == [1, 1, -signal.SIGKILL]
    assert [errors.splitlines() for errors, _ in ended] == [
        ["dfcompress: process 2 of 3 is gone; the same line with --resume goes on."],
        [],
        [],
    ]


def worlds(count, monkeypatch):
    """The processes of a job as threads of one, over a store in memory: the keys that each asks for."""
    everyone, store, asked = [World(rank, count) for rank in range(count)], HashStore(), [[] for _ in range(count)]

    class Asked:
        def __init__(self, keys):
            self.keys = keys

        def __getattr__(self, operation):
            def ask(keys, *values):
                self.keys.extend([keys] if isinstance(keys, str) else keys)
                return getattr(store, operation)(keys, *values)

            return ask

    for each, keys in zip(everyone, asked, strict=True):
        each._store = Asked(keys)
        monkeypatch.setattr(each, "_join", lambda: None)
    return everyone, asked


def test_threads_may_hold_the_session_and_watch_no_more_than_they_must(monkeypatch):
    """Python lets only the main thread handle signals; and of many processes each watches the main one."""
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.01)

    def work(each):
        with each.session():
            time.sleep(0.2)
            return each.all_gather(each.rank)

    everyone, asked = worlds(4, monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, everyone)) == [[0, 1, 2, 3]] * 4
    beats = [{key for key in keys if key.startswith("beat/")} for keys in asked]
    assert beats == [{f"beat/{rank}" for rank in range(4)}, *({"beat/0", f"beat/{rank}"} for rank in (1, 2, 3))]


def test_groups_leave_no_process_without_work(monkeypatch):
    """64 images in batches of 16 fill a step together, and would be the work of one process."""
    cuda, card = Execution("cuda", "bf16", False, 1, ""), ModelCard("tiny", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    job = SynthesisSpec(
        Classifier(nn.Identity(), card),
        None,
        Synthesis(images=64),
        choose("deepinversion", overrides={"batch_size": 16}, card=card),
        Labels((0,)),
    )
    groups = []
    for count in (1, 2, 4, 8):
        monkeypatch.setattr(set_execution, "world", lambda count=count: World(0, count))
        groups.append(set_execution._groups(job, cuda))
    assert groups == [4, 2, 1, 1]


def test_alone_everything_is_immediate():
    one = World()
    with one.session():
        one.barrier()
        assert one.broadcast({"a": 1}) == {"a": 1}
        assert one.all_gather({"a": 1}) == [{"a": 1}]
        assert list(one.claim([3, 4])) == [3, 4]
    assert one.is_main


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-05,9],login", "gpu03"), ("a1,a2", "a1"), ("node-[7,9]", "node-7")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("counts", "expected"), [("4", "4"), ("3,1", "31"), ("2(x3),1", "2221"), ("1,2(x2)", "122")])
def test_the_tasks_of_every_node_of_a_slurm_list(counts, expected):
    assert tasks_per_node(counts) == list(expected)


@pytest.mark.parametrize(("counts", "node", "here"), [("2(x2)", 1, 2), ("3,1", 0, 3), ("3,1", 1, 1), ("1(x2),2", 2, 2)])
def test_slurm_variables_are_understood(counts, node, here, monkeypatch):
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": counts,
        "SLURM_STEP_NODELIST": "gpu[1-2]",
        "SLURM_JOB_ID": "77",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found = world.__wrapped__()
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, here)
    assert os.environ["MASTER_ADDR"] == "gpu1"


def test_variables_that_are_no_numbers_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(BadInput, match="not all numbers"):
        world.__wrapped__()


@pytest.mark.slow
def test_an_adaptive_recipe_finishes_in_two_processes(pair, tmp_path):
    """One process updates the student; the other waits for it and not in a collective operation."""
    asked = [DEMO, "--recipe", "adaptive-deepinversion", "--images", "16", "--batch-size", "8", "--steps", "2"]
    asked += ["--set", "round_batches=1", *EAGER, "-q", "-o", tmp_path / "set"]
    ended = pair.run("invert", *asked)
    assert [code for code, _ in ended] == [0, 0], ended
    assert len(digests(tmp_path / "set")) == 2


def test_a_batchnorm_that_does_more_is_refused_in_several_processes():
    class Activated(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    with pytest.raises(BadInput, match="Activated cannot be trained by several processes"):
        parallel.require_plain(nn.Sequential(Activated(3)), World(0, 2))
    parallel.require_plain(nn.Sequential(Activated(3)), World())
