"""One invocation of a verb: its folder, its clock, and its run file `run.json` with options, result and versions."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.command_line import command_line
from dfcompress.distributed import world
from dfcompress.errors import BadInput, DfcompressError

RUN_FILE, METRICS = "run.json", "metrics.jsonl"
SCHEMA = 1
VERBS = ("invert", "distill", "merge", "quantize", "prune", "extend", "demo")  # The verbs whose result is a folder.
STATE = ".partial"  # Suffix of the files with the state of unfinished work.
SAVE_EVERY_SECONDS, QUICK_SAVE_SECONDS = 20.0, 2.0
# By verb and option: values that older versions wrote into the run file, and their current names.
FORMER_VALUES = {("merge", "method"): {"all-logits": "logit-matching", "paper": "shapira-sidi"}}


class Run:
    """One invocation of a verb and its folder; of several processes, only the main process writes to the folder.

    `verb`: name of the verb. `folder`: the run folder. `options`: the resolved options that the result depends on; a
    resumed run must have the same. `inputs`: paths that the run reads; they are never deleted by overwriting. `plan`:
    what the run will do, stored in the run file for readers. `resume`: continue the run in the folder. `overwrite`:
    replace the contents of the folder.
    The attribute `earlier` holds the measurements of a resumed run that was already finished, else None; `seconds`
    holds the time of each part.
    Raises `BadInput` where the folder is not empty and neither `resume` nor `overwrite` is set, where it belongs to
    another run or has other options, and where it cannot be written.
    """

    def __init__(
        self,
        verb: str,
        folder: Path,
        options: Mapping[str, Any],
        *,
        inputs: Sequence[str | Path | None] = (),
        plan: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        assert verb in VERBS, "no other folder may be overwritten"
        self.verb, self.folder, self.options = verb, folder, json.loads(json.dumps(options, default=str))
        self.plan, self.command = plan, command_line()
        self.inputs = [Path(path) for path in inputs if path is not None]
        self.seconds: dict[str, float] = {}
        self.earlier: Mapping[str, Any] | None = None
        self._begun = self._made_folder = False
        if world().is_main:
            self._open(resume=resume, overwrite=overwrite)
        self.earlier = world().broadcast(self.earlier)
        self._started = time.perf_counter()

    def _open(self, *, resume: bool, overwrite: bool) -> None:
        check_output(self.folder, resume=resume, overwrite=overwrite)
        if self.folder.exists() and any(self.folder.iterdir()):
            if resume:
                before = read_run_file(self.folder / RUN_FILE)
                self._check_same_job(before)
                self.earlier, self.command = before.get("measurements"), before.get("command")
                return
            self._refuse_to_delete_inputs()
        if resume:
            console.notice(f"{self.folder} holds nothing to resume: it begins anew.")
        try:
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._empty()
            self._write({"finished": False})
            self._begun = True
        except (OSError, DfcompressError) as error:
            reason = f"{error.strerror}." if isinstance(error, OSError) else error.problem
            raise BadInput(f"--output {self.folder} cannot be written: {reason}", "Name another folder.") from None

    def withdraw(self) -> None:
        """Delete the run file, and the folder if this run made it, where nothing else was written because the input was
        refused before any work. Files of an earlier run stay.
        """
        if self._begun and [path.name for path in self.folder.iterdir()] == [RUN_FILE]:
            (self.folder / RUN_FILE).unlink()
            if self._made_folder:
                self.folder.rmdir()

    def _empty(self) -> None:
        """Delete the contents of the folder, except for a run file without options. If the process is killed meanwhile,
        this run file still marks the folder as a run folder, and nothing can be resumed from it.
        """
        left = list(self.folder.iterdir())
        if left:
            write_json(self.folder / RUN_FILE, {"verb": self.verb, "options": {}})
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RUN_FILE:
                path.unlink()

    def _refuse_to_delete_inputs(self) -> None:
        for path in self.inputs:
            if path.resolve().is_relative_to(self.folder.resolve()):
                raise BadInput(f"--overwrite would delete {path}, which this run reads.", "Name another folder.")

    def _check_same_job(self, before: Mapping[str, Any]) -> None:
        if before.get("verb") != self.verb:
            raise BadInput(
                f"{self.folder} holds a run of {before.get('verb')!r}, not {self.verb!r}.", "Name another folder."
            )
        for name in sorted(self.options.keys() | before["options"].keys()):
            old, new = before["options"].get(name), self.options.get(name)
            old = FORMER_VALUES.get((self.verb, name), {}).get(str(old), _without_removed(old, new))
            if old != new:
                which, was, now = _first_difference(name, old, new)
                began = f" It was started by: {before['command']}" if before.get("command") else ""
                raise BadInput(
                    f"{self.folder} was started with {which} = {was!r}, now it is {now!r}.",
                    f"Resume with the same options, or name another folder.{began}",
                )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[part]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def finish(self, measurements: Mapping[str, Any]) -> None:
        """Write the finished run file (options, measurements, seconds, versions, machine), and delete saved states."""
        from dfcompress.machine.device import processor_name, resolve_device
        from dfcompress.machine.memory import peak_memory_bytes

        device = resolve_device(self.options.get("device", "cpu"))
        total = time.perf_counter() - self._started
        self._write(
            {
                "finished": True,
                "measurements": dict(measurements),
                "seconds": {
                    **{part: round(value, 2) for part, value in self.seconds.items()},
                    "invocation": round(total, 2),
                },
                "peak_memory_bytes": peak_memory_bytes(device),
                "processor": processor_name(device),
            }
        )
        for state in self.folder.rglob(f"*{STATE}"):
            state.unlink()

    def amend(self, measurements: Mapping[str, Any]) -> None:
        """Replace the measurements in the run file of a run that an earlier invocation finished."""
        path = self.folder / RUN_FILE
        write_json(path, {**read_run_file(path), "measurements": dict(measurements)})

    def _write(self, values: Mapping[str, Any]) -> None:
        versions = {name: metadata.version(name) for name in ("dfcompress", "torch")} | {
            "python": platform.python_version()
        }
        planned = {} if self.plan is None else {"plan": self.plan}
        described = {"schema": SCHEMA, "verb": self.verb, "command": self.command, "options": self.options}
        write_json(self.folder / RUN_FILE, {**described, **planned, "versions": versions, **values})


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `BadInput` where a run could neither start nor continue in the folder; nothing is written."""
    if resume and overwrite:
        raise BadInput("--resume and --overwrite exclude each other.", "Give one of them.")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output {folder} is a file.", "Name a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not (resume or overwrite):
            raise BadInput(f"--output {folder} is not empty.", "Add --resume to go on with it, or --overwrite.")
        if not (folder / RUN_FILE).exists() or (overwrite and not _is_ours(folder / RUN_FILE)):
            raise BadInput(f"--output {folder} was not made by dfcompress.", "Name an empty or a new folder.")


def check_output_file(path: Path, *, example: str, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise `BadInput` where the file `path` cannot be written, exists without `overwrite`, or is one of the `inputs`;
    nothing is written. `example`: file name for the message.
    """
    if path.is_dir():
        raise BadInput(f"--output {path} is a folder.", f"Name a file, for instance {path / example}.")
    if path.resolve() in {each.resolve() for each in inputs}:
        raise BadInput(f"--output {path} is the model itself.", "Name another file.")
    if path.exists() and not overwrite:
        raise BadInput(f"--output {path} exists.", "Add --overwrite, or name another file.")
    if not path.parent.is_dir():
        raise BadInput(f"--output {path}: there is no folder {path.parent}.", "Make it, or name another file.")


@contextmanager
def running(
    verb: str,
    folder: Path,
    options: Mapping[str, Any],
    *,
    inputs: Sequence[str | Path | None] = (),
    plan: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Run]:
    """A `Run` in all processes of a job: the main process opens the folder; if one process fails, the others end, too.

    The arguments, and what is raised, are those of `Run`.
    """
    with world().session():
        run = Run(verb, folder, options, inputs=inputs, plan=plan, resume=resume, overwrite=overwrite)
        try:
            yield run
        except BadInput:
            run.withdraw()
            raise


class Clock:
    """The time of work that may be interrupted: its seconds over all invocations, and when to save or show progress."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started = self._saved = self._told = time.perf_counter()
        self._took = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of work, including those of earlier invocations."""
        return self._before + time.perf_counter() - self._started

    def go_on_from(self, seconds: float) -> None:
        """Include the seconds of earlier invocations."""
        self._before = seconds

    def is_time_to_save(self) -> bool:
        """Whether `SAVE_EVERY_SECONDS` have passed since the start, or since the end of the last `saving`; more after a
        slow one, so that saving takes a tenth of the time at most.
        """
        return time.perf_counter() - self._saved >= SAVE_EVERY_SECONDS * max(1.0, self._took / QUICK_SAVE_SECONDS)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save the state inside the block."""
        started = time.perf_counter()
        yield
        self._saved = time.perf_counter()
        self._took = self._saved - started

    def is_time_to_tell(self) -> bool:
        """Whether to show progress: true once a second, because reading a loss waits for the device."""
        if time.perf_counter() - self._told < 1.0:
            return False
        self._told = time.perf_counter()
        return True


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` only after its content is on disk.

    Raises `DfcompressError` where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        # safetensors writes files that only their owner may read; others must be able to read results, too.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DfcompressError(
            f"{path} cannot be written: {error.strerror}.",
            "Make room and run it again, with --resume where there is that.",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The path, the old value and the new value of the first difference inside two option values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{name}.{key}", old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{number}]", *pair) for number, pair in enumerate(zip(old, new, strict=True))]
    else:
        return name, old, new
    differ = (_first_difference(*pair) for pair in pairs if pair[1] != pair[2])
    return next(differ, (name, old, new))


def _without_removed(old: Any, new: Any) -> Any:
    """An option of an earlier run file, without settings that this version no longer has and that were switched off."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {name: value for name, value in old.items() if name in new or value}
    return old


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and numbers atomically, for `torch.load(weights_only=True)`; raises as `write_atomically` does."""
    import torch

    whole = io.BytesIO()  # On a full disk, `torch.save` to a file only raises an assertion of its own.
    torch.save(dict(state), whole)
    with write_atomically(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def _is_ours(path: Path) -> bool:
    """Whether a file is the run file of a dfcompress run, of any version, finished or not; other programs also write
    files called `run.json`.
    """
    try:
        return _parsed_run_file(path)["verb"] in VERBS
    except BadInput:
        return False


def _parsed_run_file(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        values["options"].items(), values["verb"].lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{path} is not a run file of dfcompress.", "Name another folder.") from None
    return values


def read_run_file(path: Path) -> dict[str, Any]:
    """Read the run file of an earlier run; raises `BadInput` where the file is no run file, or has another schema."""
    values = _parsed_run_file(path)
    if values.get("schema", SCHEMA) != SCHEMA:
        found = values["schema"]
        raise BadInput(f"{path} has schema {found!r}, this version reads {SCHEMA}.", "Use the version that wrote it.")
    return values


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The content of a run's `run.json`.

    `folder`: the run folder. `verb`: name of the verb. `options`: the options that the result depends on. `versions`:
    of dfcompress, PyTorch and Python. `finished`: whether the run is finished. `plan`: the plan, None in run files of
    version 0.1. `command`: the command line that started the run, None where Python code did. `measurements`: the
    verb's result as JSON, None where the run is not finished. `seconds`: time of each part of the last invocation, and
    its total (`invocation`). `peak_memory_bytes`: peak memory of the process, on the GPU for CUDA. `processor`: name of
    the processor. The last three are empty or None where the run is not finished.
    """

    folder: Path
    verb: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    finished: bool = False
    plan: Mapping[str, Any] | None = None
    command: str | None = None
    measurements: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    processor: str | None = None

    @classmethod
    def read(cls, folder: str | Path) -> RunFile:
        """Read the run file in a run folder; raises `BadInput` where there is none, or it cannot be read."""
        path = Path(folder) / RUN_FILE
        if not path.is_file():
            raise BadInput(f"{folder} holds no {RUN_FILE}.", "Name the folder of a run.")
        values = {"versions": {}, **read_run_file(path)}
        return cls(folder=Path(folder), **{each.name: values[each.name] for each in fields(cls) if each.name in values})


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object atomically; raises as `write_atomically` does."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, default=str) + "\n")
