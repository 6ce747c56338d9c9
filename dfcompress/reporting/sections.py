"""The sections of a report, made from the data that the runs stored; a section without data is left out."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dfcompress.console import amount
from dfcompress.data.image_source import ImageSource
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.reporting.figures import loss_figure
from dfcompress.reporting.page import (
    Block,
    Cell,
    ClassPicture,
    Details,
    Facts,
    Figure,
    Figures,
    Line,
    Part,
    Pictures,
    Section,
    Table,
    Text,
)
from dfcompress.reporting.pictures import made_of, real_of, shown_classes, written
from dfcompress.reporting.runs import Curve, ReportedRun, repeated

CLASSES = 20  # The most classes in a table; of more classes, the table shows the first and the last ten in its order.
RealImages = Callable[[SyntheticSet], ImageSource | None]
Row = Mapping[str, float | None]


def sections_of(runs: Sequence[ReportedRun], real: RealImages) -> list[Section]:
    """Make the sections for which these runs have data. `real` returns the real images to show beside the images of a
    synthetic set, or None.
    """
    colours = {run.name: number for number, run in enumerate(runs)} if len(runs) > 1 else {}
    found = [
        Section("summary", "Summary", [Part("", list(_summary(runs, colours)))]),
        Section("done", "What was done", _each(runs, colours, _done)),
        Section("warnings", "Health checks", _warnings(runs, colours)),
        Section("accuracy", "Accuracy on real images", _accuracy(runs, colours)),
        Section("images", "Images by class", _each(runs, colours, lambda run: _images(run, real))),
        Section("losses", "Losses", list(_losses(runs, colours))),
        Section("agreement", "Agreement with the teacher", [Part("", list(_agreement(runs, colours)))]),
        Section("class-bias", "Class bias", _each(runs, colours, _class_bias)),
        Section("layers", "Layers", _each(runs, colours, _layers)),
        Section("machine", "Time, versions and hardware", [Part("", list(_machine(runs, colours)))]),
    ]
    return [section for section in found if any(part.blocks for part in section.parts)]


def _each(
    runs: Sequence[ReportedRun], colours: Mapping[str, int], tell: Callable[[ReportedRun], Iterable[Block]]
) -> list[Part]:
    """A part for each run for which `tell` yields blocks; without a title if the report has a single run."""
    told = [(run, list(tell(run))) for run in runs]
    return [Part(run.name if colours else "", blocks, colours.get(run.name)) for run, blocks in told if blocks]


# Summary


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


FORMATS: Mapping[str, Callable[[float], str]] = {
    "top-1": _percent,
    "teacher's top-1": _percent,
    "agreement": _percent,
    "bytes": lambda value: f"{value:,.0f}",
    "of fp32": _percent,
    "ms": lambda value: f"{value:,.1f}",
    "ms in fp32": lambda value: f"{value:,.1f}",
    "images": lambda value: f"{value:,.0f}",
    "taken as intended": _percent,
    "J_KL": lambda value: f"{value:.3f}",
    "seconds": _seconds,
}


def _summary(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    """The verdict on each model, a table of the models and a table of the synthetic sets, both with mean and standard
    deviation over seeds.
    """
    sets = [run for run in runs if run.file.verb == "invert"]
    models = [run for run in runs if run.file.verb not in ("invert", "demo")]
    if models:
        verdicts = {run.name: _verdict(run) for run in models if run.file.finished}
        if told := [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict]:
            yield Facts(told)
        yield _numbers(
            models, colours, _of_model, "ms: 64 images in onnxruntime on one thread, where a file was exported."
        )
    if sets:
        yield _numbers(sets, colours, _of_set, "J_KL: how far the images are from the BatchNorm statistics.")


def _of_model(run: ReportedRun) -> Row:
    measured, scores = run.measured, run.scores
    export = measured.get("export") or {}
    return {
        "top-1": scores[-1]["top1"] if scores else None,
        "teacher's top-1": _teachers_top1(run),
        "agreement": measured.get("agreement"),
        "bytes": measured.get("bytes"),
        "of fp32": measured.get("bytes_ratio"),
        "seconds": measured.get("seconds", {}).get("total"),
        "ms": export.get("milliseconds"),
        "ms in fp32": export.get("milliseconds_fp32"),
    }


def _verdict(run: ReportedRun) -> str:
    """How much smaller, faster and less accurate than its teacher a model is, as text. Without accuracies on real
    images, the text states the agreement of both instead.
    """
    found = _of_model(run)
    share, ms, ms_fp32, agreement = (found[name] for name in ("of fp32", "ms", "ms in fp32", "agreement"))
    said = []
    if share and share < 1:
        said.append(f"{1 / share:.1f} times smaller than the teacher")
    if ms and ms_fp32:
        said.append(f"{ms_fp32 / ms:.1f} times as fast in onnxruntime")
    if found["teacher's top-1"] is not None:
        teacher, student = run.scores[0], run.scores[-1]
        lost = teacher["correct"] - student["correct"]
        change = f"{100 * abs(lost) / student['total']:.2f} points {'less' if lost > 0 else 'more'} accurate"
        noise = ", which may be noise" if lost and _may_be_noise(lost, student) else ""
        said.append(f"{change if lost else 'as accurate'} on {student['total']:,} real images{noise}")
    elif agreement is not None:
        said.append(f"{_percent(agreement)} of the answers to its images as the teacher's")
    return ", ".join(said)


def _may_be_noise(lost: int, student: Mapping[str, Any]) -> bool:
    """Whether McNemar's test at 5 % may call a loss of `lost` correct images noise. The number of images that only one
    model has right is not known; it is at most the number on which the models disagree.
    """
    if student["agreement"] is None:
        return True
    differ = (1 - student["agreement"]) * student["total"]
    return bool(lost**2 <= 1.96**2 * differ)


def _teachers_top1(run: ReportedRun) -> float | None:
    """The top-1 accuracy of the teacher on the images on which its student is evaluated. None where there is no such
    number: several teachers each have their own images, and an extended model also has classes that its teacher lacks.
    """
    scores = run.scores
    if len(scores) < 2 or scores[0]["total"] != scores[-1]["total"] or scores[0].get("images") in ("new", "all"):
        return None
    return float(scores[0]["top1"])


def _of_set(run: ReportedRun) -> Row:
    measured = run.measured
    return {
        "images": measured.get("images"),
        "taken as intended": measured.get("teacher_top1"),
        "J_KL": measured.get("bn_divergence"),
        "seconds": measured.get("seconds"),
    }


def _numbers(
    runs: Sequence[ReportedRun], colours: Mapping[str, int], numbers: Callable[[ReportedRun], Row], note: str
) -> Table:
    found = {run.name: numbers(run) for run in runs}
    columns = [name for name in next(iter(found.values())) if any(row[name] is not None for row in found.values())]
    groups = repeated(runs)
    seeds = any(len(group) > 1 for group in groups)
    rows: list[list[Cell]] = []
    sums: list[int] = []
    for group in groups:
        for run in group:
            seed = [Cell(str(run.file.options.get("seed", "")))] if seeds else []
            cells = [_cell(name, [found[run.name][name]]) for name in columns]
            what = _short(run) if run.file.finished else f"{_short(run)} (not finished)"
            rows.append([Cell(run.name, colour=colours.get(run.name)), Cell(what), *seed, *cells])
        finished = [run for run in group if run.file.finished]
        if len(finished) > 1:
            sums.append(len(rows))
            cells = [_cell(name, [found[run.name][name] for run in finished]) for name in columns]
            rows.append([Cell("mean ± sd"), Cell(_short(group[0])), Cell(f"{len(finished)} seeds"), *cells])
    if not any(name in columns for name in ("ms", "J_KL")):
        note = ""
    if sums:
        note = f"{note} sd: standard deviation over the seeds (n − 1).".strip()
    return Table(
        columns=["run", "what", *(["seed"] if seeds else []), *columns], rows=rows, texts=2, emphasised=sums, note=note
    )


def _cell(name: str, values: Sequence[float | None]) -> Cell:
    """A cell with a single value, or with the mean and standard deviation of several values; None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("")
    if len(known) == 1:
        return Cell(FORMATS[name](known[0]))
    spread, mean = statistics.stdev(known), FORMATS[name](statistics.mean(known))
    return Cell(f"{mean} ± {FORMATS[name](spread).removesuffix(' %')}" if spread else mean)


# What was done


def _short(run: ReportedRun) -> str:
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


def _done(run: ReportedRun) -> Iterator[Block]:
    file = run.file
    if not file.finished:
        yield Text("This run is not finished: it was interrupted, or is still going on.", warning=True)
    seed = f", seed {file.options['seed']}" if "seed" in file.options else ""
    facts = [f"{_short(run)[0].upper()}{_short(run)[1:]}{seed}"]
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


# Health


def _warnings(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> list[Part]:
    found = _each(runs, colours, lambda run: [Text(warning, warning=True) for warning in run.warnings])
    if not found:
        return [Part("", [Text("The health checks of images and students found nothing to warn of.")])]
    return found


# Accuracy


def _accuracy(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> list[Part]:
    """One table of all scores, and for each extended model a table of the accuracies of its old classes before and
    after.
    """
    found = [(run, score) for run in runs for score in run.scores]
    which = any(score.get("images") for _, score in found)
    rows = [
        [
            Cell(run.name, colour=colours.get(run.name)),
            Cell(Path(score["checkpoint"]).name),
            *([Cell(score.get("images") or "")] if which else []),
            Cell(f"{score['correct']:,}"),
            Cell(f"{score['total']:,}"),
            Cell(_percent(score["top1"])),
            Cell("" if score.get("standard_error") is None else f"± {100 * score['standard_error']:.2f}"),
            Cell("" if score["top5"] is None else _percent(score["top5"])),
            Cell("" if score["agreement"] is None else _percent(score["agreement"])),
        ]
        for run, score in found
    ]
    columns = ["run", "checkpoint", *(["images"] if which else []), "right", "of", "top-1", "standard error", "top-5"]
    scores = Table(columns=[*columns, "answers as the first"], rows=rows, texts=3 if which else 2)
    return [Part("", [scores] if rows else []), *_each(runs, colours, _forgetting)]


def _forgetting(run: ReportedRun) -> Iterator[Block]:
    if classes := (run.measured.get("evaluation") or {}).get("forgetting"):
        rows = [
            [Cell(each["name"]), Cell(f"{each['total']:,}"), Cell(_percent(each["before"])), _share(each["after"])]
            for each in _both_ends(classes, key=lambda each: each["after"] - each["before"])
        ]
        yield Table(columns=["old class", "images", "right before", "right after"], rows=rows)


def _signed(number: str) -> str:
    """The number with the typographic minus sign, which is as wide as a plus sign."""
    return number.replace("-", "−")


def _both_ends(rows: Sequence[Any], key: Callable[[Any], float]) -> list[Any]:
    """All rows in their order; of more than `CLASSES` rows, the ten with the least key and the ten with the largest."""
    if len(rows) <= CLASSES:
        return list(rows)
    ordered = sorted(rows, key=key)
    return ordered[: CLASSES // 2] + ordered[-CLASSES // 2 :]


def _share(share: float | None, most: float = 1.0) -> Cell:
    return Cell("") if share is None else Cell(_percent(share), bar=share / most if most else 0.0)


# Agreement and class bias


def _agreement(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    """A table of the agreement of every student with each of its teachers."""
    found = [(run, teacher) for run in runs for teacher in run.measured.get("teachers", ())]
    if not found:
        return
    rows = [
        [
            Cell(run.name, colour=colours.get(run.name)),
            Cell(teacher["checkpoint"]),
            _share(teacher["agreement"]),
            _share(teacher["held_out"]),
            _share(teacher["probe"]),
            *(
                [Cell(", ".join(_percent(share) for share in teacher["blocks"] or () if share is not None))]
                if _merged(found)
                else []
            ),
        ]
        for run, teacher in found
    ]
    columns = ["run", "teacher", "images trained on", "held out", "probe images"]
    note = "Share of images, made or given, on which student and teacher answer with the same class."
    if _merged(found):
        columns.append("taken for each teacher's classes")
    yield Table(columns=columns, rows=rows, texts=2, note=note)


def _merged(found: Iterable[tuple[ReportedRun, Mapping[str, Any]]]) -> bool:
    return any(teacher.get("blocks") for _, teacher in found)


def _class_bias(run: ReportedRun) -> Iterator[Block]:
    """For each teacher a table of the classes, with the shares of the training images that the teacher and the student
    assign to each class.
    """
    names = run.class_names
    for teacher in run.measured.get("teachers", ()):
        by_teacher, by_student = teacher.get("teacher_answers"), teacher.get("student_answers")
        if not by_teacher or not sum(by_teacher):
            continue
        total = sum(by_teacher)
        shares = [
            (label, one / total, other / total)
            for label, (one, other) in enumerate(zip(by_teacher, by_student, strict=True))
            if one or other or len(by_teacher) <= CLASSES
        ]
        most = max(max(one, other) for _, one, other in shares)
        rows = [
            [
                Cell(_class_name(names, label)),
                _share(one, most),
                _share(other, most),
                Cell(_signed(f"{100 * (other - one):+.2f}")),
            ]
            for label, one, other in _both_ends(shares, key=lambda each: each[2] - each[1])
        ]
        note = f"Shares of the {total:,} images trained on that each takes for a class"
        note += f"; {len(rows)} of {len(by_teacher):,} classes" if len(rows) < len(by_teacher) else ""
        columns = ["class", f"teacher {teacher['checkpoint']}", "student", "points"]
        yield Table(columns=columns, rows=rows, note=f"{note}.")


# Images


def _images(run: ReportedRun, real: RealImages) -> Iterator[Block]:
    for synthetic in run.sets.values():
        shards = written(synthetic)
        if not shards:
            continue
        labels = torch.cat([synthetic.read_shard(shard)[1] for shard in shards])
        classes, counts = shown_classes(labels), labels.bincount()
        made = made_of(synthetic, shards, classes)
        source = real(synthetic)
        beside = real_of(source, classes, (synthetic.size[1], synthetic.size[2])) if source else {}
        present = int((counts > 0).sum())
        of_many = f", {len(classes)} of {present:,} classes" if len(classes) < present else ""
        beside_them = "; real images on the right" if beside else ""
        unfinished = f" of {len(synthetic):,}, which are not finished" if len(labels) < len(synthetic) else ""
        recipe = synthetic.manifest["recipe"]["name"]
        yield Text(f"{len(labels):,} images{unfinished} by {recipe}{of_many}{beside_them}.")
        names = dict(enumerate(synthetic.class_names or ()))
        yield Pictures(
            [
                ClassPicture(_class_name(names, label), f"{counts[label]:,}", made[label], beside.get(label))
                for label in classes
            ]
        )


def _class_name(names: Mapping[int, str], label: int) -> str:
    return str(names.get(label, f"class {label}"))


# Losses


def _losses(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Part]:
    """A part for each phase, with a figure for each of its losses, which has the curves of all runs with this loss."""
    phases: dict[str, dict[str, list[tuple[str, Curve]]]] = {}
    for run in runs:
        for losses in run.losses:
            for name, curves in losses.curves.items():
                phases.setdefault(losses.phase, {}).setdefault(name, []).extend((run.name, each) for each in curves)
    for phase, found in sorted(phases.items(), key=lambda each: each[0].startswith("training")):
        figures = [_figure(phase, name, curves, colours) for name, curves in found.items()]
        shown = {run for curves in found.values() for run, _ in curves}
        legend = [(run, colour) for run, colour in colours.items() if run in shown]
        yield Part(phase[0].upper() + phase[1:], [Figures(figures, legend)])


def _figure(phase: str, name: str, curves: Sequence[tuple[str, Curve]], colours: Mapping[str, int]) -> Figure:
    several = f", {len(curves)} curves" if len(curves) > 1 else ""
    ends = "" if several else f"{curves[0][1].values[0]:.4g} → {curves[0][1].values[-1]:.4g}"
    svg = loss_figure([(colours.get(run, 0), curve) for run, curve in curves])
    return Figure(svg, name.replace("_", " "), ends, f"{name} of {phase} over the steps{several} {ends}".strip())


# Layers


def _layers(run: ReportedRun) -> Iterator[Block]:
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
            Cell("" if each["input_low"] is None else _signed(f"{each['input_low']:.3g} … {each['input_high']:.3g}")),
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


def _length(value: float, most: float) -> float:
    return min(1.0, max(0.0, value / most)) if most else 0.0


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


# Machine


def _machine(runs: Sequence[ReportedRun], colours: Mapping[str, int]) -> Iterator[Block]:
    wholes = ("total", "invocation")
    parts = sorted({part: None for run in runs for part in _parts(run)}, key=lambda part: part in wholes)
    if parts:
        rows = [
            [Cell(run.name, colour=colours.get(run.name))]
            + [Cell(_seconds(told[part]) if part in told else "") for part in parts]
            for run in runs
            if (told := _parts(run))
        ]
        yield Table(columns=["run", *parts], rows=rows, note="Seconds of each part; invocation: of the last call.")
    columns = ["run", "processor", "device", "precision", "compiled", "threads", "peak memory", *_libraries(runs)]
    rows = []
    for run in runs:
        how, memory = _execution(run), run.file.peak_memory_bytes
        rows.append(
            [
                Cell(run.name, colour=colours.get(run.name)),
                Cell(run.file.processor or how.get("processor") or ""),
                Cell(str(how.get("device", ""))),
                Cell(str(how.get("precision", ""))),
                Cell({True: "yes", False: "no", None: ""}[how.get("compile")]),
                Cell(str(how.get("threads", ""))),
                Cell(f"{memory / 2**30:.2f} GiB" if memory else ""),
                *(Cell(run.file.versions.get(name, "")) for name in _libraries(runs)),
            ]
        )
    yield Table(columns=columns, rows=rows, texts=5)


def _libraries(runs: Sequence[ReportedRun]) -> list[str]:
    return list({name: None for run in runs for name in run.file.versions})


def _parts(run: ReportedRun) -> Mapping[str, float]:
    """The seconds of a run by part: from its measurements if they hold seconds by part, else from its run file."""
    seconds = run.measured.get("seconds")
    return seconds if isinstance(seconds, Mapping) else run.file.seconds


def _execution(run: ReportedRun) -> Mapping[str, Any]:
    """The stored execution of the run's training, else of its first set; empty if there is none."""
    trained = (run.measured.get("training") or {}).get("execution")
    first = next(iter(run.sets.values()), None)
    return trained or (first.manifest.get("execution") if first else None) or {}
