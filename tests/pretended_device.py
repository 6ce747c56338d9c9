"""A CUDA device without a GPU: real commands, real numbers, and the refusals of a device.

    python pretended_device.py COUNT < COMMANDS

COMMANDS is a JSON list of command lines of dfcompress, run one after the other in this process, which has COUNT devices
named `gpu:0`, `gpu:1` ..., until one fails. Each ends in one JSON line {code, replays, waits, elsewhere}: its exit
code, how often a captured graph was replayed, every wait for the device inside a step, and how many convolutions of
more than four images the CPU computed while the device was idle (a network is looked at with up to four before any
work).

A tensor of the device holds a CPU tensor that computes for it. Refused is what a GPU refuses: tensors of two devices in
one operation, a generator of another device, and, while a graph is captured, whatever waits for the device or copies
from the host. A graph is a tape of operations on their memory: nothing on it takes effect before it is replayed, and
Python is not run again. `dfcompress/machine/`, the only room that names CUDA, is read with `gpu` in place of `cuda`.

Not seen: compilers, collective operations, rounding, memory, speed.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import sys
import types
import weakref
from collections import Counter

import torch
import torch._dynamo  # Before anything is replaced.
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

NAME, aten = "gpu", torch.ops.aten
LOOKED_AT = 4  # Images that a network is asked about when it is loaded, on the CPU.
# Operations whose indices may lie on the CPU.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Operations whose outcome, or its size, the host must know.
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.masked_select.default}
# What operations write to though their schemas do not say so.
WRITTEN_UNSAID = {(aten.native_batch_norm.default, name) for name in ("running_mean", "running_var")}
COPYING = {aten.copy_.default, aten._to_copy.default}
# Operations that `torch.autocast` runs in its type on a GPU (some of them; docs of `torch.amp`).
LOWERED = ("conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "addmm", "prelu")


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device; `inner`, on the CPU, has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, device):
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **form, device=device)

    def __init__(self, inner, device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        with GPU:
            return function(*args, **(kwargs or {}))

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of a GPU to numpy")

    def tolist(self):
        GPU.wait("tolist")
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copied = self.detach().clone()
        copied = torch.nn.Parameter(copied) if getattr(self, "_is_param", False) else copied
        return memo.setdefault(id(self), copied.requires_grad_(self.requires_grad))


class Generator(torch.Generator):
    """A generator that knows for which device it was made."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        if made.place.type == NAME:
            GPU.generators.add(made)
        return made

    device = property(lambda self: self.place)


class Devices(TorchDispatchMode):
    """All devices of the machine: every operation passes here, is checked, and computed on the inner tensors."""

    def __init__(self, count):
        super().__init__()
        self.count, self.current = count, 0
        self.tape = None  # Of the capture that is under way.
        self.generators, self.default = weakref.WeakSet(), torch._C.Generator()
        self.stepping = False
        self.start_counting()

    def start_counting(self):
        self.waits, self.replays, self.elsewhere = Counter(), 0, 0

    def counts(self):
        return {"replays": self.replays, "waits": self.waits, "elsewhere": self.elsewhere}

    def wait(self, what):
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.stepping:
            self.waits[what] += 1

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        asked = kwargs.get("device")
        if not ours and (asked is None or torch.device(asked).type != NAME):
            if function is aten.convolution.default:
                images = args[0].shape[0]  # For the exporter a symbol, which a comparison would make a number.
                self.elsewhere += isinstance(images, int) and images > LOOKED_AT
            return function(*args, **kwargs)
        home = self.indexed(ours[0].device if asked is None else asked)
        if function is aten.copy_.default:
            home = args[0].device
        self._check(function, args, kwargs, home, tensors)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if home.type == NAME and any(argument.name == "generator" for argument in function._schema.arguments):
            kwargs["generator"] = self._generator(kwargs.get("generator"))
        inner = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        result = self._computed(function, *inner, home)
        return outside(function, (args, kwargs), result, home)

    def _computed(self, function, args, kwargs, home):
        """The result, on the tape if one is being made for this device."""
        if self.tape is None or self.tape.device != home:
            return function(*args, **kwargs)
        return self.tape.computed(function, args, kwargs)

    def indexed(self, device):
        device = torch.device(device)
        return torch.device(NAME, self.current) if device.type == NAME and device.index is None else device

    def _generator(self, given):
        if given is None:
            return self.default
        # On the way through C++ a generator loses its class, so it is known by its state.
        if not any(torch.equal(given.get_state(), own.get_state()) for own in self.generators):
            raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
        return given

    def _check(self, function, args, kwargs, home, tensors):
        if function in READING:
            self.wait(str(function))
        if function in COPYING:
            asynchronous = kwargs.get("non_blocking", False) or (function is aten.copy_.default and args[2:] == (True,))
            self._check_copy(args[function is aten.copy_.default], home, asynchronous)
            return
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        places = {tensor.device for tensor in tensors if isinstance(tensor, OnDevice)}
        if len(places) > 1:
            raise RuntimeError(f"{function}: tensors of two devices, {places}")
        if function in INDEXING and isinstance(args[0], OnDevice):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.wait("a mask as index")
            if strangers:
                self.wait("an index from the CPU")
            strangers = []
        # Numbers from the CPU travel with the kernel.
        numbers = torch.Tag.pointwise in function.tags and all(tensor.dim() == 0 for tensor in strangers)
        if strangers and places and not numbers:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {NAME} and cpu")

    def _check_copy(self, source, home, asynchronous):
        """After a copy from or to the host torch waits for the device, unless the copy is asynchronous."""
        if source.device == home:
            return
        if home.type == "cpu" or self.tape is not None or not asynchronous:
            self.wait(f"copy of {source.nbytes} bytes from {source.device.type} to {home.type}")


def outside(function, given, result, home):
    """The result as tensors of the device; what an operation writes to and returns stays the same object."""
    args, kwargs = given
    written = {}
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written |= dict.fromkeys(argument.alias_info.before_set, value)

    def placed(leaf):
        return OnDevice(leaf, home) if isinstance(leaf, torch.Tensor) and home.type == NAME else leaf

    returns = function._schema.returns
    values = [
        written[next(iter(returned.alias_info.before_set))]
        if returned.alias_info is not None and returned.alias_info.is_write
        else tree_map(placed, value)
        for returned, value in zip(returns, result if len(returns) > 1 else [result], strict=False)
    ]
    return tuple(values) if len(values) > 1 else values[0] if values else None


class Tape:
    """What a stream of `device` captures; nothing of it takes effect before it is replayed."""

    def __init__(self, device):
        self.device = device
        self.operations, self.before, self.made = [], {}, set()

    def computed(self, function, args, kwargs):
        for place, argument in enumerate(function._schema.arguments):
            hidden = (function, argument.name) in WRITTEN_UNSAID
            if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in tensors_in(args[place] if place < len(args) else kwargs.get(argument.name)):
                    self._remember(tensor.untyped_storage())
        result = function(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        self.made |= {tensor.untyped_storage()._cdata for tensor in tensors_in(result)} - given
        self.operations.append((function, args, kwargs, result))
        return result

    def _remember(self, storage):
        if storage._cdata not in self.made:
            self.before.setdefault(storage._cdata, (storage, storage.clone()))

    def end(self):
        """Undo what capturing wrote, and leave nothing readable in what it made."""
        for storage, before in self.before.values():
            storage.copy_(before)
        for tensor in tensors_in([result for *_, result in self.operations]):
            if tensor.untyped_storage()._cdata in self.made and tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay(self):
        GPU.replays += 1
        with torch.no_grad(), _disable_current_modes():
            for function, args, kwargs, result in self.operations:
                for old, new in zip(tensors_in(result), tensors_in(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    """A stream; the one that captures where none is named is made once a process, as torch's is."""

    capturing = None

    def __init__(self, device=None):
        self.device = GPU.indexed(NAME if device is None else torch.device(NAME, device))


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.tape.replay()


@contextlib.contextmanager
def capture(graph, pool=None, stream=None):
    """In place of `torch.cuda.graph`."""
    if stream is None:
        stream = Stream.capturing = Stream.capturing or Stream()
    GPU.tape = graph.tape = Tape(stream.device)
    # Operations without a generator among their arguments draw from the CPU's.
    generators = GPU.default, torch.default_generator, *graph.generators
    drawn = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        tape, GPU.tape = GPU.tape, None
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            tape.end()


@contextlib.contextmanager
def current(device):
    """In place of `torch.cuda.device`."""
    before, GPU.current = GPU.current, GPU.indexed(device).index
    try:
        yield
    finally:
        GPU.current = before


class Cuda(backend_registration._DummyBackendModule):
    """In place of `torch.cuda`."""

    CUDAGraph, Stream, graph, device = Graph, Stream, staticmethod(capture), staticmethod(current)
    device_count = staticmethod(lambda: GPU.count)
    current_device = staticmethod(lambda: GPU.current)
    get_device_name = staticmethod(lambda device=None: "Pretended")
    get_device_capability = staticmethod(lambda device=None: (9, 0))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    max_memory_allocated = memory_reserved = memory_allocated = staticmethod(lambda device=None: 0)
    mem_get_info = staticmethod(lambda device=None: (2**36, 2**37))
    synchronize = staticmethod(lambda device=None: GPU.wait("synchronize"))
    current_stream = set_stream = staticmethod(lambda stream=None: None)
    graph_pool_handle = staticmethod(lambda: (0, 1))
    get_rng_state = staticmethod(lambda device=None: GPU.default.get_state())
    set_rng_state = staticmethod(lambda state, device=None: GPU.default.set_state(state))

    @staticmethod
    def manual_seed(seed):
        GPU.default.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_device_properties(device):
        place = GPU.indexed(device) if not isinstance(device, int) else torch.device(NAME, device)
        return types.SimpleNamespace(name="Pretended", major=9, minor=0, total_memory=2**37, uuid=f"GPU-{place.index}")

    @staticmethod
    def set_device(device):
        GPU.current = GPU.indexed(device).index


class Renamed(importlib.machinery.SourceFileLoader):
    """Reads a file of `dfcompress/machine/` with the device's name in place of CUDA's."""

    def get_data(self, path):
        content = super().get_data(path)
        for cuda in (b"torch.cuda", b'"cuda', b"cuda:"):
            content = content.replace(cuda, cuda.replace(b"cuda", NAME.encode()))
        return content

    def path_stats(self, path):
        raise OSError  # So that no cached bytecode is taken, or left.

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if not name.startswith("dfcompress.machine."):
            return None
        file = importlib.machinery.PathFinder.find_spec(name, path).origin
        return importlib.util.spec_from_file_location(name, file, loader=cls(name, file))


def lowered(function):
    """An operation that runs in the type of `torch.autocast`, as it does on a GPU."""

    def fit(leaf):
        floats = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float32, torch.bfloat16)
        return leaf.to(torch.get_autocast_dtype(NAME)) if floats else leaf

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return function(*tree_map(fit, args), **tree_map(fit, kwargs))

    return run


def install(count):
    """Give this process so many devices."""
    global GPU
    GPU = Devices(count)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Cuda())
    install.others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    install.others.fallback(torch.library.fallthrough_kernel)
    install.lowered = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for function in LOWERED:
        install.lowered.impl(function, lowered(getattr(aten, function)))
    torch.Generator = Generator
    torch.compile = lambda function, **options: function
    torch.__future__.set_swap_module_params_on_conversion(True)  # So that `Module.to` keeps the class of a tensor.
    torch._C._set_only_lift_cpu_tensors(True)  # So that `torch.tensor(..., device=)` begins on the CPU.
    torch.autograd.set_multithreading_enabled(False)  # The mode above is one thread's.
    sys.meta_path.insert(0, Renamed)


def count_waits_of(owner, name, *, count=True):
    """Count the waits inside a method, or do not count them there."""
    honest = getattr(owner, name)

    def counted(*args, **kwargs):
        before, GPU.stepping = GPU.stepping, count
        try:
            return honest(*args, **kwargs)
        finally:
            GPU.stepping = before

    setattr(owner, name, counted)


def main():
    install(int(sys.argv[1]))
    from dfcompress import cli
    from dfcompress.synthesis.live import LiveSource
    from dfcompress.synthesis.synthesizer import Synthesizer
    from dfcompress.training.steps import Steps
    from dfcompress.verbs import bench_step

    bench_step.CEILING_SIDE = 64  # A CPU computes it.
    count_waits_of(Synthesizer, "step")
    count_waits_of(Steps, "take")
    count_waits_of(LiveSource, "_make_round", count=False)  # A batch begins with tensors of the CPU; its steps count.
    for command in json.load(sys.stdin):
        GPU.start_counting()
        with contextlib.redirect_stdout(sys.stderr), GPU:
            code = cli.run(command)
        json.dump({"code": code, **GPU.counts()}, sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if code:
            break


if __name__ == "__main__":
    main()
