"""Classes of several teachers are joined by name."""

from __future__ import annotations

import json

import pytest
from linear_teachers import teacher

from dfcompress.errors import BadInput
from dfcompress.training.class_map import join_classes


def lists(outputs):
    return [own.tolist() for own in outputs.of]


def test_equal_names_become_one_output():
    outputs = join_classes([teacher(("cat", "dog")), teacher(("dog", "ship", "cat"), 3)])
    assert lists(outputs) == [[0, 1], [1, 2, 0]]
    assert (outputs.count, outputs.names) == (3, ("cat", "dog", "ship"))


def test_without_names_classes_are_different_and_in_order():
    outputs = join_classes([teacher(classes=2), teacher(("a", "b", "c"), 3)])
    assert lists(outputs) == [[0, 1], [2, 3, 4]]
    assert (outputs.count, outputs.names) == (5, None)


def test_a_map_names_the_classes(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps([["cat", "dog"], ["dog", "ship"]]))
    outputs = join_classes([teacher(("x", "y")), teacher()], tmp_path / "map.json")
    assert lists(outputs) == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "must hold a list with 2 entries"),
        ('[["a", "b"]]', "must hold a list with 2 entries"),
        ('[["a", "b"], "cd"]', "not a list of names"),
        ('[["a", "b"], ["c"]]', "names 1 classes"),
        ('[["a", "a"], ["c", "d"]]', "two classes of the name 'a'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        join_classes([teacher(), teacher()], tmp_path / "map.json")


def test_a_map_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.json cannot be read: No such file or directory\. It must hold"):
        join_classes([teacher(), teacher()], tmp_path / "nowhere.json")


def test_names_that_differ_in_spelling_alone_are_refused():
    with pytest.raises(BadInput, match=r"'T-shirt' and 't shirt'.*--class-map"):
        join_classes([teacher(("T-shirt", "dog")), teacher(("t shirt", "cat"))])
