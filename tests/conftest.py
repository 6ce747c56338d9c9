"""Fixtures over real released files; tests that need them skip, saying so, where they are absent."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from pair import Pair

from dfcompress.distributed import World
from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.run import write_atomically

# Small tensors on two threads wait for each other: with the second core busy, the suite takes several times as long.
os.environ["OMP_NUM_THREADS"] = "1"  # Of the processes that tests start; `one_thread_a_test` is for this one.
SHARED_DATA = Path(os.environ.get("DFCOMPRESS_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread_a_test() -> Iterator[None]:
    """Whatever number of threads a test computed with, the next begins with one."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def shared_file(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here: set DFCOMPRESS_TEST_DATA to the folder that holds the released checkpoints")
    return path


@pytest.fixture(scope="session")
def resnet20_file() -> Path:
    """The released CIFAR-10 ResNet-20 (776 of 846)."""
    return shared_file("checkpoints/resnet20-12fca82f.th")


@pytest.fixture(scope="session")
def resnet44_file() -> Path:
    """The released CIFAR-10 ResNet-44 (793 of 846)."""
    return shared_file("checkpoints/resnet44-014dd654.th")


@pytest.fixture(scope="session")
def cifar10_test_file() -> Path:
    """846 images of the CIFAR-10 test set."""
    return shared_file("cifar10-test-846.npz")


@pytest.fixture(scope="session")
def cifar10_train_file() -> Path:
    """1,000 CIFAR-10 training images, 100 a class."""
    return shared_file("cifar10-train-1000.npz")


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four IDX files of MNIST, unpacked."""
    folder = tmp_path_factory.mktemp("mnist")
    for packed in shared_file("mnist").glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


@pytest.fixture
def grey_images() -> tuple[np.ndarray, np.ndarray]:
    """20 grey images of 8x8, two a class, in order of the classes."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    return images, np.repeat(np.arange(10, dtype=np.uint8), 2)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes of one job, for all tests that need such."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


class Killed(BaseException):
    """Ends work as a kill would: nothing of ours catches it."""


@pytest.fixture
def killed_at_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], AbstractContextManager[None]]:
    """A function of a file's pattern and of a number: inside its context the work saves its state after every step, and
    ends when it is about to write such a state once more than so often.
    """

    @contextmanager
    def killed_at_save(pattern: str, saves: int) -> Iterator[None]:
        written: list[Path] = []

        def write(path: Path) -> AbstractContextManager[Path]:
            if fnmatch(path.name, pattern):
                if len(written) == saves:
                    raise Killed
                written.append(path)
            return write_atomically(path)

        with monkeypatch.context() as patched:
            patched.setattr("dfcompress.run.SAVE_EVERY_SECONDS", 0.0)
            patched.setattr("dfcompress.run.write_atomically", write)
            try:
                yield
            except Killed:
                return
        pytest.fail(f"The work ended by itself after {len(written)} saves of {pattern}.")

    return killed_at_save


@pytest.fixture(params=["forward", "backward"])
def broken_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine that seems able to compile, and whose compiler fails at every graph, or at backward graphs alone."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph, inputs):
        raise RuntimeError("no compiler here")

    def broken(graph, inputs, **options):
        forward = fail if request.param == "forward" else lambda graph, inputs: make_boxed_func(graph.forward)
        return aot_autograd(fw_compiler=forward, bw_compiler=fail)(graph, inputs)

    monkeypatch.setattr("dfcompress.machine.compiling.missing_to_compile", lambda device: None)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()


@pytest.fixture
def precisions() -> Callable[[torch.nn.Module], list[str]]:
    """A function of a module that gives a list: of each pass from now on, how precise products of fp32 are in it."""

    def precisions(module: torch.nn.Module) -> list[str]:
        passes: list[str] = []
        module.register_forward_pre_hook(lambda *_: passes.append(torch.backends.cuda.matmul.fp32_precision))
        return passes

    return precisions


IMAGES = 300
# Mean and std.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def untrained(architecture, size, seed=0):
    torch.manual_seed(seed)
    card = ModelCard(architecture, 10, (1, size, size), MNIST_MEAN, MNIST_STD)
    return Classifier(find(architecture).make(10, 1), card).frozen()


@pytest.fixture(scope="session")
def lenet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lenet")
    save(untrained("lenet5", 32), folder)
    return folder


@pytest.fixture
def lenet(lenet_folder):
    """LeNet-5 without BatchNorm, from a file."""
    return load(lenet_folder)


@pytest.fixture
def hinton():
    """The MLP with dropout, 784-1200-1200-10."""
    return untrained("hinton_mlp", 28)


def seen_classifier(name: str = "lenet5_bn", input_size: tuple[int, int, int] = (1, 32, 32)) -> Classifier:
    """A network with random weights whose BatchNorms have seen something."""
    channels = input_size[0]
    torch.manual_seed(0)
    network = find(name).make(10, channels)
    with torch.no_grad():
        network.train()(torch.rand(8, *input_size))
    card = ModelCard(name, 10, input_size, (0.5,) * channels, (0.25,) * channels, tuple("abcdefghij"))
    return Classifier(network, card).eval()


@pytest.fixture
def lenet_file(tmp_path) -> Path:
    torch.save(seen_classifier().network.state_dict(), tmp_path / "lenet.pt")
    return tmp_path / "lenet.pt"


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    """300 smooth random images, 30 a class."""
    random = np.random.default_rng(0)
    noise = torch.from_numpy(random.random((IMAGES, 1, 8, 8), dtype=np.float32))
    images = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")
    path = tmp_path_factory.mktemp("images") / "train.npz"
    np.savez(path, images=(images * 255).byte().numpy(), labels=np.arange(IMAGES) % 10)
    return path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose PATH is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes this process see so many GPUs, as the given one of several."""

    def see(count: int, rank: int = 0, processes: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr("dfcompress.machine.device.world", lambda: World(rank, processes, rank, processes))

    return see
