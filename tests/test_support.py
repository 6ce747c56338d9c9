"""The table of supported networks: a row is what a network goes through, and the page is made of rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def support():
    """docs/measure_support.py as a module."""
    sys.path.insert(0, str(DOCS))
    try:
        found = importlib.util.spec_from_file_location("measure_support", DOCS / "measure_support.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


@pytest.fixture
def small(monkeypatch, support):
    """Networks at 32 pixels, and 8 bits alone: what takes long is the export of each."""
    monkeypatch.setattr(support, "SIDE", 32)
    monkeypatch.setattr(support, "BITS", ("8w8a",))


@pytest.mark.parametrize(
    "name", [pytest.param("torchvision:shufflenet_v2_x0_5", marks=pytest.mark.release), "timm:test_resnet"]
)
def test_a_row_says_that_a_network_works(name, small, support):
    pytest.importorskip("onnxruntime")
    made = support.row(name)
    assert made["8w8a"] == "works"
    assert made["side"] == 32
    assert made["parameters"] > 300_000


def test_a_row_says_where_a_network_stops_and_why(support):
    """AlexNet has no BatchNorm and no patches: nothing can be made from it."""
    made = support.row("torchvision:alexnet")
    assert made["4w4a"].startswith("inspect: ")
    assert "no BatchNorm layer" in made["4w4a"]


def test_batchnorms_remember_the_images_that_pass(support):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    support.remember(network, 16)
    assert network[1].running_mean.abs().min() > 0
    assert not torch.equal(network[1].running_var, torch.ones(4))
    assert not network[1].training


def test_the_page_has_a_line_for_every_row_and_counts_what_works(tmp_path, support):
    rows = support.Rows(tmp_path)
    names = ["torchvision:resnet18", "timm:a", "timm:b", "timm:c"]
    rows.make(
        lambda: {"8w8a": "works", "4w4a": "works", "seconds": 3.2, "recognised": "a", "side": 96}, network="timm:a"
    )
    rows.make(lambda: {"8w8a": "works", "4w4a": "quantize: no", "seconds": 9, "recognised": ""}, network="timm:b")
    rows.make(lambda: {"half pruned": "works", "seconds": 5}, pruned="timm:a")
    page = support.page(names, rows, "2026-01-01")
    assert "| `a` |  | 96 | yes | works | works | works | 3 |" in page
    assert "| `b` |  |  | no | works | quantize: no |  | 9 |" in page
    assert "2 of 3 networks are measured, and 1 of these work; 1 were pruned by half, and 1 of these work." in page
    support.forget(rows, lambda made: made.get("4w4a") != "works")
    assert [made["network"] for made in support.Rows(tmp_path).made if "network" in made] == ["timm:a"]
