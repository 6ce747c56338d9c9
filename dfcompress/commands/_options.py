"""Options that several commands share; each is defined and explained once.

A group of options reaches the command as a single value: `@synthesis` passes a `Synthesis`.
The value is built only when the command runs, so parsing does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from click.core import ParameterSource

from dfcompress import console
from dfcompress.commands import _config
from dfcompress.commands._help import Argument, Decorator, under
from dfcompress.errors import BadInput
from dfcompress.settings import assignments
from dfcompress.synthesis.recipes import known_recipes, recipe_names
from dfcompress.training import OBJECTIVES, OptimizerBackend, OptimizerName
from dfcompress.verbs import Target

if TYPE_CHECKING:
    from dfcompress.machine.execution import Compute
    from dfcompress.models.classifier import Classifier
    from dfcompress.synthesis.recipe import Synthesis
    from dfcompress.verbs._gates import Gates

PATH = click.Path(path_type=Path)


def group(name: str, build: Callable[..., Any], *options: Decorator) -> Decorator:
    """Options that the command receives as one argument `name`, which `build` makes from their values."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_value(*args: Any, **values: Any) -> Any:
            own = {key: values.pop(key) for key in keys}
            return command(*args, **values, **{name: build(**own)})

        before = len(getattr(command, "__click_params__", []))
        for option in reversed(options):
            option(with_value)
        added: list[click.Parameter] = with_value.__click_params__[before:]  # type: ignore[attr-defined]
        keys = [parameter.name for parameter in added if parameter.expose_value]
        return with_value

    return decorate


# The sources of an option's value in their order of priority.
PLACES = (
    ParameterSource.COMMANDLINE,
    ParameterSource.ENVIRONMENT,
    ParameterSource.DEFAULT_MAP,
    ParameterSource.DEFAULT,
)


class _Renamed(click.Option):
    """An option that is also accepted under its former name, with a notice."""

    def __init__(self, *arguments: Any, former: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.former = former

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """The value and its source. The command line overrides the environment, and both override the file, under
        either name. Raises `BadInput` where one source sets both names.
        """
        former = next(parameter for parameter in ctx.command.params if self.former in parameter.opts)
        (new, source), (old, old_source) = super().consume_value(ctx, opts), former.consume_value(ctx, opts)
        if old_source is ParameterSource.DEFAULT:
            return new, source
        console.notice(f"{self.former} is now called {self.opts[0]}; the old name will be removed in the next version.")
        if source is old_source:
            raise BadInput(f"{self.former} and {self.opts[0]} are the same option.", "Give one of them.")
        return (new, source) if PLACES.index(source) < PLACES.index(old_source) else (old, old_source)


def renamed(former: str, *declarations: str, **attributes: Any) -> Decorator:
    """An option whose name changed in this version. The `former` name still works for one version, hidden from help: on
    the command line, in the environment and in the configuration file.
    """
    kind = {"is_flag": True} if attributes.get("is_flag") else {"type": str}
    return together(
        click.option(*declarations, cls=_Renamed, former=former, **attributes),
        click.option(former, f"former_{former.strip('-')}", hidden=True, expose_value=False, **kind),
    )


def together(*decorators: Decorator) -> Decorator:
    """Combine several decorators into one, in the order of the help page."""
    return lambda command: functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), command)


def _listed(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def example(line: str) -> str:
    """The example line at the end of a command's help."""
    return f"Example:  {line}"


def numbers(text: str, option: str, kind: type = float, separator: str = ",") -> tuple[Any, ...]:
    """Parse `0.49,0.48,0.45` to (0.49, 0.48, 0.45); raises `BadInput`, naming the option, where this fails."""
    try:
        return tuple(kind(part) for part in text.split(separator))
    except ValueError:
        form = separator.join(["3", "32", "32"]) if kind is int else "0.49,0.48,0.45"
        raise BadInput(f"{option} {text!r} is not understood.", f"Write it like {form}.") from None


def _load(
    model: Path,
    arch: str | None,
    match_by_order: bool,
    num_classes: int | None,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    class_names: Path | None = None,
) -> Classifier:
    from dfcompress.models.checkpoint import load

    return load(
        model,
        arch=arch,
        match_by_order=match_by_order,
        num_classes=num_classes,
        input_size=numbers(input_size, "--input-size", int, "x") if input_size else None,
        mean=numbers(mean, "--mean") if mean else None,
        std=numbers(std, "--std") if std else None,
        class_names=class_names,
    )


def _load_all(models: tuple[Path, ...], **card: Any) -> list[Classifier]:
    return [_load(model, **card) for model in models]


def _compute(device: str, precision: str, compile: str, seed: int) -> Compute:
    from dfcompress.machine.execution import Compute

    return Compute(device=device, precision=precision, compile=compile, seed=seed)  # type: ignore[arg-type]


def _synthesis(
    recipe: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    images: int | None,
    steps: int | None,
    lr: float | None,
    batch_size: int | None,
    labels: str,
    only: str | None,
    groups: str,
    preview_every: int,
    records: Path | None,
    no_records: bool,
) -> Synthesis:
    from dfcompress.synthesis.recipe import Synthesis

    short = {"steps": steps, "lr": lr, "batch_size": batch_size}
    overrides: dict[str, Any] = {name: value for name, value in short.items() if value is not None}
    overrides = _once_each(overrides, assignments(settings, "--set"), "--set")
    return Synthesis(
        recipe=recipe,
        preset=preset,
        settings=overrides,
        images=images,
        labels=labels,
        classes=tuple(name.strip() for name in only.split(",")) if only else (),
        groups=_groups(groups),
        preview_every=preview_every,
        records=_records(records, no_records),
    )


def _records(records: Path | None, no_records: bool) -> Path | str | None:
    if records and no_records:
        raise BadInput("--records and --no-records exclude each other.", "Give one of them.")
    return None if no_records else records or "beside"


def _gates(max_drop: float | None, min_agreement: float | None) -> Gates:
    from dfcompress.verbs._gates import Gates

    return Gates(max_drop=max_drop, min_agreement=min_agreement)


def _groups(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--groups {text!r} is not a number of batches.", "Use auto, or 1 or more.")
    return int(text)


def _verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def configure(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            console.configure(level)

    return configure


def _nothing(ctx: click.Context, parameter: click.Parameter, value: str) -> str | None:
    """Convert `none` on the command line to None."""
    return None if value == "none" else value


def _speaking(name: str, letter: str, level: int, explanation: str) -> Decorator:
    flags = (f"-{letter}", f"--{name}")
    # Evaluated first, so that it also applies to notices about other options.
    return click.option(
        *flags, is_flag=True, is_eager=True, expose_value=False, callback=_verbosity(level), help=explanation
    )


loading = under(
    "Model",
    click.option(
        "--arch",
        metavar="NAME",
        help="Architecture of the checkpoint, where it is not recognised: a name, timm:NAME, file.py:factory or "
        "package.module:factory. The code of a factory is run.",
    ),
    click.option(
        "--match-by-order",
        is_flag=True,
        help="Match the tensors of the file to those of --arch by order and shape, where their names differ.",
    ),
    click.option(
        "--num-classes",
        type=click.IntRange(1),
        help="Number of classes, for a factory that takes num_classes and a file without a card.",
    ),
    click.option(
        "--input-size", metavar="CxHxW", help="Channels, height and width of the input, for instance 3x32x32."
    ),
    click.option("--mean", metavar="M,M,M", help="Mean of the training images, one number per channel, in [0, 1]."),
    click.option(
        "--std", metavar="S,S,S", help="Standard deviation of the training images, one number per channel, in [0, 1]."
    ),
)
class_names = under(
    "Model", click.option("--class-names", type=PATH, help="Text file with the name of one class per line, in order.")
)


class _ModelPath(click.Path):
    """A path whose error message names the other ways to set it."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The text after "Missing argument"."""
        return "Name a checkpoint, or set DFCOMPRESS_MODEL, or `model` in dfcompress.toml."


A_CHECKPOINT = "a file, a folder, or the name of released weights such as torchvision:resnet18"
one = click.argument(
    "model",
    cls=Argument,
    type=_ModelPath(path_type=Path),
    envvar="DFCOMPRESS_MODEL",
    explanation=f"The checkpoint: {A_CHECKPOINT}.",
)
model = group("model", _load, one, loading, class_names)
model_of_other_classes = group("model", _load, one, loading)

several = click.argument(
    "models",
    cls=Argument,
    nargs=-1,
    required=True,
    type=PATH,
    explanation=f"The checkpoints, each of them {A_CHECKPOINT}.",
)
models = group("models", _load_all, several, loading, class_names)
models_of_other_classes = group("models", _load_all, several, loading)

dry_run = click.option(
    "--dry-run", is_flag=True, help="Print the plan with an estimate of time and memory, and write nothing."
)
output = together(
    click.option(
        "-o", "--output", type=PATH, help="Folder for the result. By default it is named after the checkpoint."
    ),
    click.option("--resume", is_flag=True, help="Continue an interrupted run in that folder."),
    click.option("--overwrite", is_flag=True, help="Replace the contents of that folder."),
    dry_run,
)

device = under(
    "Machine",
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Device to compute on: auto (the GPU where there is one), cpu, cuda or cuda:N.",
    ),
)

compute = group(
    "compute",
    _compute,
    device,
    under(
        "Machine",
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="Precision of convolutions. auto is bf16 on processors with bf16 instructions, and fp32 on others.",
        ),
        click.option(
            "--compile",
            type=click.Choice(["auto", "on", "off"]),
            default="auto",
            show_default=True,
            help="Whether to use torch.compile. auto compiles when the job is long enough to save time.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Seed of every random number. The same seed on the same kind of processor gives the same bytes.",
        ),
    ),
)


def synthesis(*, images: int | str) -> Decorator:
    """Options of synthesis; `images`: the verb's default number of images, as help shows it."""
    number = click.option(
        "--images", type=click.IntRange(1), show_default=str(images), help="Number of images to synthesize."
    )
    return group("synthesis", _synthesis, number, *_SYNTHESIS)


class _RecipeName(click.Choice[str]):
    """A known recipe, or `file.py:function`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The recipe's name; the name of a function (with a colon) is not checked."""
        return value if isinstance(value, str) and ":" in value else super().convert(value, param, ctx)


_SYNTHESIS = (
    click.option(
        "--recipe",
        type=_RecipeName(known_recipes()),
        help="Method of synthesis, or file.py:function for a recipe of your own. By default the method that the "
        "activation record asks for, or the command's usual one.",
    ),
    under(
        "Images",
        click.option(
            "--preset",
            metavar="NAME",
            help="Named settings of the recipe, for instance paper-cifar10. By default those for images of the "
            "model's size.",
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Override one setting of the recipe."
        ),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help="Number of optimisation steps for each batch. The steps on smaller images change in proportion.",
        ),
        click.option("--lr", type=float, help="Learning rate of synthesis."),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help="Number of images in a batch of synthesis. The images of a batch share their BatchNorm statistics.",
        ),
        click.option(
            "--labels",
            default="balanced",
            show_default=True,
            metavar="balanced|random|FILE",
            help="Classes of the images: all in turn, drawn at random, or listed in a file.",
        ),
        click.option(
            "--classes", "only", metavar="C,C,...", help="Synthesize images of these classes alone, by number or name."
        ),
        click.option(
            "--groups",
            default="auto",
            show_default=True,
            metavar="N",
            help="Number of batches that one step optimises side by side.",
        ),
        click.option(
            "--preview-every",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            metavar="STEPS",
            help="Write preview.png again after this number of steps. With 0 it is written once, at the end.",
        ),
        click.option(
            "--records",
            type=PATH,
            help="Activation record that was released with the model. By default the file beside the model.",
        ),
        click.option("--no-records", is_flag=True, help="Ignore the activation record beside the model."),
    ),
)

data = click.option(
    "--data",
    type=PATH,
    help="Synthetic set, folder of an earlier run, or real images to learn from. Without it, images are synthesized "
    "first.",
)
eval_data = click.option(
    "--eval-data", type=PATH, help="Real images on which accuracy is reported. They influence nothing else."
)

export = click.option(
    "--export",
    type=click.Choice(["onnx"]),
    help="Also write model.onnx, check it in onnxruntime, and time it beside the model as it was.",
)
target = click.option(
    "--target",
    type=click.Choice(get_args(Target)),
    default="onnxruntime",
    show_default=True,
    help="Runtime that the ONNX file is for. openvino takes 8 bits alone, tensorrt signed 8-bit grids alone.",
)

gates = group(
    "gates",
    _gates,
    under(
        "Checks",
        click.option(
            "--max-drop",
            type=float,
            metavar="POINTS",
            help="Exit with code 3 if top-1 on --eval-data (for extend: on the old classes) drops by more than "
            "this number of percentage points.",
        ),
        click.option(
            "--min-agreement",
            type=float,
            metavar="SHARE",
            help="Exit with code 3 if the result and its teacher agree on less than this share of the held-out images.",
        ),
    ),
)

reporting = under(
    "Output",
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    _config.option,
    _speaking("verbose", "v", console.VERBOSE, "Explain automatic choices on stderr."),
    _speaking("quiet", "q", console.QUIET, "Print no progress and no notices."),
)


def training(*, steps: int | str, lr: float | str, batch_size: int | str) -> Decorator:
    """Options of the training loop, as changes of a verb's default `Training`; the arguments are the defaults shown."""
    return group(
        "training",
        _training,
        click.option(
            "--train-steps",
            type=click.IntRange(0),
            show_default=str(steps),
            help="Number of training steps. With 0 nothing is trained.",
        ),
        under(
            "Training",
            click.option("--train-lr", type=float, show_default=str(lr), help="Learning rate of training."),
            click.option(
                "--train-batch-size",
                type=click.IntRange(1),
                show_default=str(batch_size),
                help="Number of images in a training step.",
            ),
            click.option(
                "--optimizer",
                show_default="sgd",
                metavar="NAME",
                help=f"Optimizer: {_listed(get_args(OptimizerName))}.",
            ),
            click.option(
                "--optimizer-backend",
                show_default="auto",
                metavar="NAME",
                help=f"Implementation of the optimizer: {_listed(get_args(OptimizerBackend))}.",
            ),
            click.option(
                "--train-set",
                "train_settings",
                multiple=True,
                metavar="NAME=VALUE",
                help="Override one setting of training.",
            ),
        ),
    )


def _training(
    train_steps: int | None,
    train_lr: float | None,
    train_batch_size: int | None,
    optimizer: str | None,
    optimizer_backend: str | None,
    train_settings: tuple[str, ...],
) -> dict[str, Any]:
    named = {
        "steps": train_steps,
        "lr": train_lr,
        "batch_size": train_batch_size,
        "optimizer": optimizer,
        "backend": optimizer_backend,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return _once_each(given, assignments(train_settings, "--train-set"), "--train-set")


def _once_each(by_option: dict[str, Any], assigned: dict[str, Any], option: str) -> dict[str, Any]:
    """Settings from options of their own, and from `option`; raises `BadInput` for a setting given both ways."""
    for name in by_option.keys() & assigned.keys():
        raise BadInput(f"{option} {name}=... is given beside the option for {name}.", "Give one of them.")
    return by_option | assigned


def _objectives(objective: tuple[str, ...]) -> dict[str, float] | None:
    """Parse texts such as `kd` (weight 1) and `feature=0.1` to weights by name; None without texts.

    Raises `BadInput` for a weight that is not a number.
    """
    weights = {}
    for text in objective:
        name, _, weight = text.partition("=")
        try:
            weights[name.strip()] = float(weight or "1")
        except ValueError:
            raise BadInput(f"--objective {text!r} has no number behind the '='.", "Write it like feature=10.") from None
    return weights or None


student = click.option(
    "--student",
    metavar="NAME",
    help="Architecture of the student. Its classes and input channels are fitted to the teacher, or to all teachers "
    "of a merge. half is the architecture of the (first) teacher with half the channels.",
)
student_init = under(
    "Training",
    click.option(
        "--student-init",
        default="auto",
        callback=_nothing,
        show_default=True,
        metavar="auto|none|CHECKPOINT",
        help="Initial weights of the student: a checkpoint, none (random), or auto (layers of the teacher "
        "where it has the same, perhaps deeper, form, and otherwise random).",
    ),
)
objectives = group(
    "objectives",
    _objectives,
    under(
        "Training",
        click.option(
            "--objective",
            multiple=True,
            metavar="NAME[=WEIGHT]",
            help=f"Distillation loss, with its weight. Known: {', '.join(OBJECTIVES)}.",
        ),
    ),
)


def temperature(default: str, usual: float | None = None) -> Decorator:
    """The option `--temperature`; `default`: text for help. `usual`: default value, None where the verb decides."""
    return under(
        "Training",
        click.option(
            "--temperature",
            type=float,
            default=usual,
            show_default=default,
            help="Temperature of the distillation losses. The logits of both models are divided by it.",
        ),
    )


second_recipe = under(
    "Images",
    renamed(
        "--mix",
        "--second-recipe",
        type=click.Choice(["auto", "none", *recipe_names()]),
        default="auto",
        callback=_nothing,
        show_default=True,
        metavar="NAME",
        help="Recipe of the second half of the images. auto is bns where the model has BatchNorm statistics, none "
        "leaves all images to --recipe.",
    ),
)
probe_images = under(
    "Images",
    renamed(
        "--unseen",
        "--probe-images",
        type=click.IntRange(0),
        default=128,
        show_default=True,
        help="Number of probe images (other seed and recipe, never trained on) used to report student-teacher "
        "agreement. With 0 there are none.",
    ),
)
