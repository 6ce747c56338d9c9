"""`dfcompress compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dfcompress import console
from dfcompress.commands import _help, _options, _summary
from dfcompress.errors import BadInput

if TYPE_CHECKING:
    from dfcompress.models.classifier import Classifier
    from dfcompress.verbs._comparison import Comparison, Difference, ModelOnSet

SEVERAL = ("--sets", "--own")
FEW = 3  # Classes and pairs of classes in a line.
TAIL = 0.1  # Of the classes, in the column of the tail degradation.


class _TakesSeveral(_help.Command):
    """A command whose options `SEVERAL` take all words to the next option: `--sets a b` means `--sets a --sets b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after repeating the options in the form that click needs."""
        return super().parse_args(ctx, list(_repeated(args)))


def _repeated(args: Sequence[str]) -> Iterator[str]:
    option, has_value = None, False
    for word in args:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            option, has_value = name if name in SEVERAL else None, bool(equals)
        else:
            if option and has_value:
                yield option
            has_value = True
        yield word


@click.command(
    cls=_TakesSeveral,
    epilog=_options.example("dfcompress compare resnet20.pt resnet20-quantize --sets cifar10-test.npz random"),
)
@_options.models
@click.option(
    "--sets",
    multiple=True,
    required=True,
    metavar="SET...",
    help="Sets of images, behind the models: a folder of class folders, an .npz, IDX files, the batches of CIFAR, a "
    "synthetic set or a run folder. random is Gaussian noise, fgsm:SET a set under attack, images:SET a set whose "
    "labels do not count.",
)
@click.option(
    "--own",
    multiple=True,
    metavar="SET...",
    help="Set that is the models' own data, one for all or one for each model. J_KL is also given divided by the J_KL "
    "of this set.",
)
@click.option(
    "--epsilon",
    type=float,
    default=0.1,
    show_default=True,
    help="Step of the attack of fgsm:SET, in standard deviations of the model card.",
)
@click.option(
    "--outliers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of images of each set to list that lie furthest from the training data.",
)
@click.option(
    "--tail-by",
    metavar="SET",
    help="Set over which the first model's mean predictions order the classes for the tail degradation. By default "
    "each set itself.",
)
@click.option("--by-class", is_flag=True, help="Also print accuracy and mean predictions of every class.")
@click.option("--csv", type=_options.PATH, help="Write all tables in full to this new or empty folder.")
@_help.under(
    "Machine",
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Number of images that are read at once.",
    ),
)
@_options.device
@_options.reporting
def compare(
    models: list[Classifier],
    sets: tuple[str, ...],
    own: tuple[str, ...],
    epsilon: float,
    outliers: int,
    tail_by: str | None,
    by_class: bool,
    csv: Path | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate several models on sets of images. All models are compared with the first."""
    from dfcompress.verbs.compare import compare

    if csv and csv.exists() and (not csv.is_dir() or any(csv.iterdir())):
        raise BadInput(f"--csv {csv} is not a new or empty folder.", "Name another one.")
    if csv and not csv.parent.is_dir():
        raise BadInput(f"--csv {csv}: there is no folder {csv.parent}.", "Make it, or name another one.")
    found = compare(
        models,
        sets=sets,
        own=own,
        epsilon=epsilon,
        outliers=outliers,
        tail_by=tail_by,
        device=device,
        batch_size=batch_size,
    )
    if csv:
        found.write_csv(csv)
    if as_json:
        console.result_json(found.to_json())
    else:
        _print(found, by_class=by_class)


def _print(found: Comparison, *, by_class: bool) -> None:
    numbers = {model.checkpoint: str(number) for number, model in enumerate(found.models, 1)}
    console.table(
        ["model", "classes", "own data"],
        [[f"{numbers[each.checkpoint]} {each.checkpoint}", str(each.classes), each.own or ""] for each in found.models],
    )
    console.result("")
    _similarity(found, list(numbers.values()))
    for name in found.sets:
        console.result("")
        _answers(found, name, numbers)
        if by_class:
            _classes(found.on(name), found, list(numbers.values()))


def _similarity(found: Comparison, numbers: Sequence[str]) -> None:
    console.result("J_KL of each set under each model: how far it is from the training data")
    if any(model.own for model in found.models):
        console.result("in brackets: divided by J_KL of the model's own data")
    rows = []
    for name in found.sets:
        results = found.on(name)
        cells = ["" if one.bn_divergence is None else f"{one.bn_divergence:.4f}{_ratio(one)}" for one in results]
        rows.append([name, f"{results[0].images:,}", *cells])
    console.table(["set", "images", *numbers], rows)
    if any(name.startswith("fgsm:") for name in found.sets):
        console.result("fgsm: every model sees the images that attack itself")


def _ratio(one: ModelOnSet) -> str:
    return "" if one.divergence_ratio is None else f" ({one.divergence_ratio:.1f})"


def _answers(found: Comparison, name: str, numbers: dict[str, str]) -> None:
    """Print each model's accuracy on a set and its difference from the first model, then the changed predictions."""
    against = {each.checkpoint: each for each in found.differences if each.set == name}
    console.result(f"on {name}, against model 1:" if against else f"on {name}:")
    rows = [
        [numbers[one.checkpoint], *_accuracy(one), *_against(against.get(one.checkpoint))] for one in found.on(name)
    ]
    kept = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    console.table([COLUMNS[column] for column in kept], [[row[column] for column in kept] for row in rows])
    for model, one in zip(found.models, found.on(name), strict=True):
        number, other = numbers[one.checkpoint], against.get(one.checkpoint)
        console.result(f"model {number} predicts {_bias(one, model.class_names)}")
        if other and other.moves:
            lost = _lost(found.on(name)[0], one, model.class_names)
            console.result(f"model {number} changes {_changes(other, model.class_names)}{lost}")
        if one.outliers:
            listed = ", ".join(f"{each.image} ({each.score:.2f})" for each in one.outliers)
            console.result(f"model {number} finds furthest out: {listed}")


COLUMNS = ("model", "correct", "top-1", "ECE", "agrees", "gained", "lost", "points (95 %)", "p", "verdict", "tail")


def _accuracy(one: ModelOnSet) -> list[str]:
    if one.top1 is None:
        return [""] * 3
    return [f"{one.correct}/{one.images}", f"{one.top1:.2%}", f"{one.calibration_error:.1%}"]


def _against(one: Difference | None) -> list[str]:
    if one is None:
        return [""] * 7
    if one.interval is None or one.difference is None or one.tail_degradation is None:
        return [f"{one.agreement:.2%}", *[""] * 6]
    low, high = one.interval
    verdict = "within noise" if one.within_noise else "better" if one.difference > 0 else "worse"
    tail = one.tail_degradation[max(1, round(TAIL * len(one.tail_degradation))) - 1]
    return [
        f"{one.agreement:.2%}",
        str(one.gained),
        str(one.lost),
        f"{100 * one.difference:+.1f} ({100 * low:+.1f} .. {100 * high:+.1f})",
        f"{one.p_value:.2g}",
        verdict,
        f"{tail:.1%}",
    ]


def _named(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names else str(number)


def _bias(one: ModelOnSet, names: Sequence[str] | None) -> str:
    """The classes with the largest and with the smallest mean softmax."""
    order = sorted(range(len(one.soft)), key=lambda each: -one.soft[each])
    digits = _digits(one)

    def shares(classes: Sequence[int]) -> str:
        return ", ".join(f"{_named(each, names)} ({one.soft[each]:.{digits}%})" for each in classes)

    never = one.hard.count(0)
    none = f"; {never} of {len(order)} classes never" if never else ""
    if len(order) <= 2 * FEW:
        return f"{shares(order)}{none}"
    return f"most {shares(order[:FEW])}, least {shares(order[-FEW:])}{none}"


def _digits(one: ModelOnSet) -> int:
    """The number of decimals for percentages that add up to 100 over all classes."""
    return 1 if len(one.soft) <= _summary.CLASSES_SHOWN else 2


def _changes(one: Difference, names: Sequence[str] | None) -> str:
    pairs = [f"{_named(move.before, names)} > {_named(move.after, names)} ({move.images})" for move in one.moves[:FEW]]
    return f"{one.changed:,} of {one.images:,} answers, most often {', '.join(pairs)}"


def _lost(first: ModelOnSet, one: ModelOnSet, names: Sequence[str] | None) -> str:
    """The classes that lost the most accuracy against the first model, in percentage points."""
    pairs = enumerate(zip(first.class_accuracy, one.class_accuracy, strict=True))
    falls = [(now - was, each) for each, (was, now) in pairs if was is not None and now is not None and now < was]
    worst = [f"{_named(each, names)} ({100 * fall:.1f} points)" for fall, each in sorted(falls)[:FEW]]
    return f"; loses most on {', '.join(worst)}" if worst else ""


def _classes(results: Sequence[ModelOnSet], found: Comparison, numbers: Sequence[str]) -> None:
    """Print mean predictions and accuracy of each class, ordered by the first model's mean softmax, the largest first;
    with many classes, only both ends of the order.
    """
    first = results[0]
    alike = [number for number, model in enumerate(found.models) if model.compared]
    order = sorted(range(len(first.soft)), key=lambda each: -first.soft[each])
    half = _summary.CLASSES_SHOWN // 2
    digits = _digits(first)
    shown = order if len(order) <= _summary.CLASSES_SHOWN else [*order[:half], *order[-half:]]
    rows = []
    for each in shown:
        cells = [f"{results[one].soft[each]:.{digits}%} / {results[one].hard[each]:.{digits}%}" for one in alike]
        accuracies = [results[one].class_accuracy[each] for one in alike]
        rows.append(
            [_named(each, found.models[0].class_names), *cells]
            + ["" if share is None else f"{share:.1%}" for share in accuracies]
        )
    soft = [f"soft / hard {numbers[one]}" for one in alike]
    console.table(["class", *soft, *(f"right {numbers[one]}" for one in alike)], rows)
