"""Write the pages that are made from the code: `python docs/write_reference.py`; tests/test_docs.py compares them.

| page | from |
|---|---|
| cli.md | the commands, as click knows them |
| python.md | signatures and docstrings of what `import dfcompress` offers, and of the results' parts |
| recipes.md | docstrings, signatures and presets of the recipe files |
| troubleshooting.md, its tables behind "Every message" | the texts of errors and notices in the source |
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import click

import dfcompress
from dfcompress import cli, errors
from dfcompress.commands import _config, _help
from dfcompress.synthesis.recipes import recipe_names

DOCS = Path(__file__).resolve().parent
PACKAGE = Path(dfcompress.__file__).parent
MADE = "Made from the code by `python docs/write_reference.py`; a test compares.\n"


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        (DOCS / name).write_text(text)


def pages() -> dict[str, str]:
    """Every page by its name."""
    troubleshooting = (DOCS / "troubleshooting.md").read_text()
    return {
        "cli.md": cli_page(),
        "python.md": python_page(),
        "recipes.md": recipes_page(),
        "troubleshooting.md": with_messages(troubleshooting),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a cell is one line, and a bar in it is written as an entity."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(cell.split()).replace("|", "&#124;") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells) + "\n"


# The command line


def cli_page() -> str:
    """docs/cli.md."""
    root = click.Context(cli.root, info_name="dfcompress")
    commands = _config.parts(root)
    shared = _shared(commands)
    text = f"# Command-line reference\n\nEvery command, option, default, variable and exit code. {MADE}\n"
    rows = [
        [heading, f"[`{name}`](#dfcompress-{name})", cli.root.get_command(root, name).get_short_help_str(200)]
        for heading, names in cli.ORDER.items()
        for name in names
        if name in commands
    ]
    text += table(["for", "command", "what it does"], rows)
    text += EVERY_COMMAND
    text += "## Exit codes\n\n" + table(["code", "means"], _exit_codes())
    text += ENVIRONMENT + table(["variable", "is"], [[f"`{k}`", v] for k, v in _config.OTHER_VARIABLES.items()])
    text += "## Options of several commands\n\n"
    for heading, options in shared.items():
        text += f"### {heading} options\n\n" + _options_table(options)
    for name, parts in commands.items():
        text += f"## `dfcompress {name}`\n\n"
        for part in parts:
            text += _command(name, part, shared, several=len(parts) > 1)
    return text


EVERY_COMMAND = """## Where a value comes from

The command line comes first, then the environment, then the configuration file, then the default.
`dfcompress.toml` in the current folder is read, or the file that `--config` names:

```toml
images = 512            # for every command that has the option
[quantize]
bits = "4w4a"           # for one command
```

A key that no command has is an error with a suggestion, and so is a `DFCOMPRESS_` variable that is no option.
Results go to stdout, progress and notices to stderr. Each option is explained once: options that several commands have
in common are in the tables of [this section](#options-of-several-commands), and each command lists its own.

"""
ENVIRONMENT = """## Environment variables

Every option is also `DFCOMPRESS_` and its long name in capitals, with `_` for `-`: `DFCOMPRESS_BATCH_SIZE=64` is
`--batch-size 64`, `DFCOMPRESS_QUIET=1` is `--quiet`. Where an option may be repeated, its values are separated by
spaces. `DFCOMPRESS_MODEL` is the checkpoint of a command that takes one.

"""


def _exit_codes() -> list[list[str]]:
    kinds = [errors.DfcompressError, errors.BadInput, errors.GateNotMet]
    return [
        ["0", "The work is done."],
        *([str(kind.exit_code), f"`{kind.__name__}`: {inspect.getdoc(kind).splitlines()[0]}"] for kind in kinds),
        [
            str(cli.INTERRUPTED),
            "Interrupted by Ctrl-C. The same line goes on with `--resume`, where the command has it.",
        ],
    ]


Shared = dict[str, list[click.Option]]


def _shared(commands: dict[str, list[click.Command]]) -> Shared:
    """By heading the options that several commands have with the same words and everywhere with the same default; main
    options stay with their commands.
    """
    seen: dict[tuple[str, str], list[click.Option]] = {}
    for part in [part for parts in commands.values() for part in parts]:
        for heading, options in _help.by_heading(part.params):
            for option in options:
                seen.setdefault((heading, option.opts[-1]), []).append(option)
    shared: Shared = {}
    for (heading, _), options in seen.items():
        told = [_help.describe(option) for option in options]
        usual = max(told, key=told.count)
        if heading != _help.MAIN and told.count(usual) > 1 and len({each.default for each in told}) == 1:
            shared.setdefault(heading, []).append(options[told.index(usual)])
    return {heading: shared[heading] for heading in _help.HEADINGS if heading in shared}


def _command(name: str, part: click.Command, shared: Shared, *, several: bool) -> str:
    arguments = [
        f"{p.human_readable_name}{'...' * (p.nargs < 0)}" for p in part.params if isinstance(p, click.Argument)
    ]
    whole = f"dfcompress {name} {part.name}" if several else f"dfcompress {name}"
    text = f"### `{whole}`\n\n" if several else ""
    text += " ".join(inspect.cleandoc(part.help or "").split()) + f" More: [{name}.md]({name}.md).\n\n"
    example = (part.epilog or "").removeprefix("Example:").strip()
    text += f"```\n{' '.join([whole, '[OPTIONS]', *arguments])}\n{example}\n```\n\n"
    own, elsewhere = [], []
    for heading, options in _help.by_heading(part.params):
        common = [_help.describe(option) for option in shared.get(heading, [])]
        mine = [option for option in options if _help.describe(option) not in common]
        own += mine
        if names := [f"`{max(option.opts, key=len)}`" for option in options if option not in mine]:
            elsewhere.append(f"[{heading}](#{heading.lower()}-options): {', '.join(names)}.\n")
    return text + (_options_table(own) if own else "") + ("Also:\n\n" + "".join(f"- {e}" for e in elsewhere) + "\n")


def _options_table(options: Sequence[click.Option]) -> str:
    rows = []
    for told in map(_help.describe, options):
        values = told.value.replace("|", " or ") + (" (repeatable)" if told.repeatable else "")
        default = "required" if told.required else told.default
        rows.append([f"`{told.names}`", values, default, told.help])
    return table(["option", "value", "default", "meaning"], rows)


# Python

GROUPS = {
    "Verbs": "Each does what the command of the same name does. `dfcompress.distill.plan(...)`, called in the same "
    "way, gives the [`Plan`](#class-plan) alone; so do the other verbs that make images or models.\n\n"
    "An argument that is not of its type raises [`BadInput`](#class-badinput) before any work. A verb computes the "
    "same whatever its caller has set (`no_grad`, `inference_mode`, `autocast`, the default type or device, the seed), "
    "and leaves these and the states of PyTorch's default generators as they were.\n\n"
    "One process runs one verb at a time, because PyTorch's settings belong to the process: a verb, or `load`, that a "
    "second thread calls waits until the first is done. Meanwhile PyTorch code of your own in other threads sees the "
    "settings of the verb, and after the verb draws the same random numbers again. Run verbs side by side in "
    "processes of their own.",
    "Models": "",
    "Settings": "Frozen dataclasses whose arguments are given by name.",
    "Results": "Dataclasses. `to_json()` gives the object that `--json` prints.",
    "Recipes of your own": "The parts that a [recipe of your own](invert.md#a-recipe-of-your-own) is made of.",
    "Exceptions": "Any other exception is a bug, except Python's own `TypeError` for a missing or an unknown argument.",
}
SETTINGS = (
    "Augmentation",
    "Calibration",
    "Compute",
    "Gates",
    "Reconstruction",
    "RecordSettings",
    "Synthesis",
    "Training",
)
MODELS = ("load", "Classifier", "ModelCard")
RECIPES = ("Recipe", "Phase", "Loss", "Pixels", "Generator", "StudentUpdates")


def python_page() -> str:
    """docs/python.md."""
    groups = _groups()
    text = f"# Python reference\n\nEvery name that `import dfcompress` offers. {MADE}\n"
    text += f"```python\n{_example()}\n```\n\n"
    text += table(
        ["group", "names"],
        [[group, ", ".join(f"[`{n}`](#{_anchor(n)})" for n in names)] for group, names in groups.items()],
    )
    for group, names in groups.items():
        text += f"## {group}\n\n" + (f"{GROUPS[group]}\n\n" if GROUPS[group] else "")
        for name, value in names.items():
            text += _documented(name, value)
    return text


def _example() -> str:
    lines = inspect.cleandoc(dfcompress.__doc__ or "").splitlines()
    return inspect.cleandoc(
        "\n".join(line for line in lines if line.startswith("    ") or not line.strip()).strip("\n")
    )


def _groups() -> dict[str, dict[str, Any]]:
    public = {name: getattr(dfcompress, name) for name in dfcompress.__all__ if name != "__version__"}
    verbs = {n: v for n, v in public.items() if inspect.isfunction(v) and n not in MODELS}
    raised = {n: v for n, v in public.items() if inspect.isclass(v) and issubclass(v, Exception)}
    known = {*verbs, *raised, *MODELS, *SETTINGS, *RECIPES}
    results = {n: v for n, v in public.items() if n not in known}
    return {
        "Verbs": verbs,
        "Models": {n: public[n] for n in MODELS},
        "Settings": {n: public[n] for n in SETTINGS},
        "Results": results | _parts_of(results),
        "Recipes of your own": {n: public[n] for n in RECIPES},
        "Exceptions": raised,
    }


def _parts_of(results: dict[str, type]) -> dict[str, type]:
    """The dataclasses that fields of results are made of and that are not public names themselves, by their names."""
    found: dict[str, type] = {}
    waiting = list(results.values())
    while waiting:  # A plan holds the engine's own parts, which are not for readers.
        owner = waiting.pop(0)
        if owner is dfcompress.Plan:
            continue
        names = {**vars(sys.modules[owner.__module__]), **vars(dfcompress)}
        try:
            hints = get_type_hints(owner, globalns=names)
        except NameError:  # A type that is imported for type checkers alone, and no part of a result.
            continue
        for part in [part for name, hint in hints.items() if not name.startswith("_") for part in _inside(hint)]:
            if dataclasses.is_dataclass(part) and part.__name__ not in {*dfcompress.__all__, *found}:
                found[part.__name__] = part
                waiting.append(part)
    return dict(sorted(found.items()))


def _inside(hint: Any) -> Iterator[Any]:
    yield hint
    for argument in get_args(hint):
        yield from _inside(argument)


def _anchor(name: str) -> str:
    return f"class-{name.lower()}" if name[0].isupper() else name


def _documented(name: str, value: Any) -> str:
    text = f"### class `{name}`\n\n" if inspect.isclass(value) else f"### `{name}`\n\n"
    if inspect.isclass(value) and issubclass(value, Exception):
        return text + f"Exit code {value.exit_code}. {_prose(value)}\n\n"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        result = _type(signature.return_annotation, value)
        text += f"Returns {result}.\n\n{_prose(value)}\n\n"
        rows = [[f"`{p.name}`", _type(p.annotation, value), _default(p.default)] for p in signature.parameters.values()]
        return text + (table(["argument", "type", "default"], rows) if rows else "")
    text += f"{_prose(value)}\n\n"
    if dataclasses.is_dataclass(value):
        rows = [[f"`{f.name}`", _type(f.type, value), _field_default(f)] for f in dataclasses.fields(value)]
    else:
        arguments = inspect.signature(value).parameters.values()
        rows = [[f"`{p.name}`", _type(p.annotation, value), _default(p.default)] for p in arguments]
    text += table(["field" if dataclasses.is_dataclass(value) else "argument", "type", "default"], rows)
    methods = {name: each for name, each in vars(value).items() if name[0] != "_" and inspect.getdoc(each)}
    rows = [
        [f"`{name}`", inspect.getdoc(each).partition("\n\n")[0]] for name, each in methods.items() if _is_code(each)
    ]
    return text + (table(["method or property", "gives"], rows) if rows else "")


def _is_code(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod | property)


def _prose(value: Any) -> str:
    """A docstring; its lines are joined but for lists and code, because they were broken for the source's width."""
    return inspect.getdoc(value) or ""


def _type(annotation: Any, owner: Any) -> str:
    """A type as text, with the public classes in it linked, and names for a list of words replaced by the words."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    known = vars(sys.modules[owner.__module__])
    for name in re.findall(r"[A-Z]\w+", text):
        if getattr(known.get(name), "__origin__", None) is Literal:
            text = text.replace(name, " | ".join(map(repr, get_args(known[name]))))
    text = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " or "), text.replace(" | ", " or "))
    classes = [name for name in dfcompress.__all__ if name[0].isupper()]
    link = lambda found: f"[{found[0]}](#{_anchor(found[0])})" if found[0] in classes else found[0]  # noqa: E731
    return re.sub(r"[A-Za-z_]+", link, text)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(value):
        changed = [f for f in dataclasses.fields(value) if getattr(value, f.name) != _of_class(f)]
        return f"`{type(value).__name__}({'...' if changed else ''})`"
    return f"`{value!r}`"


def _of_class(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _field_default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return ""
    return _default(_of_class(field))


# Recipes


def recipes_page() -> str:
    """docs/recipes.md, from the docstrings, signatures and presets of the recipe files."""
    parts = ["# Recipes", "", "Every method of synthesis, its source and its settings. " + MADE]
    for name in recipe_names():
        module = importlib.import_module(f"dfcompress.synthesis.recipes.{name.replace('-', '_')}")
        function = getattr(module, name.replace("-", "_"))
        defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
        parts += [f"## `{name}`", "", module.__doc__.strip(), "", f"Source: {module.PAPER}.", ""]
        parts += [f"| setting | {' | '.join(f'`{preset}`' for preset in module.PRESETS)} |"]
        parts += ["|---" * (1 + len(module.PRESETS)) + "|"]
        for key, default in defaults.items():
            cells = " | ".join(str(preset.get(key, default)) for preset in module.PRESETS.values())
            parts.append(f"| `{key}` | {cells} |")
        parts.append("")
    return "\n".join(parts)


# Messages

RAISED = ("BadInput", "DfcompressError", "GateNotMet", "NotFinite", "Unfit")
TOLD = ("notice", "append")  # `append` to a list of warnings.
REASONS = re.compile(r"_?why\w*|warnings|_collapse")  # Functions whose texts are the middle of a message.
ANY = "…"
NOTICE, GATE = "A notice: the run goes on.", "The result is written; exit code 3."
_VALUE = re.compile(f"{ANY}|‹[^›]*›")
# What the user was doing where the messages of files come up; the longest beginning of a file's path counts.
DOING = {
    "Options and configuration": "arguments commands/ settings schedules cli",
    "Run folders, budgets and gates": "run verbs/_plan verbs/_finish verbs/_compression verbs/_gates verbs/_budget",
    "Quantizing": "quantization/ verbs/quantize verbs/_quantize "
    "models/fake_quantizers models/packing models/tensor_grids models/bn_folding",
    "Reading a checkpoint": "models/",
    "Giving images": "data/",
    "Activation records": "synthesis/records verbs/record",
    "Making images": "synthesis/ verbs/invert verbs/_co_training",
    "Merging": "training/multi_teacher training/class_map verbs/merge verbs/_merge_evaluation",
    "Teaching new classes": "training/class_incremental verbs/extend verbs/_extend_evaluation verbs/_new_images",
    "Training a student": "training/ verbs/distill",
    "Pruning": "pruning/ verbs/prune verbs/_prune",
    "Exporting": "quantization/onnx verbs/export evaluation/onnx_check",
    "Measuring and comparing": "evaluation/ verbs/ reporting/",
    "Devices, memory, several processes": "device memory distributed",
}


@dataclasses.dataclass(frozen=True)
class Message:
    """A text of the code: what is wrong and what to do, with … for values; a notice has nothing to do."""

    doing: str
    problem: str
    remedy: str


@functools.cache
def messages() -> list[Message]:
    """Every error and notice of the package, in the order of its files."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        doing = _doing(path.relative_to(PACKAGE).with_suffix("").as_posix())
        texts = _Texts(ast.parse(path.read_text()))
        found += [Message(doing, text, NOTICE) for text in texts.reasons()]
        for call in texts.calls:
            problems, *remedies = [texts.of(argument, call) for argument in call.args[:2]]
            remedy = " Or: ".join(each for each in dict.fromkeys(remedies[0]) if each != ANY) if remedies else ""
            for problem in problems:
                if len(_VALUE.sub("", problem)) > 8:
                    gate = texts.called(call) == "GateNotMet"
                    told = NOTICE if texts.called(call) in TOLD else GATE if gate and not remedy else remedy
                    found.append(Message(doing, problem, told or "The message ends with what to do."))
    return list(dict.fromkeys(found))


def _doing(file: str) -> str:
    order = sorted(
        ((start, doing) for doing, starts in DOING.items() for start in starts.split()), key=lambda e: -len(e[0])
    )
    return next((doing for start, doing in order if file.startswith(start)), "Measuring and comparing")


class _Texts:
    """The texts that expressions of a module can have: literals, names of constants and of local variables, both sides
    of conditions, and what functions of the module return.
    """

    def __init__(self, module: ast.Module) -> None:
        self.module = module
        nodes = list(ast.walk(module))
        self.parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
        self.calls = [call for call in calls if self.called(call) in RAISED or self._tells(call)]
        self.calls.sort(key=lambda call: call.lineno)

    @staticmethod
    def called(call: ast.Call) -> str:
        return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")

    def _tells(self, call: ast.Call) -> bool:
        owner = getattr(call.func, "value", None)
        return self.called(call) == "notice" or (self.called(call) == "append" and ast.unparse(owner) == "warnings")

    def reasons(self) -> list[str]:
        """What functions give that say why something cannot be, or what looks wrong."""
        inside = [n for name, f in self.functions.items() if REASONS.fullmatch(name) for n in ast.walk(f)]
        values = [n.value for n in inside if isinstance(n, ast.Return | ast.Assign) and n.value]
        return [text for value in values for text in self.of(value, value, 4) if len(_VALUE.sub("", text)) > 20]

    def of(self, node: ast.expr, place: ast.AST, depth: int = 0) -> list[str]:
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            whole = [""]
            for part in node.values:
                inner = self._value(part.value) if isinstance(part, ast.FormattedValue) else self.of(part, place, depth)
                whole = [start + end for start in whole for end in inner]
            return whole
        if isinstance(node, ast.IfExp):
            return self.of(node.body, place, depth) + self.of(node.orelse, place, depth)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.of(value, place, depth)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = self.of(node.left, place, depth), self.of(node.right, place, depth)
            return [left + right for left in sides[0] for right in sides[1]]
        if isinstance(node, ast.Name) and depth < 4:
            return self._assigned(node.id, place, depth + 1) or [ANY]
        if isinstance(node, ast.Call) and self.called(node) in self.functions and depth < 4:
            function = self.functions[self.called(node)]
            given = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
            return [text for value in given for text in self.of(value, value, depth + 1)] or [ANY]
        return [ANY]

    def _value(self, node: ast.expr) -> list[str]:
        """What stands for a value in a text: the text of a constant, or the value's name where it has one."""
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        shown = f"‹{name.strip('_').replace('_', ' ')}›" if len(name) > 2 else ANY
        return (self._assigned(name, self.module, 4) if name.isupper() else []) or [shown]

    def _assigned(self, name: str, place: ast.AST, depth: int) -> list[str]:
        scope = place
        while not isinstance(scope, ast.FunctionDef | ast.Module):
            scope = self.parents[scope]
        found: list[str] = []
        for owner in dict.fromkeys([scope, self.module]):
            for node in ast.walk(owner) if owner is scope else owner.body:
                if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                    found += self.of(node.value, node, depth)
            if found:
                return found
        return self._imported(name)

    def _imported(self, name: str) -> list[str]:
        """The text of a constant that the module imports from another file of the package."""
        for node in self.module.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if name.isupper() and name in names and (node.module or "").startswith("dfcompress."):
                value = getattr(importlib.import_module(node.module), name)
                return [value] if isinstance(value, str) else []
        return []


def with_messages(page: str) -> str:
    """docs/troubleshooting.md with its generated tables renewed: behind the marker of each activity."""
    known = messages()
    for doing in DOING:
        mine = sorted((m for m in known if m.doing == doing), key=lambda m: m.remedy == NOTICE)
        rows = [[m.problem, m.remedy] for m in mine]
        start, end = f"<!-- every message: {doing} -->\n", "<!-- end -->\n"
        before, found, rest = page.partition(start)
        if not found:
            raise SystemExit(f"docs/troubleshooting.md has no line {start.strip()!r} followed by {end.strip()!r}")
        page = before + start + "\n" + table(["message", "what to do"], rows) + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    main()
