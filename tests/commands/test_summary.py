"""What summaries print where there are many classes."""

from __future__ import annotations

from dfcompress.commands import _summary


def test_counts_of_few_classes_are_printed_one_by_one(capsys):
    _summary.classes([2, 0, 1])
    assert capsys.readouterr().out == "images of each class: 2 0 1\n"


def test_counts_of_a_thousand_classes_become_least_most_and_how_many_are_empty(capsys):
    _summary.classes([1] * 60 + [4] * 4 + [0] * 936)
    assert capsys.readouterr().out == "images of each class: 0 to 4; 936 of 1000 classes have none\n"
