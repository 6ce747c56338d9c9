"""What a report reads of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfcompress.reporting.runs import Curve, Losses, ReportedRun, read_losses, repeated
from dfcompress.run import RunFile


def test_losses_of_an_interrupted_set_are_read_up_to_the_half_written_line(tmp_path):
    lines = [{"shard": 2, "step": step, "lr": 0.1, "ce": 3.0 - step} for step in range(3)]
    whole = "\n".join(map(json.dumps, [*lines[:2], {"shard": 2, "seconds": 3.0, "ce": 1.0}]))
    (tmp_path / "metrics.jsonl").write_text(whole)
    (tmp_path / "shard-00003.jsonl").write_text(json.dumps({**lines[2], "shard": 3}) + '\n{"shard": 3, "st')
    assert list(read_losses("images", tmp_path)) == [
        Losses("images", {"ce": [Curve([0, 1], [3.0, 2.0]), Curve([2], [1.0])]})
    ]
    (tmp_path / "metrics.jsonl").write_text(whole.replace("}", "", 1))
    with pytest.raises(ValueError, match="delimiter"):
        list(read_losses("images", tmp_path))


def test_a_merged_model_has_the_names_of_all_teachers_where_its_outputs_are():
    digits = {"architecture": "a", "classes": 2, "input_size": [1, 8, 8], "mean": [0.5], "std": [0.5]}
    teachers = [
        {"card": {**digits, "class_names": ["zero", "one"]}, "sha256": "a"},
        {"card": {**digits, "class_names": ["one", "two"]}, "sha256": "b"},
        {"card": digits, "sha256": "c"},
    ]

    def names(**options):
        file = RunFile(folder=Path(), verb="merge", options=options, versions={})
        return ReportedRun(name="merged", file=file).class_names

    assert names(teachers=teachers, outputs=[[0, 1], [1, 2], [3, 4]]) == {0: "zero", 1: "one", 2: "two"}
    assert names(teacher=teachers[1]) == {0: "one", 1: "two"}
    assert names(teacher=teachers[0], class_names=["zero", "one", "seven"])[2] == "seven"


def test_runs_repeat_where_their_options_differ_in_the_seed_alone():
    def made(name, verb="quantize", **options):
        return ReportedRun(name=name, file=RunFile(folder=Path(), verb=verb, options=options, versions={}))

    runs = [made("a", seed=0, bits=4), made("b", seed=0, bits=8), made("c", seed=1, bits=4)]
    runs.append(made("d", "prune", seed=0, bits=4))
    assert [[run.name for run in group] for group in repeated(runs)] == [["a", "c"], ["b"], ["d"]]
