"""`report`: the page about real runs holds what they stored, asks for nothing, and a browser finds every section."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dfcompress import console
from dfcompress.cli import run
from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import MANIFEST
from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import load
from dfcompress.verbs import report as reporting
from dfcompress.verbs.report import Report, report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"
WITHOUT_TOP5 = {"checkpoint": "a", "correct": 1, "total": 2, "top1": 0.5}
SECTIONS = [
    "summary",
    "done",
    "warnings",
    "accuracy",
    "images",
    "losses",
    "agreement",
    "class-bias",
    "layers",
    "machine",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Images, two seeds of a quantized model, and a set that ended half-way."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--images", "40", "--steps", "3", "--batch-size", "20", "--compile", "off"]
    assert run(["invert", str(DEMO), *few, "-q", "-o", str(folder / "images")]) == 0
    card = load(DEMO).card
    pictures, labels = next(iter(open_images(DEMO, card).batches(200)))
    np.savez(folder / "real.npz", images=(pictures * 255).byte().numpy(), labels=labels.numpy())
    given = [
        "--data",
        str(folder / "images"),
        "--eval-data",
        str(folder / "real.npz"),
        "--calibration-steps",
        "1",
        "-q",
    ]
    trained = ["--train-steps", "4", "--train-batch-size", "16", "--compile", "off"]
    for seed in "01":
        line = ["quantize", str(DEMO), "--bits", "4w4a", "--finetune", "kd", *trained, "--seed", seed]
        assert run([*line, *given, "-o", str(folder / f"four-bits-{seed}")]) == 0
    for seed, seconds in (("0", 1.5), ("1", 2.5)):  # Two runs may take the same time, and have no spread to be shown.
        record = stored(folder / f"four-bits-{seed}")
        record["measurements"]["seconds"]["total"] = seconds
        (folder / f"four-bits-{seed}" / "run.json").write_text(json.dumps(record))
    shutil.copytree(folder / "images", folder / "ended")
    (folder / "ended" / "shard-00001.safetensors").unlink()
    record = json.loads((folder / "ended" / "run.json").read_text())
    begun = {name: record[name] for name in ("verb", "command", "options", "plan", "versions")}
    (folder / "ended" / "run.json").write_text(json.dumps({**begun, "finished": False}))
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> tuple[Report, str]:
    """The page about all runs, with real images."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    folders = [runs / name for name in ("four-bits-0", "images", "four-bits-1", "ended")]
    written = report(folders, output=path, data=runs / "real.npz")
    return written, path.read_text()


def stored(run_folder: Path) -> dict:
    return json.loads((run_folder / "run.json").read_text())


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_has_every_section_and_the_numbers_that_the_runs_stored(page, runs):
    written, html = page
    assert written.sections == SECTIONS
    assert written.runs == ["four-bits-0", "images", "four-bits-1", "ended"]
    text = text_of(html)
    measured = [stored(runs / f"four-bits-{seed}")["measurements"] for seed in "01"]
    for each in measured:
        right = each["evaluation"]["results"][1]["correct"]
        assert f"{right} 200 {right / 2:.2f} %" in text
        teachers = each["evaluation"]["results"][0]["correct"]
        lost = f"{(teachers - right) / 2:.2f} points less accurate" if teachers > right else "as accurate"
        assert f"times smaller than the teacher, {lost} on 200 real images" in text
    assert "2.0 ± 0.7" in text  # Of 1.5 and 2.5 s.
    assert "mean ± sd quantize lenet5_bn to 4w4a, kd 2 seeds" in text
    layers = json.loads((runs / "four-bits-0" / "quantization.json").read_text())["layers"]
    assert f"{layers[1]['layer']} conv 2,400 4w4a" in text
    assert f"{layers[1]['signal_to_noise']:.1f}" in text
    (followed,) = measured[0]["teachers"]
    assert sum(followed["student_answers"]) == sum(followed["teacher_answers"]) == 38  # Of 40, two are held out.
    assert "ended" in text
    assert "not finished" in text
    assert html.count("<img ") == 10 * 2 * 2  # Of ten classes in two sets, made and real ones.
    assert "<svg" in html


def test_the_page_names_nothing_outside_of_itself(page):
    named = re.findall(r"""(?:src|href)=["']([^"']*)|url\(["']?([^)"']*)""", page[1])
    assert {(one or other).partition(":")[0] for one, other in named if not (one or other).startswith("#")} == {"data"}
    assert "<script" not in page[1]


def test_the_page_says_the_line_that_makes_a_run_again(page, runs):
    line = stored(runs / "four-bits-1")["command"]
    assert line.startswith(f"dfcompress quantize {DEMO} ")
    assert "--seed 1" in line
    assert "--train-steps 4" in line
    assert line in text_of(page[1])


def opened(path: Path, tmp_path: Path) -> tuple[str, list[str], list[str]]:
    """What a browser makes of a page: its elements, the console's lines, and the addresses that the page asked for."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser or subprocess.run([browser, "--version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no chromium is installed")  # Or one that only tells how to install it.
    log = tmp_path / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    # The browser's own requests, to its maker, find no host.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", f"--user-data-dir={tmp_path / 'own'}"]
    done = subprocess.run([browser, *flags, path.as_uri()], capture_output=True, text=True, timeout=180, check=True)
    requests = [line for line in log.read_text().splitlines() if '"initiator"' in line and "not an origin" not in line]
    asked = [url for line in requests for url in re.findall(r'"url":"([^"]+)"', line)[:1]]
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr), asked


def test_a_browser_finds_every_section_and_has_nothing_to_ask_or_complain_of(page, tmp_path):
    shown, complaints, asked = opened(Path(page[0].output), tmp_path)
    assert re.findall(r'<section id="([\w-]+)"', shown) == SECTIONS
    assert complaints == []
    assert asked == []


def test_the_browser_of_these_tests_would_tell_of_requests_and_errors(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.error('wrong')</script>")
    _, complaints, asked = opened(bad, tmp_path)
    assert any("wrong" in each for each in complaints)
    assert asked == ["http://127.0.0.1:9/a.png"]


def refused(line: list[str], capsys) -> str:
    """The one line that a command ends with, and exit code 2."""
    assert run(["report", *line]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_real_images_stand_beside_those_of_the_models_that_they_fit(runs, tmp_path, capsys, monkeypatch):
    shutil.copytree(runs / "images", tmp_path / "older")
    manifest = json.loads((tmp_path / "older" / MANIFEST).read_text())
    manifest["card"] |= {"classes": 5, "class_names": None}
    (tmp_path / "older" / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(console, "_verbosity", console.NORMAL)
    report([tmp_path / "older", runs / "images"], output=tmp_path / "page.html", data=runs / "real.npz")
    assert "older has no real images beside it" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text().count("real images on the right") == 1


def test_what_is_no_run_is_refused_in_one_line_and_nothing_is_written(runs, tmp_path, capsys):
    page = tmp_path / "report.html"
    line = ["-o", str(page)]
    assert "holds no run.json" in refused([str(DEMO), *line], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    assert "is not a run file of dfcompress" in refused([str(tmp_path / "other"), *line], capsys)
    newer = {**stored(runs / "images"), "schema": 2}
    (tmp_path / "other" / "run.json").write_text(json.dumps(newer))
    assert "has schema 2, this version reads 1" in refused([str(tmp_path / "other"), *line], capsys)
    assert "does not exist" in refused([str(runs / "images"), "--data", "nowhere", *line], capsys)
    assert not page.exists()
    page.write_text("mine")
    assert "--overwrite" in refused([str(runs / "images"), *line], capsys)
    assert page.read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"options": {}, "measurements": None}, "was being overwritten"),
        ({"measurements": [1]}, "AttributeError"),
        ({"seconds": None, "measurements": {}}, "TypeError"),
        ({"measurements": {"evaluation": {"results": [WITHOUT_TOP5]}}}, "top5"),
        ({"plan": {"synthesis": [{}]}}, "KeyError"),
    ],
    ids=["overwritten", "measurements", "seconds", "evaluation", "plan"],
)
def test_a_record_that_is_malformed_or_of_a_killed_run_is_refused_by_the_name_of_its_folder(
    wrong, said, runs, tmp_path
):
    for name, change in (("good", {}), ("bad", wrong)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**stored(runs / "images"), **change}))
    with pytest.raises(BadInput, match=rf"{tmp_path / 'bad'} .*{said}"):
        report([tmp_path / "good", tmp_path / "bad"], output=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_is_named_twice_or_lies_inside_another_is_shown_once(runs, tmp_path, monkeypatch):
    record = stored(runs / "images")
    for place in ("demo", "demo/student", "alone"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "run.json").write_text(json.dumps({**record, "command": None}))
    monkeypatch.chdir(tmp_path)
    for asked, names, title in (
        (["demo", "demo/student"], ["demo", "student"], "demo"),
        (["alone", "demo", tmp_path / "alone"], ["alone", "demo", "student"], "3 runs"),
        ("alone", ["alone"], "alone"),
    ):
        assert report(asked, overwrite=True).runs == names
        assert f"<title>{title}" in Path("report.html").read_text()


def test_without_its_packages_a_report_says_how_to_get_them(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "PACKAGES", ("jinja2", "no_such_package"))
    with pytest.raises(BadInput, match=r"needs no_such_package. Install them with: pip install 'dfcompress\[report\]'"):
        report([runs / "images"], output=tmp_path / "report.html")


def test_names_from_files_are_shown_and_not_obeyed(runs, tmp_path):
    folder = tmp_path / "<b>run"
    shutil.copytree(runs / "images", folder)
    losses = (folder / "metrics.jsonl").read_text().replace("cross_entropy", "<script>x</script>$a_b$")
    (folder / "metrics.jsonl").write_text(losses)
    report([folder], output=tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<b>run" not in html
