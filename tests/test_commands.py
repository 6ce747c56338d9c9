"""The command line as its users meet it: help, configuration, errors, exit codes, JSON."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dfcompress
from dfcompress.cli import root, run
from dfcompress.commands import _summary
from dfcompress.evaluation.onnx_check import Exported
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.training.multi_teacher import NAMES as METHODS
from dfcompress.training.multi_teacher import merging_method
from dfcompress.training.multi_teacher.logit_matching import TRAINING as MATCHED
from dfcompress.verbs import _quantize_defaults
from dfcompress.verbs._quantize_defaults import BEFORE_LSQ, FINETUNING, LARGE_LSQ, usual_calibration
from dfcompress.verbs.distill import DISTILLATION, distill
from dfcompress.verbs.invert import invert
from dfcompress.verbs.merge import merge
from dfcompress.verbs.quantize import quantize

COMMANDS = root.list_commands(None)


def _module(name):
    return importlib.import_module(f"dfcompress.{dfcompress._HOME[name]}")


def _parameters(name):
    return {parameter.name: parameter for parameter in root.get_command(None, name).params}


DEMO = Path(__file__).resolve().parents[1] / "dfcompress" / "demo_files"
QUICK = [
    "--images",
    "16",
    "--steps",
    "2",
    "--batch-size",
    "16",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--compile",
    "off",
]
SHORT_ROUNDING = ["--rounding-set", "steps=3"]  # Of the first half of blocks+lsq: 5 CPU seconds less.


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def answer(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_command_of_version_0_1_is_missing():
    others = {"bench", "demo", "doctor", "evaluate", "export", "inspect", "record"}
    assert others | {"distill", "invert", "merge", "quantize"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_and_ends_with_a_line_to_paste(command, capsys):
    arguments = [command, "step", "--help"] if command == "bench" else [command, "--help"]
    code, out, _ = answer(capsys, *arguments)
    assert code == 0
    assert f"Example:  dfcompress {command}" in out


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "dfcompress", "--version"], capture_output=True, text=True, check=True)
    assert "dfcompress" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["invrt"], "Did you mean 'invert'"),
        (["invert"], "Missing argument"),
        (["invert", DEMO, "--bots", "4"], "No such option"),
        (["distill", DEMO, "--epochs", "4"], "--train-steps"),
        (["invert", DEMO, "--iterations", "4"], "--steps"),
        (["compare", DEMO, "--data", "test.npz"], "--sets"),
        (["invert", "absent.pt"], "absent.pt does not exist"),
        (["invert", DEMO, "--recipe", "deepinvrsion"], "is not one of 'activation-records'"),
        (["invert", DEMO, "--set", "bn"], "has no '='"),
        (["invert", DEMO, "--set", "stps=1"], "Did you mean 'steps'"),
        (["invert", DEMO, "--steps", "2", "--set", "steps=3"], "--set steps=... is given beside the option for steps"),
        (["distill", DEMO, "--student", "half", "--train-lr", "1", "--train-set", "lr=2"], "beside the option for lr"),
        (["invert", DEMO, "--student", "lenet5_bn"], "The images of recipe deepinversion compete with no student"),
        (["quantize", DEMO, "--finetune", "none", "--temperature", "-3"], "--temperature -3.0 is not positive"),
        (["invert", DEMO, "--device", "tpu"], "--device 'tpu'"),
        (["invert", DEMO, "--precision", "fp16", "--device", "cpu"], "fp16 is not there yet"),
        (["invert", DEMO, "--input-size", "28"], "input"),
        (["invert", DEMO, "--set", "beta1=2"], "betas"),
        (["invert", DEMO, "--set", "schedule=foo"], "no schedule 'foo'"),
        (["invert", DEMO, "--lr", "0"], "rate 0"),
        (["invert", DEMO, "--resume", "--overwrite"], "exclude each other"),
        (["invert", DEMO, "--mean", "125"], "mean"),
        (["distill", DEMO, "--student", "lenet5", "--temperature", "0"], "--temperature"),
        (["distill", DEMO, "--student", "lenet5", "--images", "1"], "one image"),
        (["quantize", DEMO, "--temperature", "-1"], "--temperature"),
        (["quantize", DEMO, "--bits", "4"], "--bits '4'"),
        (["quantize", DEMO, "--bits", "int8"], "8w8a for int8"),
        (["quantize", DEMO, "--bits", "9w4a"], "9-bit weights"),
        (["quantize", DEMO, "--first-last-bits", "1"], "--first-last-bits 1"),
        (["quantize", DEMO, "--first-last-bits", "all"], "--first-last-bits all"),
        (["quantize", DEMO, "--layer-bits", "conv1"], "--layer-bits 'conv1' has no '='"),
        (["quantize", DEMO, "--layer-bits", "conv1=4"], "--layer-bits conv1 '4'"),
        (["quantize", DEMO, "--layer-bits", "layer9.*=8w8a"], "matches no layer"),
        (["quantize", DEMO, "--bits", "auto"], "--size-ratio 0.15"),
        (["quantize", DEMO, "--bits", "auto", "--size-ratio", "0.01"], "cannot be kept: with 2-bit weights"),
        (["quantize", DEMO, "--size-ratio", "0.1"], "Use --bits auto"),
        (["quantize", DEMO, "--calibrate", "median"], "'median' is not one of"),
        (["quantize", DEMO, "--finetune", "none", "--train-steps", "5"], "--finetune none trains nothing"),
        (["quantize", DEMO, "--finetune", "blocks", "--optimizer", "adam"], "called 'optimizer'"),
        (["quantize", DEMO, "--finetune", "blocks", "--train-lr", "0"], "is not possible"),
        (["quantize", DEMO, "--finetune", "blocks", "--objective", "kd"], "follows no --objective"),
        (["quantize", DEMO, "--finetune", "lsq", "--rounding-set", "steps=1"], "Use --finetune blocks+lsq"),
        (["quantize", DEMO, "--rounding-set", "step=1"], "called 'step'"),
        (["quantize", DEMO, "--target", "tensorrt"], "Add --export onnx"),
        (["quantize", DEMO, "--bits", "auto", "--size-ratio", "0.1", "--layer-bits", "*=4w4a"], "no layer left"),
        (["quantize", DEMO, "--bits", "9w9a", "--dry-run"], "9-bit weights"),
        (["quantize", DEMO, "--max-drop", "1"], "--max-drop needs real images"),
        (["quantize", DEMO, "--max-drop", "-1", "--eval-data", DEMO], "it is -1"),
        (["quantize", DEMO, "--min-agreement", "95"], "--min-agreement must be a share from 0 to 1; it is 95"),
        (["quantize", DEMO, "--export", "onnx", "--target", "tensorrt"], "kernels for int8 alone"),
        (["quantize", DEMO, "--placement", "all-tensors"], "other bits than 8w8a and 7w8a, as layer"),
        (["quantize", DEMO, "--bits", "8w8a", "--placement", "all-tensors", "--finetune", "lsq"], "--finetune lsq"),
        (
            ["quantize", DEMO, "--bits", "8w8a", "--method", "paper", "--export", "onnx", "--target", "tensorrt"],
            "--weight-grid symmetric",
        ),
        (["quantize"], "Missing argument 'MODEL'"),
        (["export", DEMO, "-o", "absent/model.onnx"], "there is no folder"),
        (["export", DEMO, "-o", "model.onnx", "--data", "absent"], "absent does not exist"),
        (["quantize", DEMO, "--data", "absent"], "absent does not exist"),
        (["distill", DEMO, "--student", "resnet19"], "Did you mean"),
        (["distill", DEMO, "--student", "lenet5", "--train-lr", "0"], "--train-lr"),
        (["evaluate", DEMO, "--data", "absent.npz"], "absent.npz does not exist"),
    ],
)
def test_a_wrong_call_is_one_clear_sentence_and_exit_2(arguments, message, capsys, tmp_path):
    code, out, err = answer(capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


class Malicious:
    def __reduce__(self):
        return (exec, ("open('executed', 'w').close()",))


def spoiled(kind, path):
    """A file that no command may accept."""
    state = {"conv1.weight": torch.zeros(4, 1, 3, 3)}
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not the weights you are looking for")
    elif kind == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": Malicious()}))
    elif kind == "malicious zip":
        torch.save({"state_dict": Malicious()}, path)
    elif kind == "torchscript":
        torch.jit.script(nn.Linear(2, 2)).save(path)
    elif kind == "truncated":
        torch.save({"weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "nan":
        torch.save({"conv1.weight": torch.full((4, 1, 3, 3), float("nan"))}, path)
    elif kind == "unknown":
        torch.save(state, path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["empty", "text", "malicious", "malicious zip", "torchscript", "truncated", "nan", "unknown"]
)
@pytest.mark.parametrize("command", ["inspect", "invert", "distill", "quantize", "evaluate", "export"])
def test_an_unusable_file_is_refused_by_every_command(kind, command, capsys, tmp_path):
    path = tmp_path / "model.pt"
    spoiled(kind, path)
    extra = {"distill": ["--student", "lenet5"], "evaluate": ["--data", DEMO]}.get(command, [])
    code, _, err = answer(capsys, command, path, *extra)
    assert code == 2, err
    assert "model.pt" in err
    assert "Traceback" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def untrained(tmp_path, batchnorm):
    """A readable LeNet-5 that nothing can be made from."""
    from dfcompress.models.architectures import find

    torch.save(find("lenet5_bn" if batchnorm else "lenet5").make(10, 1).state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize(
    ("allocate", "says"),
    [(lambda: torch.empty(2**50), "can't allocate memory"), (lambda: bytearray(2**50), "MemoryError")],
)
def test_memory_that_does_not_suffice_is_one_sentence_and_exit_1(allocate, says, resnet20_file, capsys, monkeypatch):
    monkeypatch.setattr("dfcompress.verbs.bench_step.bench_step", lambda *args, **options: allocate())
    code, _, err = answer(capsys, "bench", "step", resnet20_file)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("dfcompress: memory did not suffice: ")
    assert says in err
    assert "smaller --batch-size" in err


@pytest.mark.parametrize(("batchnorm", "why"), [(True, "never trained"), (False, "no BatchNorm")])
def test_a_model_that_cannot_be_inverted_is_inspected_all_the_same(batchnorm, why, capsys, tmp_path):
    arch = ["--arch", "lenet5_bn" if batchnorm else "lenet5"]
    path = untrained(tmp_path, batchnorm)
    code, out, _ = answer(capsys, "inspect", path, *arch)
    assert code == 0
    assert why in out
    code, _, err = answer(capsys, "invert", path, *arch)
    assert code == 2
    assert why in err


def test_inspect_prints_one_object_with_the_promised_fields(capsys):
    code, out, err = answer(capsys, "inspect", DEMO, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"architecture", "classes", "input_size", "parameters", "macs", "batchnorm_layers"} <= found.keys()
    assert (found["architecture"], found["classes"], found["input_size"]) == ("lenet5_bn", 10, [1, 32, 32])
    assert err == ""


def test_the_main_job_runs_on_a_checkpoint_and_nothing_else(capsys, tmp_path):
    """invert → distill → quantize → evaluate, with the promised fields, tiny."""
    code, out, _ = answer(capsys, "invert", DEMO, *QUICK, "-o", "images", "--json")
    made = json.loads(out)
    assert code == 0
    assert {"output", "images", "seconds", "teacher_top1", "bn_divergence", "verify"} <= made.keys()
    assert made["images"] == 16

    common = ["--data", "images", "--train-steps", "2", "--compile", "off", "--json"]
    code, out, _ = answer(capsys, "distill", DEMO, "--student", "lenet5_bn_half", *common, "-o", "student")
    student = json.loads(out)
    assert code == 0
    assert {"output", "checkpoint", "bytes", "bytes_ratio", "seconds"} <= student.keys()
    assert set(student["seconds"]) == {"synthesis", "training", "comparison", "total"}

    line = ["quantize", DEMO, "--bits", "w4a4", *common, *SHORT_ROUNDING, "-o", "packed", "--eval-data", "images"]
    code, out, _ = answer(capsys, *line)
    packed = json.loads(out)
    assert code == 0
    assert packed["bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert packed["bytes_ratio"] < 0.17
    assert packed["evaluation"]["results"][0]["total"] == 16
    parts = {name: seconds for name, seconds in packed["seconds"].items() if name != "total"}
    assert parts["evaluation"] > 0
    assert packed["seconds"]["total"] == pytest.approx(sum(parts.values()), abs=0.05)

    code, out, _ = answer(
        capsys, "evaluate", DEMO, student["checkpoint"], packed["checkpoint"], "--data", DEMO, "--json"
    )
    results = json.loads(out)["results"]
    assert code == 0
    assert [row["total"] for row in results] == [10_000] * 3
    assert results[0]["correct"] == 9951
    assert {"checkpoint", "correct", "total", "top1", "top5", "agreement"} <= results[0].keys()


def test_a_gate_that_is_not_met_prints_the_table_and_exits_3(capsys, tmp_path):
    np.savez(tmp_path / "noise.npz", images=np.zeros((20, 1, 32, 32), np.uint8), labels=np.arange(20) % 10)
    code, out, err = answer(capsys, "evaluate", DEMO, "--data", "noise.npz", "--fail-under", "50")
    assert code == 3
    assert "2/20" in out
    assert "below --fail-under" in err


def test_a_dry_run_shows_what_would_be_done_and_touches_nothing(capsys, tmp_path):
    distill = ["distill", "--student", "lenet5_bn_half"]
    for command, images in ((["invert"], [16]), (["quantize"], [8, 8]), (distill, [8, 8, 128])):
        code, out, _ = answer(capsys, command[0], DEMO, *command[1:], *QUICK, "--dry-run", "--json")
        planned = json.loads(out)["synthesis"]
        assert code == 0
        assert [each["images"] for each in planned] == images
        assert {each["steps"] for each in planned} == {2}
        assert all(each["seconds"] > 0 for each in planned)
    assert list(tmp_path.iterdir()) == []


def test_the_papers_quantization_is_planned_with_its_own_values_and_those_that_were_given(capsys):
    line = ["quantize", DEMO, "--method", "paper", "--data", DEMO, "--dry-run", "--json"]
    planned = json.loads(answer(capsys, *line)[1])["training"]
    assert (planned["steps"], planned["batch_size"]) == (16_000, 512)
    planned = json.loads(answer(capsys, *line, "--train-steps", "50")[1])["training"]
    assert (planned["steps"], planned["batch_size"]) == (50, 512)
    assert json.loads(answer(capsys, *line, "--finetune", "none")[1])["training"] is None


def test_options_of_calibration_reach_it_by_name(capsys):
    asked = "--calibrate minmax --weight-ranges minmax --weight-grid asymmetric --calibration-steps 1 --replacement"
    line = ["quantize", DEMO, "--data", DEMO, "--finetune", "none", "--compile", "off", "-o", "packed"]
    assert answer(capsys, *line, *asked.split(), "--no-correction", "--signed")[0] == 0
    found = json.loads(Path("packed/run.json").read_text())["options"]["calibration"]
    assert found == {
        "inputs": "minmax",
        "weights": "minmax",
        "steps": 1,
        "signed": True,
        "correction": False,
        "weight_grid": "asymmetric",
        "replacement": True,
    }


def test_the_command_line_beats_the_environment_beats_the_file(capsys, tmp_path, monkeypatch):
    (tmp_path / "dfcompress.toml").write_text(
        'images = 32\nsteps = 7\nset = "bn=2"\n[invert]\nsteps = 5\nseed = 3\n[quantize]\nbits = "2w2a"\n'
    )
    monkeypatch.setenv("DFCOMPRESS_MODEL", str(DEMO))
    monkeypatch.setenv("DFCOMPRESS_IMAGES", "24")
    monkeypatch.setenv("DFCOMPRESS_SET", "bn=3 ce=2")
    common = ["--compile", "off", "--precision", "fp32", "--dry-run", "--json"]
    planned = json.loads(answer(capsys, "invert", *common)[1])["synthesis"][0]
    assert (planned["images"], planned["steps"]) == (24, 5)
    assert (planned["recipe"]["settings"]["bn"], planned["recipe"]["settings"]["ce"]) == (3.0, 2.0)
    planned = json.loads(answer(capsys, "invert", "--images", "16", "--steps", "2", *common)[1])["synthesis"][0]
    assert (planned["images"], planned["steps"]) == (16, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imags = 3", "Did you mean 'images'"),
        ("[invrt]\nsteps = 1", "Did you mean 'invert'"),
        ("[invert]\nbits = '4w4a'", "no option of invert"),
        ("steps = ", "is not TOML"),
        ("images = [1, 2]", "[1, 2] is not a value of images. Write one number or text."),
        ("images = 4.7", "'4.7' is not a valid integer"),
        ("seed = true", "True is not a value of seed"),
        ("overwrite = 1", "Write true or false"),
    ],
)
def test_a_wrong_configuration_file_is_refused(text, message, capsys, tmp_path):
    (tmp_path / "settings.toml").write_text(text)
    code, _, err = answer(capsys, "invert", DEMO, "--config", "settings.toml")
    assert code == 2
    assert message in err


def test_resuming_a_finished_run_gives_its_result_and_redoes_nothing(capsys, tmp_path):
    line = ["quantize", DEMO, "--data", DEMO, "--train-steps", "2", *SHORT_ROUNDING, "--compile", "off", "--json"]
    line += ["-o", "packed"]
    first = json.loads(answer(capsys, *line)[1])
    written = (tmp_path / "packed" / "model.safetensors").stat().st_mtime_ns
    assert json.loads(answer(capsys, *line, "--resume")[1]) == first
    evaluated = json.loads(answer(capsys, *line, "--resume", "--eval-data", DEMO)[1])
    assert evaluated["evaluation"]["results"][0]["total"] == 10_000
    kept = json.loads((tmp_path / "packed" / "run.json").read_text())["measurements"]
    assert {name: kept[name] for name in evaluated} == evaluated
    assert (tmp_path / "packed" / "model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / "packed" / "training.partial").exists()


def test_a_wrong_path_of_evaluation_data_is_found_before_any_work(capsys, tmp_path):
    code, _, err = answer(capsys, "quantize", DEMO, *QUICK, "--eval-data", "absent.npz")
    assert code == 2
    assert "absent.npz does not exist" in err
    assert list(tmp_path.iterdir()) == []


def test_overwriting_never_deletes_what_the_run_reads(capsys, tmp_path):
    answer(capsys, "invert", DEMO, *QUICK, "-o", "images")
    code, _, err = answer(capsys, "quantize", DEMO, "--data", "images", "-o", "images", "--overwrite")
    assert code == 2
    assert "would delete images" in err
    assert (tmp_path / "images" / "dataset.json").exists()


def test_quiet_is_quiet_from_the_command_line_the_environment_and_the_file(capsys, tmp_path, monkeypatch):
    line = ["evaluate", DEMO, "--data", DEMO]
    assert answer(capsys, *line)[2] != ""
    assert answer(capsys, *line, "-q")[2] == ""
    monkeypatch.setenv("DFCOMPRESS_QUIET", "1")
    assert answer(capsys, *line)[2] == ""
    monkeypatch.delenv("DFCOMPRESS_QUIET")
    (tmp_path / "dfcompress.toml").write_text("quiet = true")
    assert answer(capsys, *line)[2] == ""


def test_a_factory_of_the_users_own_is_quantized_and_read_again_when_named(capsys, tmp_path):
    source = "from dfcompress.models.architectures import find\ndef make():\n    return find('lenet5_bn').make(10, 1)\n"
    (tmp_path / "net.py").write_text(source)
    own = ["--arch", "net.py:make", "--input-size", "1x32x32"]
    line = ["quantize", DEMO, *own, "--data", DEMO, "--train-steps", "1", *SHORT_ROUNDING, "--compile", "off", "--json"]
    line += ["-o", "packed"]
    assert answer(capsys, *line)[0] == 0
    code, _, err = answer(capsys, "evaluate", "packed", "--data", DEMO)
    assert code == 2
    assert "code runs only when you name it" in err
    assert answer(capsys, "evaluate", "packed", "--data", DEMO, "--arch", "net.py:make")[0] == 0


def test_what_help_says_of_training_is_what_the_verbs_do():
    """Help must not import torch, so it repeats names and numbers that belong to the verbs."""
    usual = {"distill": DISTILLATION, "merge": MATCHED, "quantize": FINETUNING["blocks+lsq"]}
    for name, training in usual.items():
        told = {parameter.name: parameter for parameter in root.get_command(None, name).params}
        for field in ("steps", "lr", "batch_size"):
            first, _, others = told[f"train_{field}"].show_default.partition(", or ")
            assert first == str(getattr(training, field))
            if name == "quantize":
                assert f"{getattr(FINETUNING['blocks'], field)} with --finetune blocks" in others
                assert others.startswith(f"{getattr(LARGE_LSQ, field)} ")
        if name == "merge":
            assert tuple(told["method"].type.choices) == METHODS


TINY = {"compute": Compute(device="cpu", precision="fp32", compile="off"), "training": {"steps": 1, "batch_size": 8}}
OTHER = {"class_names": tuple(f"other {number}" for number in range(10))}
LINES = {
    "invert": ([], lambda out, few: invert(DEMO, output=out, synthesis=few, compute=TINY["compute"])),
    "distill": (
        ["--student", "half"],
        lambda out, few: distill(DEMO, student="half", output=out, synthesis=few, **TINY),
    ),
    "distill with data": (
        ["--student", "half", "--data", DEMO],
        lambda out, few: distill(DEMO, student="half", data=DEMO, output=out, synthesis=few, **TINY),
    ),
    "merge": (
        ["other", "--student", "lenet5_bn"],
        lambda out, few: merge([DEMO, "other"], student="lenet5_bn", output=out, synthesis=few, **TINY),
    ),
    "merge with data": (
        ["other", "--student", "lenet5_bn", "--data", DEMO, "--data", DEMO],
        lambda out, few: merge([DEMO, "other"], student="half", data=[DEMO] * 2, output=out, synthesis=few, **TINY),
    ),
    "merge as the paper": (
        ["other", "--student", "lenet5_bn", "--method", "paper"],
        lambda out, few: merge([DEMO, "other"], student="lenet5_bn", method="paper", output=out, synthesis=few, **TINY),
    ),
    "quantize": (
        ["--finetune", "lsq"],
        lambda out, few: quantize(DEMO, finetune="lsq", output=out, synthesis=few, **TINY),
    ),
    "quantize with data": (
        ["--finetune", "lsq", "--data", DEMO],
        lambda out, few: quantize(DEMO, finetune="lsq", data=DEMO, output=out, **TINY),
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_dry_run_on_the_command_line_plans_the_sets_that_the_verb_makes_in_python(line, capsys, tmp_path):
    """As many images, of the same recipes, and the same training, where no number was asked for in either."""
    other = load(DEMO)
    save(Classifier(other.network, replace(other.card, **OTHER), sha256="other"), tmp_path / "other")
    asked, verb = LINES[line]
    large = ["--steps", "1", "--batch-size", "512", "--device", "cpu", "--precision", "fp32", "--compile", "off"]
    trained = ["--train-steps", "1", "--train-batch-size", "8"] if line != "invert" else []
    code, out, err = answer(capsys, line.split()[0], DEMO, *asked, *large, *trained, "--dry-run", "--json")
    assert code == 0, err
    planned = json.loads(out)
    verb(tmp_path / "out", Synthesis(settings={"steps": 1, "batch_size": 512}))
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("dataset.json")]
    made = [(each["recipe"], each["images"], len(each["shards"])) for each in manifests]
    told = [(each["recipe"], each["images"], each["batches"]) for each in planned["synthesis"]]
    assert sorted(told, key=str) == sorted(made, key=str)
    assert bool(made) == (line != "quantize with data")
    if line != "invert":
        assert planned["training"] == json.loads((tmp_path / "out" / "run.json").read_text())["options"]["training"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if "images" in _parameters(name)])
def test_help_tells_how_many_images_a_verb_makes(name):
    """The verb's own number stands in its module; help must not import torch, so it repeats it."""
    module = _quantize_defaults if name == "quantize" else _module(name)
    usual, _, others = _parameters(name)["images"].show_default.partition(", or ")
    assert usual == str(merging_method("logit-matching").images if name == "merge" else module.IMAGES)
    of_shapira_sidi = f"{merging_method('shapira-sidi').images} with --method shapira-sidi"
    by_size = f"{getattr(module, 'LARGE_IMAGES', None)} for images of more than 64 pixels a side"
    of_calibration = f"{module.CALIBRATION_IMAGES} for calibration alone, or " if name == "quantize" else ""
    of_generator = f", or {module.GENERATED} from a generator" if name == "distill" else ""
    assert others == (of_shapira_sidi if name == "merge" else of_calibration + by_size + of_generator)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in dfcompress.__all__])
def test_a_verb_has_the_same_defaults_on_the_command_line_and_in_python(name):
    told, verb = _parameters(name), getattr(_module(name), name)
    for own in inspect.signature(verb).parameters.values():
        if own.name in told and own.default is not inspect.Parameter.empty:
            default = told[own.name].default
            given = None if str(default).endswith("UNSET") else default  # So newer versions of click say it.
            assert str(given or None) == str(own.default or None), own.name


def test_a_dry_run_tells_of_the_rounding_before_lsq(capsys):
    for asked, rounding in (
        ([], BEFORE_LSQ),
        (["--finetune", "lsq"], None),
        (["--train-steps", "0"], None),
        (["--rounding-set", "steps=7", "--rounding-set", "lr=0.5"], replace(BEFORE_LSQ, steps=7, lr=0.5)),
        (["--rounding-set", "steps=0"], None),
    ):
        _, out, _ = answer(capsys, "quantize", DEMO, "--data", DEMO, *asked, "--dry-run", "--json")
        planned = json.loads(out)
        assert planned["rounding"] == (asdict(rounding) if rounding else None)
        assert (planned["predicted_seconds"]["calibration"], "rounding" in planned["predicted_seconds"]) == (
            None,
            rounding is not None,
        )


def test_a_dry_run_names_the_parts_that_its_seconds_leave_out(capsys):
    shown = answer(capsys, "quantize", DEMO, "--data", DEMO, "--dry-run")[1]
    assert re.search(r"^at least \d+ s in all \(calibration and rounding not estimated\), on a machine", shown, re.M)
    shown = answer(capsys, "distill", DEMO, "--student", "half", "--data", DEMO, "--dry-run")[1]
    assert re.search(r"^about \d+ s in all, on a machine", shown, re.M)


def test_none_on_the_command_line_is_nothing_in_python(capsys, tmp_path):
    none = ["--student-init", "none", "--second-recipe", "none"]
    line = ["distill", DEMO, "--student", "lenet5_bn", *none, *QUICK, "--dry-run", "--json"]
    planned = json.loads(answer(capsys, *line, "--probe-images", "0")[1])
    assert [each["images"] for each in planned["synthesis"]] == [16]
    asked = {"synthesis": Synthesis(images=16), "second_recipe": None, "probe_images": 0}
    plan = distill.plan(DEMO, student="lenet5_bn", student_init=None, **asked)
    assert len(plan.synthesis) == 1
    assert plan.options["student_init"] is None


FEW = ["--data", DEMO, "--compile", "off", "--train-steps", "2", "-o", "packed", "--json"]


@pytest.mark.parametrize("finetune", ["blocks+lsq", "lsq", "kd", "blocks"])
def test_every_way_of_fine_tuning_gives_a_model_that_is_read_again(finetune, capsys, tmp_path):
    code, out, _ = answer(capsys, "quantize", DEMO, "--finetune", finetune, *FEW)
    result = json.loads(out)
    assert code == 0
    rounding = {"rounding"} if finetune == "blocks+lsq" else set()
    assert set(result["seconds"]) == {"synthesis", "calibration", "training", "comparison", "total"} | rounding
    measured = json.loads(answer(capsys, "evaluate", DEMO, "packed", "--data", DEMO, "--json")[1])["results"]
    assert measured[1]["correct"] > 9600
    layers = json.loads((tmp_path / "packed" / "quantization.json").read_text())["layers"]
    assert [(row["layer"], row["weight_bits"], row["input_bits"]) for row in layers] == [
        ("conv1", 8, 8),
        ("conv2", 4, 4),
        ("fc1", 4, 4),
        ("fc2", 4, 4),
        ("fc3", 8, 8),
    ]
    assert all(row["input_low"] < row["input_high"] and row["signal_to_noise"] > 3 for row in layers)
    assert max(layers, key=lambda row: row["sensitivity"])["weight_bits"] == 4


def test_the_table_names_every_layer_and_those_left_in_float(capsys):
    line = ["quantize", DEMO, "--data", DEMO, "--finetune", "none", "--layer-bits", "conv2=float", "-o", "packed"]
    code, out, _ = answer(capsys, *line, "--layer-bits", "fc1=2w32a")
    assert code == 0
    assert "fc1" in out
    assert "2w32a" in out
    assert "conv2 (float) stays in float" in out


def test_chosen_bits_keep_the_size_in_the_file(capsys, tmp_path):
    line = ["quantize", DEMO, "--data", DEMO, "--finetune", "none", "--bits", "auto", "--size-ratio", "0.12", "--json"]
    code, out, _ = answer(capsys, *line, "-o", "packed")
    assert code == 0
    assert 0.115 < json.loads(out)["bytes_ratio"] <= 0.12


def test_gates_print_the_result_and_exit_3_where_they_are_missed(capsys, tmp_path):
    line = ["quantize", DEMO, "--data", DEMO, "--bits", "2w2a", "--finetune", "none", "--first-last-bits", "same"]
    line += ["--eval-data", DEMO, "--overwrite", "-o", "packed"]
    assert answer(capsys, *line, "--min-agreement", "0.01", "--max-drop", "99")[0] == 0
    code, out, err = answer(capsys, *line, "--min-agreement", "0.999")
    assert code == 3
    assert "below --min-agreement" in err
    assert "packed" in out
    code, _, err = answer(capsys, *line, "--max-drop", "0.01")
    assert code == 3
    assert "points, more than --max-drop 0.01" in err
    assert (tmp_path / "packed" / "model.safetensors").exists()


def test_export_beside_the_model_and_by_its_own_command_is_the_same_file(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    line = ["quantize", DEMO, "--data", DEMO, "--finetune", "none", "--export", "onnx", "-o", "packed", "--json"]
    code, out, _ = answer(capsys, *line)
    exported = json.loads(out)["export"]
    assert code == 0
    assert exported["equal"] >= exported["images"] - 1 > 900
    assert exported["bytes"] == (tmp_path / "packed" / "model.onnx").stat().st_size
    code, out, _ = answer(capsys, "export", "packed", "-o", "again.onnx", "--data", DEMO)
    assert code == 0
    equal, images = map(int, re.search(r"(\d+) of (\d+) answers are equal", out).groups())
    assert images > exported["images"]  # Of --data the command compares all, the verb the part to train on.
    assert equal >= images - 1
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "packed" / "model.onnx").read_bytes()
    assert answer(capsys, "export", "packed", "-o", "again.onnx")[0] == 2


def test_what_is_quantized_already_is_not_quantized_again(capsys):
    answer(capsys, "quantize", DEMO, "--data", DEMO, "--finetune", "none", "-o", "packed")
    code, _, err = answer(capsys, "quantize", "packed", "--data", DEMO, "-o", "again")
    assert code == 2
    assert "is quantized already" in err


def test_the_model_may_be_named_by_the_environment_or_the_configuration(capsys, tmp_path, monkeypatch):
    line = ["quantize", "--data", DEMO, "--dry-run", "--json"]
    code, _, err = answer(capsys, *line)
    assert code == 2
    assert "DFCOMPRESS_MODEL" in err
    (tmp_path / "dfcompress.toml").write_text(f'model = "{DEMO}"')
    assert answer(capsys, *line)[0] == 0
    (tmp_path / "dfcompress.toml").unlink()
    monkeypatch.setenv("DFCOMPRESS_MODEL", str(DEMO))
    assert answer(capsys, *line)[0] == 0


def test_a_student_begins_with_the_weights_of_a_quantized_model(capsys, tmp_path):
    asked = ["--finetune", "none", "--bits", "8w8a", "--placement", "layer-inputs"]
    answer(capsys, "quantize", DEMO, "--data", DEMO, *asked, "-o", "packed")
    line = ["distill", DEMO, "--student-init", "packed", "--data", DEMO, "--probe-images", "0", "--train-steps", "0"]
    code, out, _ = answer(capsys, *line, "-o", "student", "--json", "--eval-data", DEMO)
    rows = json.loads(out)["evaluation"]["results"]
    assert code == 0
    assert rows[1]["correct"] > 9900
    assert json.loads(out)["bytes_ratio"] > 0.99


UNTAUGHT = """
from dfcompress.models.architectures import named


def cut(classes=10, channels=1):
    network = named("lenet5_bn").make(classes, channels)
    network.register_forward_hook(lambda module, _, logits: logits.detach() if module.training else logits)
    return network
"""


@pytest.mark.parametrize(
    "line",
    [
        ["invert", DEMO, "--recipe", "adaptive-deepinversion"],
        ["distill", DEMO, "--recipe", "adaptive-deepinversion"],
        ["distill", DEMO],
        ["merge", DEMO, "other"],
    ],
)
def test_a_dry_run_is_refused_as_the_verb_is_where_the_student_cannot_be_trained(line, capsys):
    other = load(DEMO)
    save(Classifier(other.network, replace(other.card, **OTHER), sha256="other"), Path("other"))
    Path("net.py").write_text(UNTAUGHT.replace("classes=10", f"classes={20 if line[0] == 'merge' else 10}"))
    student = ["--student", "net.py:cut", *QUICK]
    refused = [answer(capsys, *line, *student, *more) for more in (["--dry-run"], ["-o", "out"])]
    assert refused[0] == refused[1]
    assert refused[0][0] == 2
    assert "cannot be trained" in refused[0][2]
    assert not Path("out").exists()


def test_a_dry_run_of_quantize_is_refused_as_the_verb_is_where_no_gradient_reaches_the_network(capsys):
    always = UNTAUGHT.replace(" if module.training else logits", "")
    Path("net.py").write_text(always)
    torch.save(load(DEMO).network.state_dict(), "cut.pt")
    line = [
        "quantize",
        "cut.pt",
        "--arch",
        "net.py:cut",
        "--input-size",
        "1x32x32",
        "--data",
        DEMO,
        "--train-steps",
        "1",
    ]
    refused = [answer(capsys, *line, *more) for more in (["--dry-run"], ["-o", "out"])]
    assert refused[0] == refused[1]
    assert refused[0][0] == 2
    assert "--finetune none" in refused[0][2]
    assert "not adaptive" in refused[0][2]


def test_a_dry_run_of_quantize_tells_bits_grids_and_runtime(capsys):
    pytest.importorskip("onnxruntime")
    line = ["quantize", DEMO, "--data", DEMO, "--dry-run"]
    _, out, _ = answer(capsys, *line, "--bits", "4w4a", "--finetune", "none")
    assert "bits: 2 layers 8w8a, 3 layers 4w4a; grids on layer-inputs, fine-tuning none\n" in out
    _, out, _ = answer(capsys, *line, "--bits", "7w8a", "--export", "onnx")
    assert "bits: 5 layers 7w8a; grids on all-tensors, fine-tuning none, exported for onnxruntime\n" in out


def test_a_pruned_file_that_is_not_faster_is_answered_with_what_prune_has_for_that(capsys):
    measured = {"equal": 8, "equal_rewritten": 8, "equal_unsaturated": None, "milliseconds_fp32": 4.0}
    differences = {"median_difference": 0.0, "largest_difference": 0.0}
    file = {"path": "m.onnx", "target": "onnxruntime", "bytes": 9, "bytes_ratio": 0.9, "images": 8}
    for milliseconds, said in ((4.0, "not faster here: onnxruntime computes 8 or 16"), (2.0, "2.0 times faster\n")):
        result = Exported(**file, **measured, **differences, milliseconds=milliseconds)
        _summary.exported(result, slow=_summary.SLOW_PRUNED)
        assert said in capsys.readouterr().out


def test_a_dry_run_of_quantize_tells_how_it_calibrates(capsys):
    line = ["quantize", DEMO, "--data", DEMO, "--calibrate", "minmax", "--dry-run"]
    told = json.loads(answer(capsys, *line, "--json")[1])["calibration"]
    assert told == asdict(usual_calibration("default", {"inputs": "minmax"}, input_size=(1, 28, 28)))
    assert "calibration: inputs=minmax weights=mse" in answer(capsys, *line)[1]
