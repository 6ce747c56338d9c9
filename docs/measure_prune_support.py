"""Which networks can be pruned by half, saved, loaded and exported; a column of docs/support.md.

    python docs/measure_prune_support.py --write                           # what is not measured yet, then the page
    python docs/measure_prune_support.py --only torchvision:resnet18       # these alone

The networks are those of measure_support.py, with random weights and the BatchNorm statistics of smooth random images.
Half of the multiply-accumulates of each goes, by magnitude and without repair; *works* means that the budget was met
within a percent, that the file loads, and that onnxruntime answers as the network does. It says nothing of accuracy.
Each network is a process of its own with one thread, a limit of memory and one of time; rows are appended to the
rows.jsonl of measure_support.py, and none is made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_support import (
    CLOSE,
    GIGABYTES,
    LARGEST,
    PAGE,
    PRUNED,
    _parameters,
    _smallest,
    make,
    networks,
    write,
)
from measuring import Rows

from dfcompress.errors import first_line

SHARE, IMAGES, LEAST = 0.5, 16, 0.99
SECONDS = 900  # Of wall time.


def row(name: str) -> dict[str, Any]:
    """How far a network comes: groups and layers that keep their channels, the share that is left, and `works` or why
    not.
    """
    started, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found[PRUNED] = _walk(name, Path(folder), found)
        except Exception as error:  # A row says what failed, whatever it is.
            why = getattr(error, "problem", None) or f"{type(error).__name__}: {first_line(error)}"
            found[PRUNED] = f"{found.get('stage', '')}: {why}"
    found.pop("stage", None)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _walk(name: str, folder: Path, found: dict[str, Any]) -> str:
    import dfcompress

    found["stage"] = "make"
    network = make(name)
    found["parameters"] = _parameters(network)
    if found["parameters"] > LARGEST:
        raise ValueError(f"not tried, {found['parameters'] / 1e6:.0f} million parameters")
    found["side"] = _smallest(name, network)
    torch.save(network.state_dict(), folder / "net.pth")
    random = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, found["side"], found["side"]), dtype=np.uint8)
    np.savez(folder / "images.npz", images=random, labels=np.zeros(IMAGES, dtype=np.int64))

    found["stage"] = "load"
    arch = name if name.startswith("timm:") else name.removeprefix("torchvision:")
    teacher = dfcompress.load(folder / "net.pth", arch=arch, input_size=(3, found["side"], found["side"]))
    found["stage"] = "prune"
    compute = dfcompress.Compute(device="cpu", precision="fp32", compile="off")
    done = dfcompress.prune(
        teacher,
        flops=SHARE,
        importance="magnitude",
        round_to=1,
        repair="none",
        data=folder / "images.npz",
        probe_images=0,
        output=folder / "pruned",
        compute=compute,
        export="onnxruntime",
    )
    report = json.loads((folder / "pruned" / "prune.json").read_text())
    last = report["rounds"][-1]
    found |= {"share": round(last["after"] / last["before"], 4), "groups": len(last["groups"])}
    found["refused"] = len(report["refused"])
    if not LEAST * SHARE <= found["share"] <= SHARE:
        return f"{found['share']:.3f} is left"
    found["stage"] = "export"
    loaded, shown = done.load(), torch.from_numpy(random).float() / 255
    with torch.no_grad():
        deviation = loaded(shown).std(1).mean().item()
    if done.export.equal < done.export.images and done.export.median_difference > CLOSE * deviation:
        return f"onnxruntime: {done.export.equal} of {done.export.images} answers equal"
    return "works"


def alone(name: str) -> dict[str, Any]:
    """The row of a network, made by a process of its own."""
    started = time.perf_counter()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES * 2**30,) * 2)

    line = [sys.executable, __file__, "--row", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            line, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False, env=environment, preexec_fn=limited
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        why = f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"takes more than {SECONDS} s here"
    return {PRUNED: why, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=PAGE.parent / "support", help="Folder of rows.jsonl.")
    parser.add_argument("--only", nargs="*", help="These networks, for instance timm:resnet18.")
    parser.add_argument("--write", action="store_true", help="Write docs/support.md after every row.")
    parser.add_argument("--row", help="For the processes that this one starts.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.row:
        sys.stdout.write(json.dumps(row(given.row)) + "\n")
        return
    rows = Rows(given.rows)
    for name in given.only or networks(rows):
        rows.make(lambda name=name: alone(name), pruned=name)
        sys.stderr.write(f"{rows.of(pruned=name)[0]}\n")
        if given.write:
            write(rows)


if __name__ == "__main__":
    main()
