"""The command line as its users meet it: help, configuration, errors, exit codes, JSON."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfcompress.cli import root, run
from dfcompress.quantization.quantize import FINETUNING
from dfcompress.training.distill import DISTILLATION
from dfcompress.training.merge import MERGING
from dfcompress.training.merging import METHODS

COMMANDS = root.list_commands(None)
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


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def answer(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_folder_holds_the_commands_of_this_version():
    names = ["bench", "demo", "distill", "doctor", "evaluate", "inspect", "invert", "merge", "quantize", "record"]
    assert names == COMMANDS


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
        (["invert", "absent.pt"], "absent.pt does not exist"),
        (["invert", DEMO, "--recipe", "deepinvrsion"], "is not one of 'activation-records'"),
        (["invert", DEMO, "--set", "bn"], "has no '='"),
        (["invert", DEMO, "--set", "stps=1"], "Did you mean 'steps'"),
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
        (["quantize", DEMO, "--bits", "9w4a"], "9-bit weights"),
        (["quantize", DEMO, "--first-last-bits", "1"], "--first-last-bits 1"),
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
@pytest.mark.parametrize("command", ["inspect", "invert", "distill", "quantize", "evaluate"])
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
    assert set(student["seconds"]) == {"synthesis", "training", "total"}

    code, out, _ = answer(capsys, "quantize", DEMO, "--bits", "w4a4", *common, "-o", "packed", "--eval-data", "images")
    packed = json.loads(out)
    assert code == 0
    assert packed["bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert packed["bytes_ratio"] < 0.17
    assert packed["evaluation"]["results"][0]["total"] == 16

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
    for command, images in ((["invert"], [16]), (["quantize"], [16]), (distill, [8, 8, 128])):
        code, out, _ = answer(capsys, command[0], DEMO, *command[1:], *QUICK, "--dry-run", "--json")
        planned = json.loads(out)["synthesis"]
        assert code == 0
        assert [each["images"] for each in planned] == images
        assert {each["steps"] for each in planned} == {2}
        assert all(each["seconds"] > 0 for each in planned)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_beats_the_environment_beats_the_file(capsys, tmp_path, monkeypatch):
    (tmp_path / "dfcompress.toml").write_text(
        'images = 32\nsteps = 7\n[invert]\nsteps = 5\nseed = 3\n[quantize]\nbits = "2w2a"\n'
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
    ],
)
def test_a_wrong_configuration_file_is_refused(text, message, capsys, tmp_path):
    (tmp_path / "settings.toml").write_text(text)
    code, _, err = answer(capsys, "invert", DEMO, "--config", "settings.toml")
    assert code == 2
    assert message in err


def test_resuming_a_finished_run_gives_its_result_and_redoes_nothing(capsys, tmp_path):
    line = ["quantize", DEMO, "--data", DEMO, "--train-steps", "2", "--compile", "off", "-o", "packed", "--json"]
    first = json.loads(answer(capsys, *line)[1])
    written = (tmp_path / "packed" / "model.safetensors").stat().st_mtime_ns
    assert json.loads(answer(capsys, *line, "--resume")[1]) == first
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
    line = ["quantize", DEMO, *own, "--data", DEMO, "--train-steps", "1", "--compile", "off", "-o", "packed", "--json"]
    assert answer(capsys, *line)[0] == 0
    code, _, err = answer(capsys, "evaluate", "packed", "--data", DEMO)
    assert code == 2
    assert "code runs only when you name it" in err
    assert answer(capsys, "evaluate", "packed", "--data", DEMO, "--arch", "net.py:make")[0] == 0


def test_what_help_says_of_training_is_what_the_verbs_do():
    """Help must not import torch, so it repeats names and numbers that belong to the verbs."""
    usual = {"distill": DISTILLATION, "merge": MERGING, "quantize": FINETUNING}
    for name, training in usual.items():
        told = {parameter.name: parameter for parameter in root.get_command(None, name).params}
        for field in ("steps", "lr", "batch_size"):
            assert told[f"train_{field}"].show_default == str(getattr(training, field))
        if name == "merge":
            assert tuple(told["method"].type.choices) == METHODS


def test_a_dry_run_with_data_plans_no_synthesis(capsys):
    code, out, _ = answer(capsys, "quantize", DEMO, "--data", DEMO, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["synthesis"] == []
