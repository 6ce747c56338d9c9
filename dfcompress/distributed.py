"""Several processes, one job: started by `torchrun` or by SLURM, they share units of work through a key-value store.

No process is needed for a result that another one makes: which process makes a unit changes nothing about it.
A process that dies ends the others within seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

from dfcompress import console
from dfcompress.errors import BadInput, DfcompressError, first_line

LOST_AFTER_SECONDS = 10.0
BEAT_SECONDS = 0.5
JOINING = timedelta(minutes=5)
TERMINATED = 143


class World:
    """This process and the others of its job; alone, everything here is immediate.

    `rank` counts from 0, the rank that leads: it alone prints, decides and measures.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, local_count: int = 1) -> None:
        self.rank, self.count, self.local_rank, self.local_count = rank, count, local_rank, local_count
        self._all: Any = None
        self._store: Any = None
        self._calls = self._jobs = 0
        self._connected = False
        self._over = threading.Event()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides and prints."""
        return self.rank == 0 or self.count == 1

    @contextmanager
    def session(self) -> Iterator[None]:
        """Join the others; where one fails or dies, the rest end too.

        Raises `DfcompressError` where the others do not come.
        """
        if self.count == 1:
            yield
            return
        self._join()
        # torchrun terminates the rest where one process dies.
        before = signal.signal(signal.SIGTERM, lambda *_: self._end("terminated", code=TERMINATED))
        try:
            with self._watching():
                yield
                self._disconnect()
                self._ask("set", f"done/{self.rank}", "")
                if self.is_main:  # It may keep the store, so it leaves last.
                    self._wait_for([f"done/{rank}" for rank in range(self.count)])
        except BaseException as error:
            with suppress(RuntimeError):
                self._store.set("failed", "" if self.is_main else f"process {self.rank}: {error}")
                time.sleep(4 * BEAT_SECONDS if not self.is_main else 0)  # For the leading process to say it.
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Watch over the others inside, in a thread that has ended afterwards.

        The interpreter kills threads that are left at its end; one that is inside the store then takes the process
        along: "terminate called without an active exception".
        """
        self._over.clear()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join(LOST_AFTER_SECONDS)  # A store whose keeper is gone may not answer.

    def broadcast(self, value: Any = None) -> Any:
        """What the leading process passes here, on every process; a JSON value."""
        if self.count == 1:
            return value
        key = self._next("broadcast")
        if self.is_main:
            self._ask("set", key, json.dumps(value))
        self._wait_for([key])
        return json.loads(self._ask("get", key))

    def all_gather(self, value: Any) -> list[Any]:
        """What every process passes here, by rank; JSON values."""
        if self.count == 1:
            return [value]
        key = self._next("all_gather")
        keys = [f"{key}/{rank}" for rank in range(self.count)]
        self._ask("set", keys[self.rank], json.dumps(value))
        self._wait_for(keys)
        return [json.loads(self._ask("get", each)) for each in keys]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            key = self._next("barrier")
            self._ask("set", f"{key}/{self.rank}", "")
            self._wait_for([f"{key}/{rank}" for rank in range(self.count)])

    def connect(self, backend: str) -> None:
        """Make torch's collective operations work between the processes, over `nccl` or `gloo`, until work ends."""
        from torch import distributed

        if not self._connected:
            store = distributed.PrefixStore("collective", self._store)
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)
            self._connected = True

    def _disconnect(self) -> None:
        from torch import distributed

        if self._connected:
            distributed.destroy_process_group()
            self._connected = False

    def claim(self, units: Sequence[Any]) -> Iterator[Any]:
        """The units this process shall do: each is given to one process, whoever asks first.

        Every process must pass the same units.
        """
        if self.count == 1:
            yield from units
            return
        key = self._next("share")
        while (taken := self._ask("add", key, 1)) <= len(units):
            yield units[taken - 1]

    def _next(self, what: str) -> str:
        self._calls += 1
        return f"{what}/{self._calls}"

    def _join(self) -> None:
        from torch import distributed

        try:
            if self._all is None:
                self._all, _, _ = next(distributed.rendezvous("env://", self.rank, self.count, timeout=JOINING))
        except (RuntimeError, ValueError) as error:
            raise DfcompressError(
                f"Process {self.rank} of {self.count} cannot join the others: {first_line(error)}.",
                "Start all of them with torchrun or srun.",
            ) from None
        self._jobs += 1
        self._store = distributed.PrefixStore(f"dfcompress/{self._jobs}", self._all)

    def _wait_for(self, keys: Sequence[str]) -> None:
        while not self._ask("check", list(keys)):
            time.sleep(0.05)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        """An operation of the store; the run is over where the process that keeps it is gone."""
        try:
            return getattr(self._store, operation)(*arguments)
        except RuntimeError:
            self._end(f"process 0 of {self.count} is gone", lost=0)

    def _watch(self) -> None:
        """Say that this process lives, and end it where another one does no more."""
        heard = dict.fromkeys(range(self.count), (0, time.monotonic()))
        beat = 0
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                if self._store.check(["failed"]) and not self._over.is_set():
                    self._end(self._store.get("failed").decode())
                lost = next((rank for rank in range(self.count) if self._is_lost(rank, heard)), None)
            except RuntimeError:
                lost = 0
            if lost is not None and not self._over.is_set():
                self._end(f"process {lost} of {self.count} is gone", lost=lost)

    def _is_lost(self, rank: int, heard: dict[int, tuple[int, float]]) -> bool:
        """Whether a process has not been heard of for too long; `heard` holds its last beat, and when that was."""
        if self._store.check([f"done/{rank}"]):
            return False
        key, now = f"beat/{rank}", time.monotonic()
        beat = int(self._store.get(key)) if self._store.check([key]) else 0
        if beat != heard[rank][0]:
            heard[rank] = (beat, now)
        patience = LOST_AFTER_SECONDS if beat else JOINING.total_seconds()
        return now - heard[rank][1] > patience

    def _end(self, why: str, *, lost: int | None = None, code: int = 1) -> None:
        """End this process at once; one of those that are left says why, unless that was said."""
        if why and self.rank == (1 if lost == 0 else 0):
            console.last_words(f"dfcompress: {why}; the same line with --resume goes on.")
        os._exit(code)


@cache
def world() -> World:
    """The processes of this job, from the variables that torchrun or SLURM set.

    Raises `BadInput` where those are no numbers.
    """
    variables = dict(os.environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        if "RANK" not in variables and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            variables |= _from_slurm(variables)
            os.environ.update({name: variables[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")})
        return World(*(int(variables.get(name, default)) for name, default in zip(names, "0101", strict=True)))
    except ValueError:
        values = ", ".join(f"{name}={variables.get(name)}" for name in names)
        raise BadInput(f"{values} are not all numbers.", "Start with torchrun, or unset them.") from None


def _from_slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from the variables of a SLURM step; steps of one job get ports of their own."""
    step = 100 * int(variables.get("SLURM_JOB_ID", "0")) + int(variables.get("SLURM_STEP_ID", "0"))
    tasks = variables["SLURM_STEP_NUM_TASKS"]
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": variables.get("SLURM_STEP_TASKS_PER_NODE", tasks).partition("(")[0].partition(",")[0],
        "MASTER_ADDR": variables.get("MASTER_ADDR", first_host(variables["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": variables.get("MASTER_PORT", str(20_000 + step % 20_000)),
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: `gpu[03-05,9],login` → `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert found is not None
    return found[1] + (found[2] or "")
