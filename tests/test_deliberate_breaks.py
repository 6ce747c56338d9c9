"""The list of deliberate breaks fits the code: each of its lines is there once."""

from __future__ import annotations

from pathlib import Path

import pytest
from deliberate_breaks import BREAKS

import dfcompress


@pytest.mark.release
@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.what)
def test_the_line_that_is_broken_is_there_once(each):
    each.require_its_place(Path(dfcompress.__file__).parent)
