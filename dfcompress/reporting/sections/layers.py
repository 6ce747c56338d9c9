"""The layers of a quantized and of a pruned model: bits, ranges and sensitivities, or the channels that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dfcompress.reporting.page import Block, Cell, Table, Text
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.parts import signed


def layers(run: ReportedRun) -> Iterator[Block]:
    """The table of the quantized layers and that of the pruned ones, where the run has them."""
    if run.layers:
        yield _quantized(run.layers["layers"])
        for name, kind in run.layers.get("left_in_float", {}).items():
            yield Text(f"{name} ({kind}) stays in float.")
    if run.widths:
        yield from _pruned(run.widths)


def _quantized(layers: Sequence[Mapping[str, Any]]) -> Table:
    most = max((each["sensitivity"] for each in layers), default=0.0)
    clearest = max((each["signal_to_noise"] or 0.0 for each in layers), default=0.0)
    rows = [
        [
            Cell(each["layer"]),
            Cell(each["type"]),
            Cell(f"{each['weights']:,}"),
            Cell(f"{each['weight_bits']}w{each['input_bits']}a"),
            Cell("" if each["input_low"] is None else signed(f"{each['input_low']:.3g} … {each['input_high']:.3g}")),
            Cell(f"{each['sensitivity']:.1e}", bar=_length(each["sensitivity"], most)),
            Cell("")
            if each["signal_to_noise"] is None
            else Cell(f"{each['signal_to_noise']:.1f}", bar=_length(each["signal_to_noise"], clearest)),
        ]
        for each in layers
    ]
    note = (
        "Sensitivity: what quantizing the layer alone changes in the answers, in nats; "
        "SNR: of the layer's output with all layers quantized, in decibels."
    )
    columns = ["layer", "type", "weights", "bits", "input range", "sensitivity", "SNR dB"]
    return Table(columns=columns, rows=rows, texts=2, note=note)


def _pruned(widths: Mapping[str, Any]) -> Iterator[Block]:
    for number, each in enumerate(widths["rounds"], 1):
        share = each["after"] / each["before"]
        named = f"Round {number}: " if len(widths["rounds"]) > 1 else ""
        yield Text(f"{named}{each['after']:,.0f} of {each['before']:,.0f} {each['unit']} are left ({share:.1%}).")
    layers = [each for each in widths["layers"] if each["in"][0] != each["in"][1] or each["out"][0] != each["out"][1]]
    if not layers:
        return
    rows = [
        [
            Cell(each["layer"]),
            Cell("{} → {}".format(*each["in"]), bar=_length(each["in"][1], each["in"][0])),
            Cell("{} → {}".format(*each["out"]), bar=_length(each["out"][1], each["out"][0])),
            Cell("" if each["importance"] is None else f"{each['importance']:.3g}"),
        ]
        for each in layers
    ]
    yield Table(
        columns=["layer", "channels in", "channels out", "importance"],
        rows=rows,
        note="Layers that lost channels; a bar is the share that stays.",
    )


def _length(value: float, most: float) -> float:
    return min(1.0, max(0.0, value / most)) if most else 0.0
