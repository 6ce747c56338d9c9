"""Sentences about names: the nearest one, and the first of many."""

from __future__ import annotations

import pytest

from dfcompress.errors import listed, unknown


@pytest.mark.parametrize(("name", "remedy"), [("deepinverson", "Did you mean 'deepinversion'?"), ("x", "Known: a")])
def test_an_unknown_name_gets_the_nearest_or_all(name, remedy):
    assert str(unknown("recipe", name, ["a", "deepinversion"])).startswith(f"There is no recipe {name!r}. {remedy}")


def test_the_first_names_are_listed_and_the_others_counted():
    assert listed("abc", 3) == "a, b, c"
    assert listed((f"c{number}" for number in range(1000)), 2, "; ") == "c0; c1 and 998 more"
