"""Summaries that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfcompress import console

if TYPE_CHECKING:
    from dfcompress.evaluation.evaluate import Evaluation
    from dfcompress.evaluation.result import Compressed
    from dfcompress.synthesis.invert import SynthesisPlan


def plan(planned: SynthesisPlan | None, *, as_json: bool, training: dict[str, Any] | None = None) -> None:
    """What a dry run found: nothing was touched. Without `planned` the images are there already."""
    if as_json:
        console.result_json({"synthesis": planned.to_json() if planned else None, "training": training})
        return
    if planned:
        _synthesis(planned)
    if training:
        console.result("training: " + " ".join(f"{name}={value}" for name, value in training.items()))


def _synthesis(planned: SynthesisPlan) -> None:
    settings = " ".join(f"{name}={value}" for name, value in planned.recipe.settings.items())
    how = planned.execution
    console.result(f"recipe {planned.recipe.name}, preset {planned.recipe.preset}: {settings}")
    console.result(f"{planned.images} images in {planned.batches} batches of {planned.steps} steps")
    compiled = "compiled" if how.compile else "eager"
    console.result(f"on {how.device} in {how.precision}, {compiled}, {how.threads} threads")
    console.result(f"about {planned.seconds:.0f} s of synthesis and {planned.memory_bytes / 2**30:.1f} GiB of memory")


def evaluation(measured: Evaluation) -> None:
    """Counts and shares of every checkpoint."""
    rows = [
        [
            row["checkpoint"],
            f"{row['correct']}/{row['total']}",
            f"{row['top1']:.2%}",
            "" if row["top5"] is None else f"{row['top5']:.2%}",
            f"{row['agreement']:.2%}",
        ]
        for row in measured.results
    ]
    console.table(["checkpoint", "correct", "top-1", "top-5", "agrees with first"], rows)


def compressed(result: Compressed, *, as_json: bool) -> None:
    """Where the result is, its size, its seconds, and its accuracy if it was asked for."""
    if as_json:
        console.result_json(result.to_json())
        return
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in result.seconds.items())
    console.result(f"{result.checkpoint}: {result.bytes:,} bytes, {result.bytes_ratio:.3f} of the given model in fp32")
    console.result(f"agrees with the teacher on {result.agreement:.1%} of the synthetic images; {seconds}")
    if result.evaluation:
        evaluation(result.evaluation)
