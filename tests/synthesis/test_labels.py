"""Labels: balanced, random, listed, of some classes only."""

from __future__ import annotations

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.synthesis.labels import choose_labels
from dfcompress.synthesis.recipe import Synthesis, choose_recipe

CARD = ModelCard("net", 4, (3, 8, 8), (0.5,) * 3, (0.2,) * 3, class_names=("cat", "dog", "emu", "fox"))


def test_balanced_labels_go_round_over_batches():
    labels = choose_labels("balanced", (), CARD)
    both = torch.cat([labels.of_batch(0, 6, seed=0), labels.of_batch(1, 6, seed=0)])
    assert both.tolist() == [0, 1, 2, 3] * 3


def test_classes_are_numbers_or_names():
    assert choose_labels("balanced", ("3", "dog"), CARD).of_batch(0, 4, seed=0).tolist() == [3, 1, 3, 1]


def test_random_labels_depend_on_seed_and_batch_and_stay_among_the_classes():
    labels = choose_labels("random", ("1", "2"), CARD)
    drawn = labels.of_batch(0, 200, seed=0)
    assert set(drawn.tolist()) == {1, 2}
    assert torch.equal(drawn, labels.of_batch(0, 200, seed=0))
    assert not torch.equal(drawn, labels.of_batch(1, 200, seed=0))
    assert not torch.equal(drawn, labels.of_batch(0, 200, seed=1))


def test_listed_labels_come_in_their_order(tmp_path):
    (tmp_path / "list.txt").write_text("3 fox\n0 dog 2\n")
    assert choose_labels(str(tmp_path / "list.txt"), (), CARD).of_batch(0, 5, seed=0).tolist() == [3, 3, 0, 1, 2]


@pytest.mark.parametrize(
    ("how", "classes", "message"),
    [
        ("balanced", ("4",), "no class '4'"),
        ("balanced", ("cow",), "no class 'cow'"),
        ("nowhere.txt", (), "no file that can be read"),
    ],
)
def test_what_is_no_class_is_refused(how, classes, message):
    with pytest.raises(BadInput, match=message):
        choose_labels(how, classes, CARD)


def test_recipes_without_labels_take_no_classes():
    with pytest.raises(BadInput, match="towards no class"):
        choose_recipe(Synthesis(recipe="bns", classes=("1",)), CARD, None)
