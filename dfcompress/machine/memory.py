"""How many images fit into memory at once: what one takes is counted, and what is free is asked for. What is said where
memory is not enough, and how freed memory is kept.

taken = count_growth(lambda images: network(torch.zeros(images, 3, 224, 224)))
images_at_once(256, taken, input_size=(3, 224, 224), target=torch.device("cpu"))     # 16
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfcompress.distributed import world
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.machine.device import is_cuda

# Of the free memory. ResNet-44 with 256 images of 32 px in fp32 has 895 MB of tensors and grew by 1.2 GB: with 0.6 it
# is computed whole where 2.6 GB are free, as on a machine with 4 GB. The rest is for what comes beside and after.
SHARE = 0.6
# Growth of the process against the tensors counted, eagerly on a CPU: 1.0 to 1.3 in fp32 (EfficientNet-Lite0 and
# ResNet-50 at 224 px, ResNet-44), 1.4 to 1.6 in bf16 (these and ResNet-18), whose convolutions have memory of their
# own. Compiled: 0.8 (EfficientNet-Lite0) and 1.8 (ResNet-44, 0.2 GB of which are the compiler's).
GROWTH = 1.7
# On a CPU: 256 images of 64 px, 16 of 224 px. More at once are not faster there: ResNet-50 in bf16 took 0.33 s an image
# by 8 and 0.43 s by 16 (on one busy core).
PIXELS = 2**20


class Taken(NamedTuple):
    """What a computation takes of the memory, in bytes: `each` image, and `beside` them whatever does not grow with
    their number (gradients of weights, say).
    """

    each: float
    beside: float = 0.0


def images_at_once(
    wanted: int,
    taken: Taken,
    *,
    target: torch.device,
    input_size: tuple[int, int, int] | None = None,
    beside: float = 0.0,
) -> int:
    """How many images to compute at once: all that are `wanted`, or the power of two that fits into the free memory; of
    an `input_size` on a CPU `PIXELS` at most.

    `taken` is as `count_growth` gives it, and `beside` the bytes that there are besides.
    Raises `BadInput`, with the bytes, where not even one fits.
    """
    free = free_bytes(target)
    beside += GROWTH * taken.beside
    fit = int(max(0.0, SHARE * free - beside) // max(1.0, GROWTH * taken.each))
    if fit < 1:
        needed = (GROWTH * taken.each + beside) / SHARE
        raise BadInput(
            f"One image at a time needs {needed:,.0f} bytes of free memory, and {free:,} are free on {target}.",
            "Use a machine with more memory, or a smaller --batch-size.",
        )
    if input_size and not is_cuda(target):
        fit = min(fit, max(1, PIXELS // (input_size[1] * input_size[2])))
    return wanted if wanted <= fit else 1 << (fit.bit_length() - 1)


def count_growth(function: Callable[[int], object]) -> Taken:
    """What `function` takes at most when it is called with a number of images.

    It is called with 2 and with 4 (BatchNorm cannot normalise a single image whose features are 1 x 1). After every
    operation the tensors that live take a + b · images; of a and of b the largest count, so that a peak that only many
    images reach is not missed.
    """
    two, four = _history(partial(function, 2)), _history(partial(function, 4))
    if len(two) != len(four):
        return Taken(max(four, default=0) / 4)
    each = [(more - less) / 2 for less, more in zip(two, four, strict=True)]
    beside = [less - 2 * growth for less, growth in zip(two, each, strict=True)]
    return Taken(max([0.0, *each]), max([0.0, *beside]))


def count_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made by `function` take at one time; those that were there before do not count."""
    return max(_history(function), default=0)


def _history(function: Callable[[], object]) -> list[int]:
    """The bytes that tensors made by `function` take, after each of its operations."""
    living = _LivingTensors()
    with living:
        function()
    return living.history


class _LivingTensors(TorchDispatchMode):
    """Adds up the memory behind tensors that operations make inside, until nothing holds it any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.history: list[int] = []
        self._now = 0
        self._living: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # To keep the compiler away from here, torch would import it.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.history.append(self._now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return
        self._now += size

        def gone(_: object) -> None:
            self._now -= size
            del self._living[key]

        self._living[key] = weakref.ref(storage, gone)


def free_bytes(target: torch.device) -> int:
    """The memory that this process can still take on a device: of a GPU that processes of the job share, its share; on
    a CPU its share of what all processes of the job on this machine can, within the limits of its control groups and
    its own.
    """
    if is_cuda(target):
        return free_gpu_bytes(target) // -(-world().local_world_size // max(1, torch.cuda.device_count()))
    return max(0, min(_limits(Path("/")), default=2**62)) // world().local_world_size


def _limits(root: Path) -> Iterator[int]:
    """What the machine, the control groups and the limit of addresses still allow, where they tell."""
    if available := _field(root / "proc/meminfo", "MemAvailable"):
        yield 1024 * available
    else:
        with suppress(ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    yield from _of_control_groups(root)
    with suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit - 1024 * (_field(root / "proc/self/status", "VmSize") or 0)


def _of_control_groups(root: Path) -> Iterator[int]:
    """What each group that this process is in, of either version, still allows. Its page cache can be taken back."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, maximum, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, maximum, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        inside = Path(name.lstrip("/"))
        for group in (inside, *inside.parents):
            folder = root / mount / group
            with suppress(OSError, ValueError):  # There is none, or `max`.
                limit = int((folder / maximum).read_text())
                yield limit - int((folder / used).read_text()) + (_field(folder / "memory.stat", cache) or 0)


def _field(path: Path, name: str) -> int | None:
    """The number behind a name in a file of lines such as `MemAvailable:  123 kB`, None where there is none."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            first, *rest = line.split()
            if first.rstrip(":") == name:
                return int(rest[0])
    return None


# A CPU has no exception class of its own for that, nor have the driver, cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED")


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether the memory of a device or of the machine did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Raise `DfcompressError` with the `remedy` where the memory is not enough for what is done inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DfcompressError(f"{what} do not fit into memory.", remedy) from None


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones instead of giving it back.

    Getting it again costs a page fault for every 4 KiB, which a step that writes hundreds of MiB feels: 64 images
    of 224 pixels cost EfficientNet-Lite0 14 ms each, and 47 where tensors of more than 32 MiB are given back.
    The price is that the process stays as large as it once was. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give back what `keep_freed_memory` kept so far."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def free_gpu_bytes(device: torch.device) -> int:
    """The memory of a GPU that nobody has taken, and that this process holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: on the GPU for CUDA, resident for a CPU."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
