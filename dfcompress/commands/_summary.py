"""Summaries that several commands print."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from dfcompress import console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfcompress.evaluation.onnx_check import Exported
    from dfcompress.verbs._finish import Compressed
    from dfcompress.verbs._plan import Plan, SynthesisEstimate
    from dfcompress.verbs.evaluate import Evaluation, Forgetting

# Maximum number of numbers or names that fit into a line of 100 characters.
CLASSES_SHOWN = 20
SLOW_INT8 = (
    "8 bits on all tensors save time in networks that are large enough and have channels in multiples of 8, other "
    "grids size alone"
)
SLOW_PRUNED = "onnxruntime computes 8 or 16 channels at once, so --round-to 8 or a budget of --latency saves more time"


def plan(planned: Plan[Any], *, as_json: bool) -> None:
    """Print a plan with estimates of time and memory; nothing is written. Steps that are left out are null in JSON.

    Raises `BadInput` where the verb would raise it before its work.
    """
    planned.check_output()
    if as_json:
        synthesis = [each.to_json() for each in planned.estimates()]
        values = {"synthesis": synthesis, **planned.settings_json(), "predicted_seconds": planned.predicted()}
        console.result_json(values)
        return
    estimates, predicted = planned.estimates(), planned.predicted()
    for each in estimates:
        _synthesis(each)
    if bits := planned.options.get("bits"):
        _bits(bits, planned.options)
    for part, settings in planned.settings_json().items():
        if settings:
            console.result(f"{part}: " + " ".join(f"{name}={value}" for name, value in settings.items()))
    known = {part: seconds for part, seconds in predicted.items() if seconds is not None}
    for part, seconds in known.items():
        console.result(f"about {seconds:.0f} s of {part}")
    whole = sum(each.seconds for each in estimates) + sum(known.values())
    about, without = "about", ""
    if unknown := [part for part in predicted if part not in known]:
        about, without = "at least", f" ({' and '.join(unknown)} not estimated)"
    console.result(
        f"{about} {whole:.0f} s in all{without}, on a machine that does nothing else; the result goes to "
        f"{planned.folder}"
    )


def _bits(bits: Mapping[str, Mapping[str, int | None]], options: Mapping[str, Any]) -> None:
    """Print the number of layers with each bit width, the placement of grids, and the runtime of an ONNX file."""
    of_layers = Counter(f"{each['weights'] or 'auto'}w{each['activations']}a" for each in bits.values())
    told = ", ".join(f"{console.amount(count, 'layer')} {name}" for name, count in of_layers.items())
    runtime = f", exported for {options['export']}" if options["export"] else ""
    console.result(f"bits: {told}; grids on {options['placement']}, fine-tuning {options['finetune']}{runtime}")


def _synthesis(estimate: SynthesisEstimate) -> None:
    recipe, how = estimate.recipe, estimate.execution
    settings = " ".join(f"{name}={value}" for name, value in recipe.settings.items())
    console.result(f"recipe {recipe.name}, preset {recipe.preset}: {settings}")
    chunks = f", {how.chunk} images of a batch at once" if how.chunk else ""
    batches = console.amount(estimate.batches, "batch", "batches")
    steps = console.amount(estimate.steps, "step")
    console.result(f"{console.amount(estimate.images, 'image')} in {batches} of {steps}{chunks}")
    compiled = "compiled" if how.compile else "eager"
    console.result(f"on {how.device} in {how.precision}, {compiled}, {console.amount(how.threads, 'thread')}")
    console.result(f"about {estimate.seconds:.0f} s of synthesis and {estimate.memory_bytes / 2**30:.1f} GiB of memory")


def evaluation(measured: Evaluation) -> None:
    """Print counts and shares of every checkpoint, and the kind of images where there are several kinds."""
    which = ["images"] if any(score.images for score in measured.results) else []
    rows = [
        [
            score.checkpoint,
            *([score.images or ""] if which else []),
            f"{score.correct}/{score.total}",
            f"{score.top1:.2%}",
            "" if score.top5 is None else f"{score.top5:.2%}",
            "" if score.agreement is None else f"{score.agreement:.2%}",
        ]
        for score in measured.results
    ]
    console.table(["checkpoint", *which, "correct", "top-1", "top-5", "agreement"], rows)
    if measured.forgetting:
        forgotten(measured.forgetting)


def forgotten(classes: Sequence[Forgetting]) -> None:
    """Print the accuracy on old classes before and after; with many classes, only those that lost the most."""
    worst = sorted(classes, key=lambda each: each.after - each.before)[:CLASSES_SHOWN]
    lost = sum(each.before - each.after for each in classes) / len(classes)
    console.result(f"forgotten of an old class: {100 * lost:.2f} points on average; the classes that lost the most:")
    rows = [[each.name, str(each.total), f"{each.before:.2%}", f"{each.after:.2%}"] for each in worst]
    console.table(["old class", "images", "before", "after"], rows)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def classes(counts: Sequence[int]) -> None:
    """Print the number of images of each class; for many classes, the minimum, the maximum and how many are empty."""
    if len(counts) <= CLASSES_SHOWN:
        console.result(f"images of each class: {' '.join(map(str, counts))}")
        return
    empty = list(counts).count(0)
    console.result(f"images of each class: {min(counts)} to {max(counts)}; {empty} of {len(counts)} classes have none")


def exported(result: Exported, *, fp32: float | None = None, slow: str = SLOW_INT8) -> None:
    """Print the ONNX file and its comparison with the model.

    `fp32`: bytes of the model in fp32, to which the size is compared; default: the exported checkpoint. `slow`: text
    that explains why a file may not be faster.
    """
    from dfcompress.evaluation.onnx_check import EXACT, UNSATURATED

    size = "" if result.bytes_ratio is None else f", {result.bytes_ratio:.3f} of the checkpoint"
    if fp32:
        size = f", {result.bytes / fp32:.3f} of the input in fp32"
    console.result(f"{result.path}: {result.bytes:,} bytes{size}")
    usual = f"equal answers in onnxruntime: {result.equal_rewritten} of {result.images}"
    if result.equal_rewritten is None:
        usual = "onnxruntime does not load the file with its default options"
    if result.saturates:
        usual += f", as sums saturate on this processor; with {UNSATURATED}=1: {result.equal_unsaturated}"
    console.result(
        f"{usual}; with {EXACT}=1: {result.equal} of {result.images} answers are equal, "
        f"logits differ by {result.median_difference:.1e} (median), {result.largest_difference:.1e} at most"
    )
    took = f"{result.milliseconds:.1f} ms for 64 images on one thread"
    if result.milliseconds_fp32:
        faster = result.milliseconds_fp32 / result.milliseconds
        took += f", {result.milliseconds_fp32:.1f} ms in fp32: "
        took += f"{faster:.1f} times faster" if faster > 1.1 else f"not faster here: {slow}"
    console.result(took)


def layers(report: dict[str, Any]) -> None:
    """Print a line for each quantized layer, and the layers that stay in float."""
    rows = [
        [
            row["layer"],
            f"{row['weights']:,}",
            f"{row['weight_bits']}w{row['input_bits']}a",
            "" if row["input_low"] is None else f"{row['input_low']:.3g} .. {row['input_high']:.3g}",
            f"{row['sensitivity']:.1e}",
            "" if row["signal_to_noise"] is None else f"{row['signal_to_noise']:.1f}",
        ]
        for row in report["layers"]
    ]
    console.table(["layer", "weights", "bits", "input", "sensitivity", "SNR dB"], rows)
    for name, kind in report["left_in_float"].items():
        console.result(f"{name} ({kind}) stays in float")
    for name, count in report.get("unused_bytes", {}).items():  # Missing in reports of earlier versions.
        console.result(f"{name} ({count:,} bytes) is not used by evaluation and stays in float")


def widths(report: dict[str, Any]) -> None:
    """Print the share of the budget that was kept, a line for each pruned layer, and why other layers keep theirs."""
    last = report["rounds"][-1]
    share = last["after"] / last["before"]
    by = f", channels chosen by {last['importance']}" if "importance" in last else ""  # Missing in earlier reports.
    console.result(f"{last['after']:,.0f} of {last['before']:,.0f} {last['unit']} ({share:.1%}){by}")
    rows = [
        [
            row["layer"],
            "{} > {}".format(*row["in"]),
            "{} > {}".format(*row["out"]),
            "" if row["importance"] is None else f"{row['importance']:.3g}",
        ]
        for row in report["layers"]
        if row["in"][0] != row["in"][1] or row["out"][0] != row["out"][1]
    ]
    console.table(["layer", "channels in", "channels out", "importance"], rows)
    for sentence in report["refused"].values():
        console.result(sentence)


def compressed(result: Compressed, *, as_json: bool, slow: str = SLOW_INT8) -> None:
    """Print the result's folder, size, seconds and agreement, and its accuracy if known; `slow`: as in `exported`."""
    if as_json:
        console.result_json(result.to_json())
        return
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in result.seconds.items())
    console.result(
        f"{result.checkpoint}: {result.bytes:,} bytes, {result.bytes_ratio:.3f} of the input in fp32; {seconds}"
    )
    several = len(result.teachers) > 1
    probed = any(teacher.probe is not None for teacher in result.teachers)
    columns = ["agreement with", "images trained on", "held out", *["probe images"] * probed]
    blocks = [f"classes of {number}" for number, _ in enumerate(result.teachers, 1)] if several else []
    rows = [
        [teacher.checkpoint, _share(teacher.agreement), _share(teacher.held_out), *[_share(teacher.probe)] * probed]
        + [_share(share) for share in teacher.blocks or []]
        for teacher in result.teachers
    ]
    console.table(columns + blocks, rows)
    if result.evaluation:
        evaluation(result.evaluation)
    if result.export:
        exported(result.export, fp32=result.bytes / result.bytes_ratio, slow=slow)
