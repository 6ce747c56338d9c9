"""The front door for Python: every public name has its true type, and a type checker refuses wrong calls."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dfcompress

PACKAGE = Path(dfcompress.__file__).parent

# Types of torch are skipped, because reading them takes mypy most of a minute and the calls below name none.
CONFIGURATION = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,torchvision.*,numpy.*,scipy.*,safetensors.*,PIL.*,onnx.*,onnxruntime.*,onnxscript.*,timm.*,transformers.*]
follow_imports = skip
"""

RIGHT = """
import dfcompress
from dfcompress import Compute, DfcompressError, Loss, Phase, Pixels, Recipe, Synthesis, distill

teacher = dfcompress.load("resnet20.pt", input_size=(3, 32, 32))
synthesis = Synthesis(recipe="deepinversion", images=512, settings={"steps": 200})
images = dfcompress.invert(teacher, output="images", synthesis=synthesis, compute=Compute(precision="fp32"))
try:
    small = distill(teacher, student="half", data=images.output, training={"steps": 100}, temperature=4)
except DfcompressError as error:
    reveal_type(error.exit_code)  # -> "int"
recipe = Recipe(images=Pixels(clip=True), batch_size=8, losses=[], phases=[Phase(steps=10, lr=0.1)])
reveal_type(teacher)  # -> "dfcompress.models.classifier.Classifier"
reveal_type(images)  # -> "dfcompress.verbs.invert.Inversion"
reveal_type(small)  # -> "dfcompress.verbs._finish.Compressed"
reveal_type(small.bytes_ratio)  # -> "float"
reveal_type(dfcompress.quantize(teacher, bits="4w4a"))  # -> "dfcompress.verbs._finish.Compressed"
plan = dfcompress.distill.plan(teacher, student="half")
reveal_type(plan)  # -> "dfcompress.verbs._plan.Plan[dfcompress.verbs._finish.Compressed]"
reveal_type(plan.estimates()[0].seconds)  # -> "float"
reveal_type(dfcompress.merge([teacher, "other.pt"]))  # -> "dfcompress.verbs._finish.Compressed"
reveal_type(dfcompress.extend(teacher, new_data="birds"))  # -> "dfcompress.verbs._finish.Compressed"
reveal_type(dfcompress.record(teacher, data="train"))  # -> "dfcompress.verbs.record.Recorded"
reveal_type(dfcompress.report(["student"], output="r.html"))  # -> "dfcompress.verbs.report.Report"
reveal_type(dfcompress.evaluate([teacher], data="test"))  # -> "dfcompress.verbs.evaluate.Evaluation"
reveal_type(dfcompress.compare([teacher], sets=["test", "random"]))  # -> "dfcompress.verbs._comparison.Comparison"
reveal_type(dfcompress.export(teacher))  # -> "dfcompress.evaluation.onnx_check.Exported"
reveal_type(dfcompress.inspect("resnet20.pt"))  # -> "dfcompress.verbs.inspect.Inspection"
reveal_type(dfcompress.doctor())  # -> "dfcompress.verbs.doctor.Diagnosis"
reveal_type(dfcompress.demo())  # -> "dfcompress.verbs.demo.Demo"
reveal_type(dfcompress.bench_step(teacher))  # -> "dfcompress.evaluation.timing.Bench"
reveal_type(dfcompress.__version__)  # -> "str"
"""

WRONG = """
import dfcompress
dfcompress.distil("resnet44.pt")
dfcompress.distill("resnet44.pt", studnet="half")
dfcompress.distill("resnet44.pt", temperature="hot")
dfcompress.distill("resnet44.pt", "half")
dfcompress.distill.plan("resnet44.pt", studnet="half")
dfcompress.invert(3)
dfcompress.invert("resnet20.pt", synthesis={"images": 512})
dfcompress.quantize("resnet20.pt", bits=4)
dfcompress.quantize("resnet20.pt", finetune="lsqs")
dfcompress.evaluate(["resnet20.pt"])
dfcompress.evaluate(["resnet20.pt"], data="test").reslts
dfcompress.inspect("resnet20.pt").parameters.upper()
dfcompress.Synthesis(imges=3)
dfcompress.Compute("cpu")
dfcompress.Compute(precision="float32")
dfcompress.Training(steps="many")
dfcompress.Phase(steps=10, lr=0.1, schedule="stairs")
"""


def _checked(folder: Path, script: str) -> list[str]:
    """What mypy says of a script, by line; nothing of a line that it accepts."""
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text(CONFIGURATION)
    call = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    installed = PACKAGE.parent.name == "site-packages"  # Where mypy looks by itself, and refuses to be told to look.
    environment = os.environ if installed else {**os.environ, "MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert not done.stderr, done.stderr
    said = [""] * (len(script.splitlines()) + 1)
    for line, text in re.findall(r"^script\.py:(\d+): (.*)$", done.stdout, re.MULTILINE):
        said[int(line)] += text.replace("builtins.", "")  # mypy from 1.19 on leaves it out.
    return said[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for both scripts, so that mypy reads the package once."""
    pytest.importorskip("mypy")
    return tmp_path_factory.mktemp("mypy")


def test_a_type_checker_knows_every_verb_and_accepts_right_calls(folder):
    for line, said in zip(RIGHT.splitlines(), _checked(folder, RIGHT), strict=True):
        revealed = re.search(r"# -> (\".*\")", line)
        assert said == (f"note: Revealed type is {revealed[1]}" if revealed else ""), line


def test_a_type_checker_refuses_every_wrong_call(folder):
    lines = WRONG.splitlines()
    accepted = [line for line, said in zip(lines, _checked(folder, WRONG), strict=True) if "error: " not in said]
    assert accepted == lines[:2]


def test_what_a_type_checker_imports_is_what_is_imported_at_first_use():
    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert seen == {name: (f"dfcompress.{module}", name) for name, module in dfcompress._HOME.items()}
    assert sorted([*seen, "__version__"]) == dfcompress.__all__


def test_every_result_and_every_error_of_a_verb_is_public():
    """A user can name the type of what a verb returns or raises."""
    for name, home in dfcompress._HOME.items():
        if home.startswith("verbs.") and name.islower():
            result = getattr(dfcompress, name).__annotations__["return"]
            assert getattr(dfcompress, result).__name__ == result
    errors = ast.parse((PACKAGE / "errors.py").read_text()).body
    assert {node.name for node in errors if isinstance(node, ast.ClassDef)} <= set(dfcompress.__all__)


def test_a_name_is_looked_up_once():
    assert dfcompress.load is vars(dfcompress)["load"]
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        dfcompress.lod  # noqa: B018
