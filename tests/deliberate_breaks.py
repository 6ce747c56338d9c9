"""Is a fault noticed? One line of a copy of the package is broken at a time, and the tests that must fail are run.

    python tests/deliberate_breaks.py                  # all, with a table; 15 minutes of one core
    python tests/deliberate_breaks.py kl packed        # those whose description has one of these words

A break that no test notices is a hole in the tests, and ends the program with exit code 1. A line that is no longer
there once, or tests that do not run, end it at once: then this list has to be mended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
FAILED = 1  # How pytest ends where tests ran and some failed.


class Break(NamedTuple):
    """`sound`, which the `file` holds once, becomes `broken`; `tests` are the arguments of pytest."""

    what: str
    file: str
    sound: str
    broken: str
    tests: str

    def require_its_place(self, package: Path) -> str:
        """The text of the file; raise where the line is not there, or more than once, or a file of tests is gone."""
        text = file.read_text() if (file := package / self.file).exists() else ""
        if (count := text.count(self.sound)) != 1:
            raise SystemExit(f"{self.what}: {self.file} holds {self.sound!r} {count} times. Mend the list of breaks.")
        if not (REPOSITORY / self.tests.split()[0]).exists():
            raise SystemExit(f"{self.what}: {self.tests} is gone. Mend the list of breaks.")
        return text


BREAKS = [
    # Generators and their losses.
    Break(
        "images on which the student errs count too",
        "synthesis/generator_losses.py",
        "trace.logits.argmax(1) == trace.student_logits.argmax(1)",
        "trace.logits.argmax(1) == trace.logits.argmax(1)",
        "tests/synthesis/test_generator_losses.py -k disagreement",
    ),
    Break(
        "contrast looks at the batch in work as if it were another one",
        "synthesis/generator_losses.py",
        "looked_at = self.filled * (torch.arange(slots, device=slot.device) != slot)",
        "looked_at = self.filled * 1",
        "tests/synthesis/test_generator_losses.py -k contrast_tells",
    ),
    Break(
        "the kernel of doubled maps is not turned",
        "synthesis/generators.py",
        "F.pad(weight.flip(2, 3).transpose(0, 1)",
        "F.pad(weight.transpose(0, 1)",
        "tests/synthesis/test_generators.py -k transposed",
    ),
    Break(
        "a generator that goes on learning begins anew with every batch",
        "synthesis/generators.py",
        "if not self._weights:",
        "if True:",
        "tests/synthesis/test_generators.py -k same_memory",
    ),
    # Faults that earlier versions had, or that were tried on them by hand.
    Break(
        "dropout stays on under repair",
        "training/steps.py",
        "student.train(not repair)",
        "student.train(True)",
        "tests/training/test_loop.py -k trains_as_if_it_had_no_random_layer",
    ),
    Break(
        "a dead channel's variance is taken without eps",
        "models/trace.py",
        "self.var.clamp_min(0) + eps + self.lack",
        "self.var.clamp_min(0) + eps",
        "tests/models/test_trace.py -k dead_channel",
    ),
    Break(
        "what a hook keeps is an alias, not a copy",
        "models/hooks.py",
        "output.to(dtype or output.dtype, copy=True)",
        "output.to(dtype or output.dtype)",
        "tests/models/test_hooks.py",
    ),
    Break(
        "a shard that is made again has the labels of the first",
        "synthesis/set_builder.py",
        "self.labels.of_batch(batch, self.batch_size",
        "self.labels.of_batch(0, self.batch_size",
        "tests/verbs/test_invert.py -k balanced_labels",
    ),
    Break(
        "wrong sign in the KL",
        "models/trace.py",
        "measured.log()) - 0.5 * (1 - ratio)",
        "measured.log()) + 0.5 * (1 - ratio)",
        "tests/synthesis/test_losses.py -k divergence",
    ),
    Break(
        "the gradient of LSQ's steps is not scaled",
        "models/grids.py",
        "(shared * larger_end) ** -0.5",
        "(shared * larger_end) ** 0.0",
        "tests/models/test_grids.py -k gradient",
    ),
    Break(
        "zero points of weights are ignored when unpacked",
        "models/packing.py",
        "torch.zeros(count, dtype=torch.int32) if symmetric else next(zero_points)",
        "torch.zeros(count, dtype=torch.int32)",
        "tests/models/test_packing.py -k unpacked",
    ),
    # Synthesis.
    Break(
        "inception rises where it should fall",
        "synthesis/losses.py",
        "(-intended / scale).exp()",
        "(intended / scale).exp()",
        "tests/synthesis/test_losses.py -k inception",
    ),
    Break(
        "a diagonal of total variation points elsewhere",
        "synthesis/losses.py",
        "images[..., 1:, :-1] - images[..., :-1, 1:]",
        "images[..., 1:, :-1] - images[..., :-1, :-1]",
        "tests/synthesis/test_losses.py -k total_variation",
    ),
    Break(
        "the competing student is not softened",
        "synthesis/losses.py",
        "(trace.student_logits / temperature)",
        "(trace.student_logits)",
        "tests/synthesis/test_losses.py -k competition",
    ),
    Break(
        "the analytic backward forgets the running mean",
        "models/recorder.py",
        "of_mean * (1 / positions) - slope * running_mean",
        "of_mean * (1 / positions)",
        "tests/models/test_recorder.py -k hooks",
    ),
    Break(
        "all shards start from the same noise",
        "synthesis/synthesizer.py",
        'generator("noise", self.seed, shard)',
        'generator("noise", self.seed, 0)',
        "tests/synthesis/test_synthesizer.py -k noise_of_its_own",
    ),
    Break(
        "synthesis resumes with an optimiser of its own",
        "synthesis/batch_state.py",
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "tests/synthesis/test_synthesizer.py -k taken_up",
    ),
    Break(
        "a chunk forgets the rest of its batch",
        "models/trace.py",
        "return self.share * own + self.means[name] if name in self.means else own",
        "return own",
        "tests/synthesis/test_objective.py -k chunks_have_the_loss",
    ),
    Break(
        "random labels are those of the first batch",
        "synthesis/labels.py",
        'generator("labels", seed, batch)',
        'generator("labels", seed, 0)',
        "tests/synthesis/test_labels.py",
    ),
    Break(
        "the rate does not fall",
        "schedules.py",
        'schedule == "cosine"',
        'schedule == "cosinus"',
        "tests/test_schedules.py",
    ),
    # Training.
    Break(
        "every epoch has the same order",
        "data/pool.py",
        'generator("epoch", *self._key(number, epoch))',
        'generator("epoch", *self._key(number, 0))',
        "tests/data/test_pool.py",
    ),
    Break(
        "a training resumes without its momentum",
        "training/steps.py",
        'self._optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "tests/training/test_loop.py -k ends_between",
    ),
    Break(
        "kd is not multiplied by the temperature squared",
        "training/objectives.py",
        'reduction="batchmean") * temperature**2',
        'reduction="batchmean") * temperature',
        "tests/training/test_objectives.py -k kd",
    ),
    Break(
        "a name that two teachers share gets two outputs",
        "training/class_map.py",
        "places.setdefault(name, len(places))",
        "places[name] = len(places)",
        "tests/training/test_class_map.py -k name",
    ),
    Break(
        "the gradient of shared statistics is not shared",
        "training/parallel.py",
        "return mean(gradients[0].clone(), world())",
        "return gradients[0].clone() * 0",
        "tests/test_distributed.py -k statistics_of_a_shared_batch",
    ),
    # Quantization.
    Break(
        "packed bits are in the other order",
        "models/packing.py",
        'np.packbits(stream, bitorder="little")',
        'np.packbits(stream, bitorder="big")',
        "tests/models/test_packing.py -k pack",
    ),
    Break(
        "ranges are of whole batches, not of chunks of 16 images",
        "quantization/observers/minmax.py",
        ".split(CHUNK, dim=1)",
        ".split(10**6, dim=1)",
        "tests/quantization/test_ranges.py -k chunks",
    ),
    Break(
        "a bias is corrected the wrong way",
        "quantization/bias_correction.py",
        "(teacher_mean - channel_moments(layer, output)[0])",
        "(channel_moments(layer, output)[0] - teacher_mean)",
        "tests/quantization/test_bias_correction.py",
    ),
    Break(
        "learnt rounding settles on the other integer",
        "quantization/reconstruction.py",
        "(self.V > 0)",
        "(self.V < 0)",
        "tests/quantization/test_reconstruction.py -k ends_on_one",
    ),
    # What the user meets.
    Break(
        "a missed gate ends as any failure",
        "errors.py",
        "exit_code = 3",
        "exit_code = 1",
        "tests/test_commands.py -k gates",
    ),
    Break(
        "the file's general values win over those of the command",
        "commands/_config.py",
        "{**everywhere, **tables.get(command, {})}",
        "{**tables.get(command, {}), **everywhere}",
        "tests/test_commands.py -k beats_the_environment",
    ),
    Break(
        "a pickle may ask for eval",
        "models/pickle_machine.py",
        '"builtins": "bool bytearray',
        '"builtins": "eval exec bool bytearray',
        "tests/models/test_pickle_machine.py -k a_program_is_refused",
    ),
    Break(
        "a file has its name before it is whole",
        "run.py",
        'path.with_name(f".{path.name}.tmp")',
        "path",
        "tests/test_run.py -k whole",
    ),
    Break(
        "the last unit of work is given to no process",
        "distributed.py",
        'self._ask("add", key, 1)) <= len(units)',
        'self._ask("add", key, 1)) < len(units)',
        "tests/test_distributed.py -k two_processes_make_the_shards",
    ),
]


def is_caught(each: Break, copy: Path) -> bool:
    """Whether a test fails while the line is broken."""
    file = copy / "dfcompress" / each.file
    text = each.require_its_place(copy / "dfcompress")
    file.write_text(text.replace(each.sound, each.broken))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {"OMP_NUM_THREADS": "1", "DFCOMPRESS_TEST_DATA": str(DATA), **os.environ, "PYTHONPATH": str(copy)}
    try:
        files, _, words = each.tests.partition(" -k ")
        chosen = [*files.split(), *(["-k", words] if words else [])]
        done = subprocess.run(
            [*command, *chosen], cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        file.write_text(text)
    if done.returncode not in (0, FAILED):
        raise SystemExit(f"{each.what}: {each.tests} does not run.\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == FAILED


def main(words: list[str]) -> int:
    chosen = [each for each in BREAKS if not words or any(word in each.what for word in words)]
    for each in chosen:
        each.require_its_place(REPOSITORY / "dfcompress")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("dfcompress", "tests", "docs"):
            shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(REPOSITORY / name, copy)
        for each in chosen:
            started = time.perf_counter()
            caught = is_caught(each, copy)
            missed += not caught
            seconds = time.perf_counter() - started
            sys.stdout.write(f"{'caught' if caught else 'MISSED'}  {seconds:4.0f} s  {each.what}  ({each.tests})\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - missed} of {len(chosen)} breaks are caught\n")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
