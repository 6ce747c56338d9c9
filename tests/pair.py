"""Two processes of one job that take command lines as they come, so that their start is paid once, not by every test.

    pair = Pair(folder)
    ended = pair.run("distill", model, "-o", folder)        # [(exit code, standard error) by rank]

As a program this file is one of the two. It knows the other by the variables that torchrun would set.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

COUNT = 2
LONGEST_SECONDS = 300.0  # Of a command; on a busy machine one takes 20.


class Ended(NamedTuple):
    """How a command ended in one process; of one that ended with it, the code is that of the process."""

    code: int
    errors: str


class Pair:
    """Started at the first command; where a command ends the processes, the next one gets new ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts, self.processes = folder, 0, []

    def run(self, *arguments: object) -> list[Ended]:
        if not self.processes or any(process.poll() is not None for process in self.processes):
            self._start()
        begins = [file.stat().st_size for file in self.files]
        for process in self.processes:
            process.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
            process.stdin.flush()
        impatient = threading.Timer(LONGEST_SECONDS, self._kill)
        impatient.start()
        codes = [process.stdout.readline() or process.wait() for process in self.processes]
        impatient.cancel()
        errors = [file.read_bytes()[begin:].decode() for file, begin in zip(self.files, begins, strict=True)]
        return [Ended(int(code), error) for code, error in zip(codes, errors, strict=True)]

    def close(self) -> None:
        self._kill()
        for process in self.processes:
            process.communicate()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _start(self) -> None:
        self.close()
        self.starts += 1
        self.files = [self.folder / f"errors-{self.starts}-{rank}.txt" for rank in range(COUNT)]
        # Of a warning in several commands, each shall tell.
        self.processes = launched(COUNT, ["-W", "always::UserWarning", __file__], errors=self.files)


def launched(count: int, command: list[str], *, errors: list[Path] | None = None) -> list[subprocess.Popen]:
    """So many processes of Python, with the variables that torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(count):
        with contextlib.ExitStack() as stack:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stack.enter_context(errors[rank].open("wb")) if errors else subprocess.PIPE,
                    text=True,
                )
            )
    return processes


def main() -> None:
    from dfcompress import cli

    for line in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.run(json.loads(line))
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
