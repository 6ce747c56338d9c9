"""The documentation is true to the code; `python docs/write_reference.py` renews the pages that are made from it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from dfcompress.cli import root

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = root.list_commands(None)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """docs/write_reference.py."""
    found = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def test_pages_that_are_made_from_the_code_are_up_to_date(reference):
    stale = [name for name, text in reference.pages().items() if text != (DOCS / name).read_text()]
    assert not stale, "run: python docs/write_reference.py"


def test_the_messages_that_troubleshooting_explains_are_messages_of_the_code(reference):
    """The hand-written tables; those of every message are compared with the code above."""
    page = (DOCS / "troubleshooting.md").read_text()
    explained = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", page.partition("## Reading a checkpoint")[2], re.M)
    parsed = [ast.parse(path.read_text()) for path in (REPOSITORY / "dfcompress").rglob("*.py")]
    texts = {str(n.value) for tree in parsed for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    known = {message.problem for message in reference.messages()} | texts
    explained = [each for each in explained if each not in ("message", "---")]
    assert len(explained) > 40
    assert [each for each in explained if not any(each in text for text in known)] == []


@pytest.mark.parametrize("script", sorted(DOCS.glob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_is_there(script):
    """Scripts take hours and are not run here, so a name that is gone would be found late."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dfcompress":
            module = importlib.import_module(node.module)
            for alias in node.names:
                is_file = (
                    importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                )
                assert hasattr(module, alias.name) or is_file, alias.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_that_shows_how_to_call_it(command):
    assert f"dfcompress {command}" in (DOCS / f"{command}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text()):
        aimed_at = page.parent / target if target else page
        assert aimed_at.exists(), target
        assert not anchor or anchor in anchors(aimed_at), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("material")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert "<h1" in (tmp_path / "index.html").read_text()
    assert re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="(https?:[^"]+)"', pages) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_mentioned_exists(page):
    known = {
        "--help",
        "--help-all",
        "--version",
        "--upgrade",
        "--extra-index-url",
        "--nproc-per-node",
        "--ntasks",
        "--gpus-per-task",
    }
    known |= {"--no-deps", "--no-build-isolation", "--no-index"}  # Of pip.
    known |= {"--durations", "--dist", "--ignore"}  # Of pytest.
    known |= {"--only", "--seeds", "--sources", "--cifar10", "--epochs", "--write", "--batch"}  # Of docs' scripts.
    known |= {"--headless", "--hide-scrollbars", "--window-size", "--screenshot"}  # Of chromium.
    for name in COMMANDS:
        command = root.get_command(click.Context(root), name)
        for part in [command, *getattr(command, "commands", {}).values()]:
            known |= {
                spelling for parameter in part.params for spelling in (*parameter.opts, *parameter.secondary_opts)
            }
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text()))
    assert mentioned <= known, mentioned - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_place_waits_to_be_filled(page):
    assert not re.findall(r"@@|@[A-Z0-9]+@", page.read_text())


def test_the_readme_begins_with_the_two_lines():
    first_screen = "\n".join((REPOSITORY / "README.md").read_text().splitlines()[:45])
    assert "pip install . && dfcompress demo" in first_screen
    assert "pip install '.[dev]' && pytest" in first_screen
    assert "![" in first_screen
    assert "@@" not in (REPOSITORY / "README.md").read_text()


def test_every_file_of_the_package_has_its_place_in_the_architecture():
    text = (DOCS / "architecture.md").read_text()
    package = REPOSITORY / "dfcompress"
    open_folders = {"commands", "recipes", "architectures", "observers"}
    rooms = [path for path in package.rglob("*.py") if path.parent.name not in open_folders]
    rooms = [path for path in rooms if path.parent.name != "verbs" or path.name.startswith("_")]
    missing = [path.name for path in rooms if path.name not in text and not path.name.startswith("__")]
    assert not missing
