"""A run's folder: nothing half-written, nothing of somebody else's touched."""

from __future__ import annotations

import json
import shlex
import stat
from importlib import resources
from itertools import pairwise

import pytest

from dfcompress import cli, console, run
from dfcompress.command_line import started_by
from dfcompress.errors import BadInput
from dfcompress.run import Clock, Run, check_output, write_atomically

DEMO = str(resources.files("dfcompress") / "demo_files")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), write_atomically(tmp_path / "result") as path:  # noqa: PT012
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with write_atomically(tmp_path / "result") as path:
        path.write_text("whole")
    assert (tmp_path / "result").read_text() == "whole"


def test_a_result_may_be_read_by_others(tmp_path):
    with write_atomically(tmp_path / "result") as path:
        path.touch(0o600)
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) & 0o044 == 0o044


def test_a_record_keeps_options_measurements_and_versions(tmp_path):
    opened = Run("invert", tmp_path / "run", {"seed": 3})
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    opened.finish({"images": 5})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    assert (record["verb"], record["options"], record["measurements"]) == ("invert", {"seed": 3}, {"images": 5})
    assert set(record["versions"]) == {"dfcompress", "torch", "python"}


def test_resuming_asks_for_the_same_verb_and_options(tmp_path):
    Run("invert", tmp_path / "run", {"seed": 3})
    Run("invert", tmp_path / "run", {"seed": 3}, resume=True)
    with pytest.raises(BadInput, match="seed = 3, now it is 4"):
        Run("invert", tmp_path / "run", {"seed": 4}, resume=True)
    with pytest.raises(BadInput, match="holds a run of 'invert'"):
        Run("distill", tmp_path / "run", {"seed": 3}, resume=True)


def test_overwriting_starts_anew_but_only_what_dfcompress_made(tmp_path):
    Run("invert", tmp_path / "run", {"seed": 3})
    (tmp_path / "run" / "shard").touch()
    Run("invert", tmp_path / "run", {"seed": 4}, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "thesis").touch()
    with pytest.raises(BadInput, match="was not made by dfcompress"):
        Run("invert", tmp_path / "run", {"seed": 4}, overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"experiment": "mine", "tool": "other"}',
        '{"verb": "train", "options": {}}',
        '{"verb": ["invert"], "options": {}}',
        '{"verb": "invert"}',
        "[" * 100_000,
        "not JSON",
        None,
    ],
    ids=["other", "other verb", "no verb", "no options", "nested", "text", "folder"],
)
def test_a_folder_with_a_record_of_another_program_is_not_overwritten(content, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    (tmp_path / "run.json").mkdir() if content is None else (tmp_path / "run.json").write_text(content)
    with pytest.raises(BadInput, match="was not made by dfcompress"):
        Run("invert", tmp_path, {}, overwrite=True)
    with pytest.raises(BadInput, match="was not made by dfcompress"):
        check_output(tmp_path, resume=False, overwrite=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"run.json", "thesis", "chapter1.tex"}
    assert content is None or (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize("change", [{}, {"finished": False, "measurements": None}, {"options": {}}, {"schema": 99}])
def test_a_record_of_ours_may_be_overwritten_whatever_it_tells(change, tmp_path):
    Run("quantize", tmp_path, {"seed": 3}).finish({})
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | change))
    Run("invert", tmp_path, {}, overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text())["verb"] == "invert"


def test_a_record_of_an_older_version_resumes_where_only_names_have_changed(tmp_path):
    """A value has another name, and a setting that was off is gone; where it was on, the job is another."""
    written = {"method": "all-logits", "training": {"steps": 3, "ema": 0.0}}
    now = {"method": "logit-matching", "training": {"steps": 3}}
    Run("merge", tmp_path / "run", written).finish({})
    assert Run("merge", tmp_path / "run", now, resume=True).earlier == {}
    with pytest.raises(BadInput, match="method"):
        Run("merge", tmp_path / "run", now | {"method": "shapira-sidi"}, resume=True)
    Run("merge", tmp_path / "other", {"training": {"steps": 3, "ema": 0.9}}).finish({})
    with pytest.raises(BadInput, match="training"):
        Run("merge", tmp_path / "other", {"training": {"steps": 3}}, resume=True)


def test_a_folder_whose_overwriting_was_killed_is_ours_and_is_not_resumed(tmp_path, monkeypatch):
    Run("invert", tmp_path / "run", {"seed": 3}).finish({"images": 5})
    for name in ("a", "b"):
        (tmp_path / "run" / name).mkdir()

    def killed(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Run("invert", tmp_path / "run", {"seed": 3}, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="was started with seed = None"):
        Run("invert", tmp_path / "run", {"seed": 3}, resume=True)
    Run("invert", tmp_path / "run", {"seed": 3}, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_nothing_to_resume_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_verbosity", console.NORMAL)
    Run("invert", tmp_path / "rum", {}, resume=True)
    assert "rum holds nothing to resume" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        Run("invert", tmp_path / "file", {})
    with pytest.raises(BadInput, match=r"below cannot be written: Not a directory\. Name another folder"):
        Run("invert", tmp_path / "file" / "below", {})


def test_a_clock_counts_earlier_invocations_and_asks_to_save_once_a_period(monkeypatch):
    clock = Clock()
    clock.go_on_from(100.0)
    assert 100.0 <= clock.seconds < 101.0
    assert not clock.is_time_to_save()
    monkeypatch.setattr(run, "SAVE_EVERY_SECONDS", 0.0)
    assert clock.is_time_to_save()


def test_a_run_that_is_refused_before_any_work_leaves_no_folder(tmp_path):
    with pytest.raises(BadInput, match="bad"), run.running("invert", tmp_path / "refused", {}):
        raise BadInput("This input is bad.", "Give another.")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="bad"), run.running("invert", tmp_path / "empty", {}):
        raise BadInput("This input is bad.", "Give another.")
    assert list((tmp_path / "empty").iterdir()) == []
    Run("invert", tmp_path / "earlier", {})
    with pytest.raises(BadInput, match="bad"), run.running("invert", tmp_path / "earlier", {}, resume=True):
        raise BadInput("This input is bad.", "Give another.")
    assert (tmp_path / "earlier" / "run.json").exists()
    begun = Run("invert", tmp_path / "begun", {})
    (begun.folder / "shard").touch()
    begun.withdraw()
    assert {path.name for path in begun.folder.iterdir()} == {"run.json", "shard"}


def test_the_line_of_a_command_has_what_the_environment_and_the_file_gave(tmp_path, monkeypatch):
    """Of a shell command that is read back; --resume says nothing of the result, and the first line stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFCOMPRESS_STEPS", "2")
    (tmp_path / "dfcompress.toml").write_text('images = 8\n[invert]\nbatch-size = 4\nset = ["tv=0", "l2=0"]\n')
    line = ["invert", DEMO, "--no-records", "-o", "a b", "--compile", "off"]
    assert cli.run([*line, "-q"]) == 0
    command = json.loads((tmp_path / "a b" / "run.json").read_text())["command"]
    words = shlex.split(command)
    assert words[:3] == ["dfcompress", "invert", DEMO]
    given = {("--steps", "2"), ("--images", "8"), ("--batch-size", "4"), ("--set", "tv=0"), ("--set", "l2=0")}
    given |= {("--output", "a b"), ("--compile", "off")}
    assert given <= set(pairwise(words))
    assert "--no-records" in words
    assert len(words) == 3 + 2 * len(given) + 1
    assert cli.run([*line, "-q", "--resume"]) == 0
    assert json.loads((tmp_path / "a b" / "run.json").read_text())["command"] == command


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        (
            {"synthesis": [{"images": 8}]},
            {"synthesis": [{"images": 4}]},
            "synthesis[0].images = 8",
        ),
        ({"recipe": {"settings": {"a": None}}}, {"recipe": {"settings": {}}}, "recipe.settings = {'a': None}"),
        ({"recipe": {}}, {"recipe": {"steps": 3}}, "recipe.steps = None"),
    ],
)
def test_other_options_are_named_by_the_value_that_differs(tmp_path, old, new, difference):
    Run("distill", tmp_path, old)
    with pytest.raises(BadInput) as refused:
        Run("distill", tmp_path, new, resume=True)
    assert f"was started with {difference}, now" in refused.value.problem
    assert "It was started by" not in refused.value.remedy


def test_other_options_are_answered_with_the_line_that_began_the_run(tmp_path):
    with started_by("dfcompress distill net.pth --steps 8"):
        Run("distill", tmp_path, {"synthesis": [{"steps": 8}]})
    with pytest.raises(BadInput) as refused:
        Run("distill", tmp_path, {"synthesis": [{"steps": 4}]}, resume=True)
    assert refused.value.remedy.endswith("It was started by: dfcompress distill net.pth --steps 8")


def test_a_save_that_takes_long_is_followed_by_a_longer_pause(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    clock = run.Clock()

    def due_after() -> float:
        started = now[0]
        while not clock.is_time_to_save():
            now[0] += 1.0
        return now[0] - started

    for took, pause in ((0.5, 20), (6.0, 60), (0.5, 20)):
        due_after()
        with clock.saving():
            now[0] += took
        assert due_after() == pause
