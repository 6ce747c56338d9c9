"""What each run did, with which settings and command line, and the warnings of its health checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dfcompress.console import amount
from dfcompress.reporting.page import Block, Details, Facts, Line, Part, Text
from dfcompress.reporting.runs import ReportedRun
from dfcompress.reporting.sections.parts import each_run


def done(run: ReportedRun) -> Iterator[Block]:
    """What the run did, its command line, and all its recorded options."""
    file = run.file
    if not file.finished:
        yield Text("This run is not finished: it was interrupted, or is still going on.", warning=True)
    seed = f", seed {file.options['seed']}" if "seed" in file.options else ""
    facts = [f"{short(run)[0].upper()}{short(run)[1:]}{seed}"]
    sets = Counter(
        f"{amount(made['images'], 'image')} by {made['recipe']['name']} ({made['recipe']['preset']}) in "
        f"{amount(made['batches'], 'batch', 'batches')} of {amount(made['steps'], 'step')}"
        for made in (file.plan or {}).get("synthesis", ())
    )
    facts += [f"{count} times {made}" if count > 1 else made for made, count in sets.items()]
    if data := file.options.get("data"):
        facts.append(f"given images: {data if isinstance(data, str) else ', '.join(data)}")
    for part, settings in (file.plan or {}).items():
        if isinstance(settings, dict) and "lr" in settings:
            rate, batch = settings["lr"], settings["batch_size"]
            facts.append(f"{part}: {settings['steps']:,} steps of {batch:,} images, learning rate {rate:g}")
    yield Facts(facts)
    if file.command and not run.inside:
        yield Line(file.command if file.finished else f"{file.command} --resume")
    elif not run.inside:
        yield Text("The run file has no line: Python, a demo or an earlier version started the run.")
    kept = {name: value for name, value in file.options.items() if name not in ("teacher", "teachers", "bits")}
    teachers = [{"sha256": each["sha256"], **each["card"]} for each in run.teachers]
    yield Details(
        "Teacher and all recorded options", json.dumps({"teachers": teachers, **kept}, indent=2, ensure_ascii=False)
    )


def warnings(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> list[Part]:
    """The warnings of each run, or one part that says that there are none."""
    found = each_run(runs, colours, lambda run: [Text(warning, warning=True) for warning in run.warnings])
    if not found:
        return [Part("", [Text("The health checks of images and students found nothing to warn of.")])]
    return found


def short(run: ReportedRun) -> str:
    """A few words that describe what a run did."""
    options, verb = run.file.options, run.file.verb
    architecture = run.card.architecture if run.card else ""
    match verb:
        case "quantize":
            tuning = options.get("finetune")
            return f"quantize {architecture} to {_bits(options)}, {'calibrated only' if tuning == 'none' else tuning}"
        case "prune":
            asked = options.get("pruning") or {}
            return f"prune {architecture} to {asked.get('share')} of {asked.get('resource')}, {options.get('repair')}"
        case "distill":
            return f"distill {architecture} to {options.get('student')}"
        case "merge":
            return f"merge {len(run.teachers)} teachers into {options.get('student')}, {options.get('method')}"
        case "extend":
            return f"extend {architecture} by new classes, {options.get('method')}"
        case "invert":
            recipe = options["recipe"]
            return f"invert {architecture}, {recipe['name']} {recipe['preset']}"
    return f"{verb} {architecture}".strip()


def _bits(options: Mapping[str, Any]) -> str:
    """The bits that were requested for most layers, or `bits chosen for each layer` where the run chose them."""
    asked = Counter((each.get("weights"), each.get("activations")) for each in options["bits"].values())
    (weights, activations), _ = asked.most_common(1)[0] if asked else ((None, None), 0)
    return f"{weights}w{activations}a" if weights and activations else "bits chosen for each layer"
