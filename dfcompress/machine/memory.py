"""The number of images that fit into memory at once, from the counted memory of one image and the free memory; errors
for missing memory; and reuse of freed memory.

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

# Share of the free memory that is used; the rest is for other and later needs. ResNet-44 with 256 images of 32 px in
# fp32 has 895 MB of tensors, and its process grew by 1.2 GB: with a share of 0.6, the batch is computed whole where
# 2.6 GB are free, as on a machine with 4 GB.
SHARE = 0.6
# Growth of the process divided by the counted bytes of tensors, on a CPU. Eager: 1.0 to 1.3 in fp32 (EfficientNet-Lite0
# and ResNet-50 at 224 px, ResNet-44), 1.4 to 1.6 in bf16 (the same and ResNet-18), whose convolutions need memory of
# their own. Compiled: 0.8 (EfficientNet-Lite0) and 1.8 (ResNet-44, including 0.2 GB for the compiler).
GROWTH = 1.7
# Maximum number of pixels at once on a CPU: 256 images of 64 px, or 16 of 224 px. More images at once are not faster:
# ResNet-50 in bf16 took 0.33 s for an image with 8 images at once, and 0.43 s with 16 (on one busy core).
PIXELS = 2**20


class Taken(NamedTuple):
    """Memory of a computation, in bytes: `each` for one image, `beside` for everything that does not grow with the
    number of images (for instance gradients of weights).
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
    """The number of images to compute at once: `wanted`, or else the largest power of two that fits into the free
    memory of the device `target`. With an `input_size`, a CPU computes at most `PIXELS` pixels at once.

    `taken`: result of `count_growth`. `beside`: further bytes that are needed.
    Raises `BadInput`, naming the bytes, where not even one image fits.
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
    """The peak memory of `function`, which is called with a number of images.

    It is called with 2 and with 4 images (BatchNorm cannot normalise a single image whose features are 1 x 1). After
    every operation the living tensors take a + b · images bytes. The largest a and the largest b are returned, so that
    a peak that only many images reach is included.
    """
    two, four = _history(partial(function, 2)), _history(partial(function, 4))
    if len(two) != len(four):
        return Taken(max(four, default=0) / 4)
    each = [(more - less) / 2 for less, more in zip(two, four, strict=True)]
    beside = [less - 2 * growth for less, growth in zip(two, each, strict=True)]
    return Taken(max([0.0, *each]), max([0.0, *beside]))


def count_bytes(function: Callable[[], object]) -> int:
    """The peak bytes of the tensors that `function` makes; tensors that existed before do not count."""
    return max(_history(function), default=0)


def _history(function: Callable[[], object]) -> list[int]:
    """The bytes of the living tensors that `function` made, after each of its operations."""
    living = _LivingTensors()
    with living:
        function()
    return living.history


class _LivingTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make inside the block; a freed storage no longer counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.history: list[int] = []
        self._now = 0
        self._living: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Otherwise torch would import its compiler, only to skip this class.

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
    """The bytes that this process can still allocate on a device.

    On a GPU that several processes of the job share: its share of the free memory. On a CPU: its share of the memory
    available to all processes of the job on this machine, within the limits of control groups and address space.
    """
    if is_cuda(target):
        return free_gpu_bytes(target) // -(-world().local_world_size // max(1, torch.cuda.device_count()))
    return max(0, min(_limits(Path("/")), default=2**62)) // world().local_world_size


def _limits(root: Path) -> Iterator[int]:
    """The bytes still allowed by the machine, by the control groups and by the limit of addresses, where known."""
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
    """The bytes still allowed by each control group (version 1 or 2) of this process; page cache counts as free."""
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
            with suppress(OSError, ValueError):  # The file does not exist, or holds `max`.
                limit = int((folder / maximum).read_text())
                yield limit - int((folder / used).read_text()) + (_field(folder / "memory.stat", cache) or 0)


def _field(path: Path, name: str) -> int | None:
    """The number after a name in a file of lines such as `MemAvailable:  123 kB`, None where the name is missing."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            first, *rest = line.split()
            if first.rstrip(":") == name:
                return int(rest[0])
    return None


# Out of memory on a CPU, in the CUDA driver, in cuBLAS and in cuDNN has no exception class of its own.
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED")


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error means that the memory of a device or of the machine was not sufficient."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Raise `DfcompressError` where memory is not sufficient inside the block; `what`, `remedy`: for the message."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DfcompressError(f"{what} do not fit into memory.", remedy) from None


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later tensors, instead of returning it to the system.

    Allocating it again costs a page fault for every 4 KiB, which is slow for steps that write hundreds of MiB:
    EfficientNet-Lite0 with 64 images of 224 pixels takes 14 ms for each image with kept memory, and 47 ms where tensors
    of more than 32 MiB are returned. The cost: the process keeps its peak size. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Return to the system the memory that `keep_freed_memory` has kept so far."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def free_gpu_bytes(device: torch.device) -> int:
    """The free bytes of a GPU, including memory that this process has reserved and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The peak bytes of this process so far: allocated on the GPU for CUDA, resident memory for a CPU."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
