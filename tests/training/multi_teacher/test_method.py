"""Every merging method: found by its names, and teaching a student that tells all teachers' classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from linear_teachers import batch_of, images, teacher
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.run import FORMER_VALUES
from dfcompress.training import multi_teacher
from dfcompress.training.class_map import join_classes
from dfcompress.training.loop import Trainer
from dfcompress.training.multi_teacher import ALIASES, METHODS, NAMES, merging_method, method_name
from dfcompress.training.settings import Training

EAGER = Compute(device="cpu", precision="fp32", compile="off")


def test_every_file_of_the_folder_is_a_method_and_every_name_leads_to_one():
    files = {path.stem for path in Path(multi_teacher.__file__).parent.glob("*.py")} - {"__init__", "method"}
    assert {name.replace("-", "_") for name in METHODS} == files
    assert set(NAMES) == {*METHODS, *ALIASES}
    assert FORMER_VALUES["merge", "method"] == ALIASES
    for alias, name in ALIASES.items():
        assert merging_method(alias) is merging_method(name)
        assert method_name(alias) == method_name(name) == name


def test_unknown_methods_are_refused():
    with pytest.raises(BadInput, match=r"no merging method 'logits'.*logit-matching"):
        merging_method("logits")


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_two_teachers_of_different_input_sizes(method):
    """Teacher 1 knows dark images' halves, teacher 2 bright ones'; the student tells all four."""
    size = (1, 4, 4)
    teachers = [teacher(name="a", size=size, seed=1), teacher(name="b", size=(1, 2, 2), seed=2)]
    sets = [images(1, size) // 2, 127 + images(2, size) // 2]
    outputs = join_classes(teachers)
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    student = Classifier(network, ModelCard("tiny", 4, size, (0.5,), (0.25,)))
    distiller = merging_method(method).distiller(teachers, outputs)
    training = Training(steps=600, lr=0.1, batch_size=64)
    trained = Trainer(student, distiller, training, compute=EAGER).fit(training.pool(*sets, seed=0))
    assert trained.steps == 600
    with torch.no_grad():
        for number, some in enumerate(sets):
            shown = some.float() / 255
            answer = student(shown).argmax(1)
            targets = distiller.targets(batch_of(shown, torch.zeros(len(shown))))[number]
            assert (answer // 2 == number).float().mean() > 0.95
            assert (answer == outputs.of[number][targets.argmax(1)]).float().mean() > 0.85
