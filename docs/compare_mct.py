"""Sony's model-compression-toolkit (MCT) beside dfcompress: the same checkpoint, as many images, interleaved.

    python -m venv mct && mct/bin/pip install "model-compression-toolkit==2.6.*" dfcompress
    mct/bin/python docs/compare_mct.py resnet20-12fca82f.th cifar10-test-846.npz OUTPUT
    mct/bin/python docs/compare_mct.py lite0.pth IMAGENET OUTPUT --arch timm:tf_efficientnet_lite0 --match-by-order \\
        --mean 0.498,0.498,0.498 --std 0.502,0.502,0.502 --images 128 --skip 100

Every round makes IMAGES images by either side with a seed of its own, one after the other, each in a process of its own
with one thread, and then quantizes with them; OUTPUT/rows.jsonl has a row for each, and none is made twice.

- Seconds of synthesis are those of the whole call: MCT's `pytorch_data_generation_experimental`, our `invert` with the
  recipe that `quantize` takes by itself. Imports and reading the checkpoint are left out on both sides.
- MCT's settings are its defaults (500 iterations of RAdam, batches of 32), but that images are clipped to what the
  checkpoint's own mean and deviation make of [0, 1], and that the border it crops from is in proportion to 32 of 224
  pixels. timm's BatchNorms with an activation are given to it as torch's BatchNorm and the activation, and convolutions
  that pad by their input's size, which it cannot trace, as constant padding and torch's convolution.
- Bits: 8w8a, and 4w8a with 8 bits for the first and the last layer. MCT rounds by its post-training quantization (PTQ)
  and learns rounding by GPTQ with its defaults; ours is calibrated, and fine-tuned with our defaults. The grids differ:
  MCT's (of its IMX500 target) are on what layers give, with scales that are powers of two; ours are those that
  `quantize` has by itself at these bits.
- Top-1 is counted by one function on the images of DATA but the first SKIP, which choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import Rows
from torch import Tensor, nn

import dfcompress
from dfcompress import Classifier, Compute, Synthesis
from dfcompress.data.real import open_images
from dfcompress.models.plain_layers import after_normalising
from dfcompress.models.static_padding import fix_padding
from dfcompress.quantization.bits import layers_of
from dfcompress.verbs._quantize_defaults import usual_images

SIDES = ("ours", "mct")
BORDER = 32 / 224


def main() -> None:
    """Run the rounds and print the table, or do one side's part."""
    given = _options().parse_args()
    torch.set_num_threads(1)
    if given.side:
        sys.stdout.write(json.dumps(PARTS[given.side](given)) + "\n")
        return
    rows = Rows(given.output)
    for round_number in range(given.rounds):
        for side in SIDES:
            rows.make(lambda side=side, number=round_number: alone(side, number), side=side, round=round_number)
            sys.stderr.write(f"{rows.of(side=side, round=round_number)[0]}\n")
    sys.stdout.write(table(rows) + "\n")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch")
    parser.add_argument("--match-by-order", action="store_true")
    for name in ("--mean", "--std"):
        parser.add_argument(name, type=lambda text: tuple(map(float, text.split(","))))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="Leave out so many images of DATA.")
    parser.add_argument("--batch-size", type=int, help="Of our images; by default the recipe's.")
    parser.add_argument("--steps", type=int, help="Of our synthesis; by default the recipe's.")
    parser.add_argument("--mct-iterations", type=int, default=500)
    parser.add_argument("--train-steps", type=int, help="Of our fine-tuning; by default that of `quantize`.")
    parser.add_argument("--epochs", type=int, default=50, help="Of GPTQ; 0 leaves it and our fine-tuning out.")
    parser.add_argument("--side", choices=SIDES, help="For the processes that this one starts.")
    parser.add_argument("--round", type=int, default=0)
    return parser


def alone(side: str, round_number: int) -> dict[str, Any]:
    """One side of one round, in a process of its own with one thread."""
    line = [sys.executable, *sys.argv, "--side", side, "--round", str(round_number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _teacher(given: argparse.Namespace) -> Classifier:
    options = {"arch": given.arch, "match_by_order": given.match_by_order, "mean": given.mean, "std": given.std}
    return dfcompress.load(given.checkpoint, **options)


@torch.no_grad()
def correct(network: nn.Module, teacher: Classifier, given: argparse.Namespace) -> int:
    """How many images a network of normalised ones classifies right."""
    images, labels = zip(*open_images(given.data, teacher.card).batches(32), strict=True)
    shown, wanted = torch.cat(images)[given.skip :], torch.cat(labels)[given.skip :]
    found = [network(teacher.normalise(some)).argmax(1) for some in shown.split(32)]
    return int((torch.cat(found) == wanted).sum())


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Our row: seconds, and how many are right."""
    teacher, folder = _teacher(given), given.output / f"ours-{given.round}"
    synthesis, _ = usual_images("default", teacher, Synthesis(images=given.images), None, trains=False)
    wanted = {"steps": given.steps, "batch_size": given.batch_size}
    settings = {name: value for name, value in wanted.items() if value}
    synthesis = Synthesis(recipe=synthesis.recipe, preset=synthesis.preset, images=given.images, settings=settings)
    compute = Compute(seed=given.round)
    started = time.perf_counter()
    made = dfcompress.invert(teacher, output=folder / "images", synthesis=synthesis, compute=compute, overwrite=True)
    row: dict[str, Any] = {
        "synthesis": time.perf_counter() - started,
        "float": correct(teacher.network, teacher, given),
    }
    row["images"] = {"teacher_top1": made.teacher_top1, "bn_divergence": made.bn_divergence}
    plans = [("8w8a", "none"), ("4w8a", "none"), *([("4w8a", "blocks+lsq")] if given.epochs else [])]
    for bits, finetune in plans:
        started = time.perf_counter()
        packed = dfcompress.quantize(
            teacher,
            bits=bits,
            finetune=finetune,
            data=folder / "images",
            output=folder / f"{bits}-{finetune}",
            training={"steps": given.train_steps} if given.train_steps and finetune != "none" else None,
            compute=compute,
            overwrite=True,
        )
        seconds = time.perf_counter() - started
        student = dfcompress.load(packed.checkpoint, arch=given.arch)
        name = f"{bits} {'calibrated' if finetune == 'none' else 'fine-tuned'}"
        row[name] = {"correct": correct(student.network, teacher, given), "seconds": seconds}
    return row


def mct(given: argparse.Namespace) -> dict[str, Any]:
    """MCT's row: seconds, and how many are right."""
    import model_compression_toolkit as toolkit

    teacher = _teacher(given)
    with_plain_padding(teacher)
    network = with_plain_batchnorms(teacher.network).eval()
    torch.manual_seed(given.round)
    side = teacher.card.input_size[1]
    _clip_to(teacher)
    settings = toolkit.data_generation.get_pytorch_data_generation_config(
        n_iter=given.mct_iterations, extra_pixels=round(BORDER * side)
    )
    started = time.perf_counter()
    batches = toolkit.data_generation.pytorch_data_generation_experimental(
        model=network, n_images=given.images, output_image_size=side, data_generation_config=settings
    )
    seconds = time.perf_counter() - started
    images = torch.cat([batch.detach().cpu() for batch in batches])
    row: dict[str, Any] = {"synthesis": seconds, "float": correct(network, teacher, given), "made": len(images)}

    def representative() -> Iterator[list[Tensor]]:
        for batch in images.split(32):
            yield [batch]

    for bits in (8, 4):
        core = toolkit.core.CoreConfig(bit_width_config=_widths(teacher, bits))
        started = time.perf_counter()
        quantized, _ = toolkit.ptq.pytorch_post_training_quantization(network, representative, core_config=core)
        row[f"{bits}w8a calibrated"] = _counted(quantized, teacher, given, started)
    if given.epochs:
        started = time.perf_counter()
        learnt, _ = toolkit.gptq.pytorch_gradient_post_training_quantization(
            network,
            representative,
            core_config=toolkit.core.CoreConfig(bit_width_config=_widths(teacher, 4)),
            gptq_config=toolkit.gptq.get_pytorch_gptq_config(n_epochs=given.epochs),
        )
        row["4w8a fine-tuned"] = _counted(learnt, teacher, given, started)
    return row


PARTS = {"ours": ours, "mct": mct}


def _counted(network: nn.Module, teacher: Classifier, given: argparse.Namespace, started: float) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    return {"correct": correct(network.cpu().eval(), teacher, given), "seconds": seconds}


def _clip_to(teacher: Classifier) -> None:
    """Let MCT clip images to the range that the checkpoint's own normalisation gives."""
    from model_compression_toolkit.data_generation.common import image_pipeline
    from model_compression_toolkit.data_generation.common.enums import ImageNormalizationType

    card = teacher.card
    known = [[255 * value for value in card.mean], [255 * value for value in card.std]]
    image_pipeline.image_normalization_dict[ImageNormalizationType.TORCHVISION] = known


def _widths(teacher: Classifier, bits: int) -> Any:
    """MCT's bit widths: so many for weights, 8 for the first and the last layer."""
    import model_compression_toolkit as toolkit
    from model_compression_toolkit.core.common.matchers.node_matcher import BaseNodeMatcher

    class Between(BaseNodeMatcher):
        """The nodes of these layers; MCT calls one `layer1_0_conv1`, or `layer1_0_conv1_bn` with a BatchNorm in it."""

        def __init__(self, layers: list[str]) -> None:
            self.layers = [layer.replace(".", "_") for layer in layers]

        def apply(self, input_object: Any) -> bool:
            """Whether a node is one of them."""
            name = input_object.name
            layer = any(name == each or name.startswith(f"{each}_") for each in self.layers)
            return layer and issubclass(input_object.type, nn.Conv2d | nn.Linear)

    widths = toolkit.core.BitWidthConfig()
    if bits != 8:
        widths.set_manual_weights_bit_width(Between(layers_of(teacher).quantizable[1:-1]), bits, "weight")
    return widths


def with_plain_padding(teacher: Classifier) -> None:
    """Give the network, in place, constant zero padding where convolutions compute theirs from the input's size."""
    for name in fix_padding(teacher):
        layer = teacher.network.get_submodule(name)
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        plain.load_state_dict(layer.state_dict())
        padding = nn.ZeroPad2d(layer._reversed_padding_repeated_twice)
        teacher.network.set_submodule(name, nn.Sequential(padding, plain).eval())


def with_plain_batchnorms(network: nn.Module) -> nn.Module:
    """The network with every BatchNorm that has an activation behind it as two modules."""
    for name, norm in [*network.named_modules()]:
        after = after_normalising(norm)
        if after is None or not [*norm.children()]:
            continue
        plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, affine=norm.affine)
        plain.load_state_dict(norm.state_dict(), strict=False)
        network.set_submodule(name, nn.Sequential(plain, after).eval())
    return network


def table(rows: Rows) -> str:
    """Markdown: every round of both sides."""
    columns = ("8w8a calibrated", "4w8a calibrated", "4w8a fine-tuned")
    lines = [f"| side | round | synthesis | float | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    for made in rows.made:
        cells = [made["side"], str(made["round"]), f"{made['synthesis']:.0f} s", str(made["float"])]
        cells += [
            f"{made[name]['correct']} in {made[name]['seconds']:.0f} s" if name in made else "" for name in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
