"""The demo is the main job: it must run from the installed command and end in working models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from dfcompress.cli import run
from dfcompress.run import RunFile
from dfcompress.verbs import demo


def require_smaller_models_that_work(shown, *, student, quantized):
    """Raise where a model of the demo has fewer right answers of 10,000 than so many, or is too large."""
    right = {row["model"]: row["correct"] for row in shown["rows"]}
    size = {row["model"]: row["bytes"] for row in shown["rows"]}
    assert right["teacher"] == 9951
    assert right["half-width student"] > student
    assert right["teacher 4w4a"] > quantized
    assert size["half-width student"] < 0.3 * size["teacher"]
    assert size["teacher 4w4a"] < 0.17 * size["teacher"]


def test_the_demo_at_a_fifth_of_its_size_ends_in_smaller_models_that_work(tmp_path, monkeypatch, capsys):
    """A fifth of the images and of all steps; the rest is the demo's own. An untrained student has 1,000 right."""

    def shrink(verb):
        return lambda *arguments, training, **options: verb(
            *arguments, training={"steps": training["steps"] // 5}, **options
        )

    for name in ("SHOWN", "TAUGHT"):
        whole = getattr(demo, name)
        few = replace(whole, images=whole.images // 5, settings={"steps": whole.settings["steps"] // 5})
        monkeypatch.setattr(demo, name, few)
    for name in ("distill", "quantize"):
        monkeypatch.setattr(demo, name, shrink(getattr(demo, name)))
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--json", "-q"]) == 0
    shown = json.loads(capsys.readouterr().out)
    require_smaller_models_that_work(shown, student=2000, quantized=9850)
    with Image.open(tmp_path / shown["picture"]) as picture:
        assert picture.size[0] > 300
    page = (tmp_path / shown["report"]).read_text()
    assert [name for name in ("accuracy", "layers", "losses") if f'<section id="{name}"' not in page] == []
    folder = tmp_path / shown["output"]
    trained = [RunFile.read(folder / part).options["training"] for part in ("student", "quantized")]
    assert [settings["augmentation"]["flip"] for settings in trained] == [False, False]  # A mirrored digit is none.
    lines = [RunFile.read(folder / part).command for part in (".", "images", "student", "quantized")]
    assert lines == ["dfcompress demo", None, None, None]


def test_a_demo_without_the_packages_of_reports_says_how_to_write_one(monkeypatch, capsys):
    shown = demo.Demo("there", "there/images/preview.png", None, None, [], 60.0, None)
    monkeypatch.setattr(demo, "demo", lambda **options: shown)
    assert run(["demo"]) == 0
    line = "report: none written; pip install 'dfcompress[report]', then dfcompress report there"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.release
def test_the_demo_compresses_its_teacher_and_shows_it_on_real_images(tmp_path):
    line = [sys.executable, "-m", "dfcompress", "demo", "--json", "-q"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    require_smaller_models_that_work(json.loads(done.stdout), student=9500, quantized=9850)
