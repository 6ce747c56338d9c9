"""Several processes of one job, started by `torchrun` or SLURM, share units of work through a key-value store.

    with world().session():                      # join the others
        for shard in world().claim(missing):     # each shard is given to one process
            make(shard)
        world().barrier()

Operations have the names of those in `torch.distributed`. The result has the same bytes whichever process makes a unit.
Where a process dies, the others end within seconds.
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
    """The processes of a job, seen from this process; a job of one process never waits.

    `rank`: number of this process, from 0 to `world_size` − 1. `world_size`: number of processes. `local_rank`,
    `local_world_size`: the same among the processes on this machine. Rank 0 is the main process: only this process
    prints, decides and measures.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self._all: Any = None
        self._store: Any = None
        self._calls = self._jobs = 0
        self._has_process_group = False
        self._over = threading.Event()

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which decides and prints."""
        return self.rank == 0 or self.world_size == 1

    @contextmanager
    def session(self) -> Iterator[None]:
        """Join the other processes; inside the block, a process that fails or dies ends all processes.

        Raises `DfcompressError` where this process cannot join the others.
        """
        if self.world_size == 1:
            yield
            return
        self._join()
        # torchrun terminates the other processes where one dies. Python handles signals only in the main thread.
        handles = threading.current_thread() is threading.main_thread()
        if handles:
            before = signal.signal(signal.SIGTERM, lambda *_: self._end("terminated", code=TERMINATED))
        try:
            with self._watching():
                yield
                self._destroy_process_group()
                self._ask("set", f"done/{self.rank}", "")
                if self.is_main:  # The main process may hold the store, so it leaves last.
                    self._wait_for([f"done/{rank}" for rank in range(self.world_size)])
        except BaseException as error:
            with suppress(RuntimeError):
                self._store.set("failed", "" if self.is_main else f"process {self.rank}: {error}")
                time.sleep(4 * BEAT_SECONDS if not self.is_main else 0)  # Gives the main process time to print it.
            raise
        finally:
            if handles:
                signal.signal(signal.SIGTERM, before)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Run a thread that watches the other processes; the thread has ended when the block is left.

        At its exit, the interpreter kills running threads. A thread killed inside the store aborts the process:
        "terminate called without an active exception".
        """
        self._over.clear()
        # Before any work: the others would wait for a process that died before its first heartbeat, as if it had not
        # joined yet.
        self._ask("add", f"beat/{self.rank}", 1)
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join(LOST_AFTER_SECONDS)  # A store may not respond after the process that holds it is gone.

    def broadcast(self, value: Any = None) -> Any:
        """Return, in every process, the JSON value that the main process passes."""
        if self.world_size == 1:
            return value
        key = self._next("broadcast")
        if self.is_main:
            self._ask("set", key, json.dumps(value))
        self._wait_for([key])
        return json.loads(self._ask("get", key))

    def all_gather(self, value: Any) -> list[Any]:
        """Return, in every process, the JSON values that all processes pass, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        key = self._next("all_gather")
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        self._ask("set", keys[self.rank], json.dumps(value))
        self._wait_for(keys)
        return [json.loads(self._ask("get", each)) for each in keys]

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.world_size > 1:
            key = self._next("barrier")
            self._ask("set", f"{key}/{self.rank}", "")
            self._wait_for([f"{key}/{rank}" for rank in range(self.world_size)])

    def init_process_group(self, backend: str) -> None:
        """Start torch's process group by the `backend` `nccl` or `gloo`, for collective operations on tensors. It ends
        with the session.
        """
        from torch import distributed

        if not self._has_process_group:
            store = distributed.PrefixStore("collective", self._store)
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
            self._has_process_group = True

    def _destroy_process_group(self) -> None:
        from torch import distributed

        if self._has_process_group:
            distributed.destroy_process_group()
            self._has_process_group = False

    def claim(self, units: Sequence[Any]) -> Iterator[Any]:
        """Yield the units that this process shall do; each unit goes to the first process that requests it.

        Every process must pass the same `units`.
        """
        if self.world_size == 1:
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
                self._all, _, _ = next(distributed.rendezvous("env://", self.rank, self.world_size, timeout=JOINING))
        except (RuntimeError, ValueError) as error:
            raise DfcompressError(
                f"Process {self.rank} of {self.world_size} cannot join the others: {first_line(error)}.",
                "Start all of them with torchrun or srun.",
            ) from None
        self._jobs += 1
        self._store = distributed.PrefixStore(f"dfcompress/{self._jobs}", self._all)

    def _wait_for(self, keys: Sequence[str]) -> None:
        while not self._ask("check", list(keys)):
            time.sleep(0.05)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        """Run an operation of the store; end this process if the main process, which holds the store, is gone."""
        try:
            return getattr(self._store, operation)(*arguments)
        except RuntimeError:
            self._end(f"process 0 of {self.world_size} is gone", lost=0)

    def _watch(self) -> None:
        """Send heartbeats, and end this process where another process has failed or sends no heartbeats any more. The
        main process watches the others, and the others watch the main process.
        """
        watched = range(1, self.world_size) if self.is_main else [0]
        heard = dict.fromkeys(watched, (0, time.monotonic()))
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self.rank}", 1)
                if self._store.check(["failed"]) and not self._over.is_set():
                    self._end(self._store.get("failed").decode())
                lost = next((rank for rank in watched if self._is_lost(rank, heard)), None)
                if lost:  # The others end without a message, and before the store ends.
                    self._store.set("failed", "")
                    time.sleep(4 * BEAT_SECONDS)
            except RuntimeError:
                lost = 0
            if lost is not None and not self._over.is_set():
                self._end(f"process {lost} of {self.world_size} is gone", lost=lost)

    def _is_lost(self, rank: int, heard: dict[int, tuple[int, float]]) -> bool:
        """Whether a process sent no new heartbeat for too long; `heard`: last heartbeat and its time by rank."""
        beat, now = self._store.add(f"beat/{rank}", 0), time.monotonic()
        if beat != heard[rank][0] or self._store.check([f"done/{rank}"]):
            heard[rank] = (beat, now)
        patience = LOST_AFTER_SECONDS if beat else JOINING.total_seconds()
        return now - heard[rank][1] > patience

    def _end(self, why: str, *, lost: int | None = None, code: int = 1) -> None:
        """End this process at once with exit code `code`. The process of rank 0, or of rank 1 where rank 0 is lost,
        prints `why`, unless it is empty.
        """
        if why and self.rank == (1 if lost == 0 else 0):
            console.last_words(f"dfcompress: {why}; the same line with --resume goes on.")
        os._exit(code)


@cache
def world() -> World:
    """The processes of this job, from the environment variables that torchrun or SLURM set.

    Raises `BadInput` where a variable is not a number.
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
    """Translate the variables of a SLURM step into those of torchrun; every step of a job has its own port."""
    step = 100 * int(variables.get("SLURM_JOB_ID", "0")) + int(variables.get("SLURM_STEP_ID", "0"))
    tasks = variables["SLURM_STEP_NUM_TASKS"]
    per_node = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node[int(variables.get("SLURM_NODEID", "0"))],
        "MASTER_ADDR": variables.get("MASTER_ADDR", first_host(variables["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": variables.get("MASTER_PORT", str(20_000 + step % 20_000)),
    }


def tasks_per_node(counts: str) -> list[str]:
    """Expand a SLURM list of task counts: `2(x3),1` → 2, 2, 2, 1."""
    return [count for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: `gpu[03-05,9],login` → `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert found is not None
    return found[1] + (found[2] or "")
