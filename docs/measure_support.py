"""docs/support.md: which networks go through inspect → invert → quantize → pack → load → ONNX → onnxruntime.

    python docs/measure_support.py --write                         # what is not measured yet, then the page
    python docs/measure_support.py --only torchvision:resnet18     # one row, printed
    python docs/measure_support.py --list                          # the networks in this order

Every classifier of torchvision with BatchNorm, and of every family of timm (a module of it) the smallest network with
BatchNorm, with random weights and the BatchNorm statistics that smooth random images give. Each is a process of its own
with one thread, a limit of memory and one of processor time; rows are appended to docs/support/rows.jsonl, and none is
made twice. Images are made by two steps and nothing is fine-tuned: what is measured is whether the path works, not how
well.
torchvision's come first, smallest first, so that an interrupted run has the most rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measuring import Rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import first_line
from dfcompress.evaluation.onnx_check import EXACT, Session
from dfcompress.models.classifier import Classifier
from dfcompress.quantization.onnx import write_onnx

PAGE = Path(__file__).parent / "support.md"
BITS, PRUNED = ("8w8a", "4w4a"), "half pruned"
# The first size that a network takes: above the 64 pixels up to which presets are those of CIFAR, and a sixth of the
# work of 224; timm's and torchvision's own where a network is fixed to it.
SIDE = 96
OWN_SIDES = {"inception_v3": 299}
IMAGES, STEPS = 8, 2
SECONDS, GIGABYTES = 3600, 8
# Of the logits' deviation over classes, in the median: a grid's step that rounds the other way; and the most that noise
# may excuse, where unrelated answers differ by 0.95.
CLOSE, MOST = 0.05, 0.4
# White is 1: a 400th of a grey level everywhere, and at one pixel value in 10,000 a whole grey level, which an input of
# 8 bits does not round away.
NOISE, SPECKS, GREY_LEVEL, DRAWS = 1e-5, 1e-4, 1 / 255, 4
LARGEST = 250_000_000  # Parameters: 1 GB in fp32, of which the path holds up to four.
PACKAGES = ("dfcompress", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime")


def torchvision_names() -> list[str]:
    """torchvision's classifiers with BatchNorm, but its quantized twins."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{name}" for name in names if _batchnorms(_on_meta(f"torchvision:{name}"))]


def timm_names() -> list[str]:
    """Of each module of timm the network with BatchNorm that has the fewest parameters."""
    import timm

    found = []
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            network = _on_meta(f"timm:{name}")
            if network is not None and _batchnorms(network):
                sizes[f"timm:{name}"] = _parameters(network)
        if sizes:
            found.append(min(sizes, key=lambda name: sizes[name]))
    return found


def networks(rows: Rows) -> list[str]:
    """torchvision's and timm's, each smallest first; found once, because it takes minutes."""
    rows.make(
        lambda: {"names": [*_smallest_first(torchvision_names()), *_smallest_first(timm_names())]}, networks="all"
    )
    names: list[str] = rows.of(networks="all")[0]["names"]
    return names


def _smallest_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: _parameters(_on_meta(name)))


def make(name: str) -> nn.Module:
    """A network with random weights."""
    library, _, model = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of initialisation that takes long, and of names that timm has renamed.
        if library == "timm":
            import timm

            return timm.create_model(model)
        import torchvision

        options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(model, weights=None, **options)


def _on_meta(name: str) -> nn.Module | None:
    """A network without memory; torchvision's RegNets compute their widths with tensors, and get some."""
    try:
        with torch.device("meta"):
            return make(name)
    except Exception:  # Whatever a network's own code raises where tensors have no values.
        return make(name) if name.startswith("torchvision:") else None


def _batchnorms(network: nn.Module | None) -> list[nn.Module]:
    return [] if network is None else [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _parameters(network: nn.Module | None) -> int:
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def remember(network: nn.Module, side: int) -> None:
    """Let BatchNorms take the statistics of 32 smooth random images, everything else as in evaluation."""
    network.eval()
    for norm in _batchnorms(network):
        norm.train()
        norm.momentum = None  # The mean over all batches.
        norm.reset_running_stats()
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        coarse = torch.randn(8, 3, 8, 8, generator=random)
        network(F.interpolate(coarse, (side, side), mode="bicubic"))
    network.eval()


def row(name: str) -> dict[str, Any]:
    """How far a network comes: the size, whether its file is recognised without a name, and for each of the bits
    `works` or why not, with the seconds of processor time of all.
    """
    started, found = time.process_time(), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _walk(name, Path(folder), found)
        except Exception as error:  # A row says what failed, whatever it is.
            stage = found.get("stage", "")
            why = getattr(error, "problem", None) or f"{type(error).__name__}: {first_line(error)}"
            found |= {bits: f"{stage}: {why}" for bits in BITS if bits not in found}
    found.pop("stage", None)
    return {**found, "seconds": round(time.process_time() - started, 1)}


def _walk(name: str, folder: Path, found: dict[str, Any]) -> None:
    import dfcompress
    from dfcompress import Compute, Synthesis
    from dfcompress.models.fake_quantizers import is_quantized
    from dfcompress.synthesis.recipe import settings_of

    found["stage"] = "make"
    network = make(name)
    found |= {"parameters": _parameters(network), "batchnorms": len(_batchnorms(network))}
    if found["parameters"] > LARGEST:
        raise ValueError(f"not tried, {found['parameters'] / 1e6:.0f} million parameters")
    found["side"] = _smallest(name, network)
    torch.save(network.state_dict(), folder / "net.pth")
    del network  # Of the memory that is counted the user's process would have nothing for it.
    size = (3, found["side"], found["side"])

    found["stage"] = "inspect"
    try:
        teacher = dfcompress.load(folder / "net.pth", input_size=size)
        found["recognised"] = teacher.card.architecture
    except dfcompress.BadInput:
        found["recognised"] = ""
        teacher = dfcompress.load(folder / "net.pth", arch=name, input_size=size)
    unable = {able.verb: able.why for able in dfcompress.inspect(teacher).can if not able.possible}
    if unable.keys() & {"invert", "quantize"}:
        raise ValueError(next(iter(unable.values())))

    found["stage"] = "invert"
    # No step at a fraction of the size, which some networks cannot take.
    settings = {setting: 0 for setting in settings_of("deepinversion") if setting.endswith("_steps")}
    compute = Compute(device="cpu", precision="fp32", compile="off")
    images = folder / "images"
    synthesis = Synthesis(
        recipe="deepinversion",
        images=IMAGES,
        settings={**settings, "steps": STEPS, "warmup": 0, "batch_size": IMAGES},
    )
    dfcompress.invert(teacher, output=images, synthesis=synthesis, compute=compute)

    for bits in BITS:
        found["stage"], packed = "quantize", folder / bits
        dfcompress.quantize(
            teacher,
            bits=bits,
            data=images,
            output=packed,
            finetune="none",
            calibration={"steps": 1},
            compute=compute,
        )
        found["stage"] = "load"
        loaded = dfcompress.load(packed, arch=None if found["recognised"] else name)
        if not is_quantized(loaded.network):
            raise ValueError("what is loaded is not quantized")
        found["stage"] = "export"
        found[bits] = answers(loaded, SyntheticSet(images), folder / f"{bits}.onnx")


@torch.no_grad()
def answers(packed: Classifier, images: SyntheticSet, file: Path) -> str:
    """Whether onnxruntime answers as the packed model does, or by how much it does not.

    Random weights leave ties between classes: where answers differ, the logits decide. In a deep random network a sum
    that onnxruntime adds up in another order rounds to the next value of a grid here and there, and layer by layer more
    values differ: noise that nobody sees changes the logits by up to a third of their deviation. So onnxruntime may
    differ by as much as the packed model from itself under such noise.
    """
    ((shown, _),) = images.batches(IMAGES)
    write_onnx(packed, file)
    given = Session(file, EXACT)(shown)
    logits = packed(shown)
    own = max(
        (packed(shown + _unseen_noise(shown.shape, seed)) - logits).abs().median().item() for seed in range(DRAWS)
    )
    deviation = logits.std(1).mean().item()
    difference = (given - logits).abs().median().item() / deviation
    equal = int((given.argmax(1) == logits.argmax(1)).sum())
    if equal == IMAGES or difference < max(CLOSE, min(own / deviation, MOST)):
        return "works"
    return f"onnxruntime: {equal} of {IMAGES} answers equal, logits differ by {difference:.2g} of their deviation"


def _unseen_noise(shape: torch.Size, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(shape, generator=random)
    return noise + GREY_LEVEL * (torch.rand(shape, generator=random) < SPECKS)


def _smallest(name: str, network: nn.Module) -> int:
    """The first of the sizes to try that the network takes; its BatchNorms then have statistics."""
    own = getattr(network, "pretrained_cfg", {}).get("input_size", (3, OWN_SIDES.get(name.partition(":")[2], 224)))[1]
    for side in (SIDE, own):
        try:
            remember(network, side)
        except Exception:  # Whatever a network's own code raises of a size.
            if side == own:
                raise
        else:
            return side
    raise AssertionError


def alone(name: str) -> dict[str, Any]:
    """The row of a network, made by a process of its own."""
    line = [sys.executable, __file__, "--row", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))

    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False, env=environment, preexec_fn=limited)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    too_long = f"takes more than {SECONDS} s of processor time"
    why = too_long if done.returncode == -signal.SIGXCPU else f"the process ended with {done.returncode}"
    return {**dict.fromkeys(BITS, why), "seconds": SECONDS if why is too_long else 0}


HEAD = f"""# Which networks work

Random weights, with the BatchNorm statistics of smooth random images, go through inspect, invert (two steps), quantize
(calibration only), the packed file, loading it, ONNX and onnxruntime.
*works* means that all of it ran, and that onnxruntime answers all {IMAGES} images as the packed model does (or, where
random weights leave ties, with logits that differ by less than {CLOSE:.0%} of their deviation in the median, or by less
than those of the packed model itself when noise of a 400th of a grey level is added to the images, and to one pixel
value in 10,000 a whole grey level, in the largest of {DRAWS} draws, but never by more than {MOST:g}; rows of before
2026-11-28 had the first noise alone, which excuses less).
It says nothing of accuracy.
*half pruned*, by docs/measure_prune_support.py, says whether half of the multiply-accumulates can go (by magnitude,
without repair), whether the file loads, and whether onnxruntime answers as the pruned network does.
*recognised* says that the file of weights alone was enough; for the others `--arch` names the network.
*seconds* are those of processor time.

Measured on {{today}} by `python docs/measure_support.py --write` on a CPU, one thread; Python {{python}}, {{versions}}.
"""


def page(names: list[str], rows: Rows, today: str) -> str:
    """The page: a table for each library, and what was measured with what."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    parts = [HEAD.format(today=today, python=platform.python_version(), versions=versions)]
    for library in ("torchvision", "timm"):
        listed = [name for name in names if name.startswith(library)]
        made = {name: rows.of(network=name)[0] for name in listed if rows.of(network=name)}
        working = sum(all(each.get(bits) == "works" for bits in BITS) for each in made.values())
        pruned = [each[PRUNED] for name in listed for each in rows.of(pruned=name)]
        parts += [
            f"## {library}",
            "",
            f"{len(made)} of {len(listed)} networks are measured, and {working} of these work; "
            f"{len(pruned)} were pruned by half, and {pruned.count('works')} of these work.",
            "",
            f"| network | million parameters | pixels | recognised | {' | '.join([*BITS, PRUNED])} | seconds |",
            "|---" * (6 + len(BITS)) + "|",
            *[
                _line(name, made.get(name), rows.of(pruned=name))
                for name in sorted(listed)
                if name in made or rows.of(pruned=name)
            ],
            "",
        ]
    return "\n".join(parts)


def _line(name: str, made: dict[str, Any] | None, pruned: list[dict[str, Any]]) -> str:
    known, made = {**(pruned[0] if pruned else {}), **(made or {})}, made or {}
    million = f"{known['parameters'] / 1e6:.1f}" if "parameters" in known else ""
    recognised = {None: "", "": "no"}.get(made.get("recognised"), "yes")
    works = [*(made.get(bits, "") for bits in BITS), known.get(PRUNED, "")]
    seconds = round(made["seconds"]) if made else ""
    cells = [f"`{name.partition(':')[2]}`", million, known.get("side", ""), recognised, *works, seconds]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=PAGE.parent / "support", help="Folder of rows.jsonl.")
    parser.add_argument("--only", nargs="*", help="These networks, for instance timm:resnet18.")
    parser.add_argument("--again", action="store_true", help="Measure what did not work once more.")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", action="store_true", help="Write docs/support.md after every row.")
    parser.add_argument("--row", help="For the processes that this one starts.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.row:
        sys.stdout.write(json.dumps(row(given.row)) + "\n")
        return
    rows = Rows(given.rows)
    names = given.only or networks(rows)
    if given.list:
        sys.stdout.write("\n".join(names) + "\n")
        return
    if given.again:
        forget(rows, lambda made: any(made.get(bits) != "works" for bits in BITS))
    for name in names:
        rows.make(lambda name=name: alone(name), network=name)
        sys.stderr.write(f"{rows.of(network=name)[0]}\n")
        if given.write:
            write(rows)


def write(rows: Rows) -> None:
    """Write the page anew."""
    PAGE.write_text(page(networks(rows), rows, date.today().isoformat()))


def forget(rows: Rows, wrong: Callable[[dict[str, Any]], bool]) -> None:
    """Take out the rows of networks that are `wrong`."""
    rows.made = [made for made in rows.made if "network" not in made or not wrong(made)]
    rows.log.write_text("".join(json.dumps(made) + "\n" for made in rows.made))


if __name__ == "__main__":
    main()
