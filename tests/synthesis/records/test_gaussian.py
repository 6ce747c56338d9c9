"""Gaussian records: samples have the mean and the covariance, and what is kept fits."""

from __future__ import annotations

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.gaussian import AUTO_RECORD_BYTES, GaussianAccumulator, GaussianLayer, cholesky

PAIR_OF_4096 = {"fc6": torch.zeros(1, 4096), "fc7": torch.zeros(1, 4096), "logits": torch.zeros(1, 10)}


def recorded(vectors, labels, **options):
    accumulator = GaussianAccumulator({"fc": vectors[:1]}, RecordSettings(**options), int(labels.max()) + 1)
    accumulator.update([vectors], labels, torch.arange(len(vectors)))
    return accumulator


@pytest.mark.parametrize(("covariance", "block"), [("full", 6), ("block:4", 3), ("diagonal", 1)])
def test_samples_have_the_mean_and_the_covariance_of_the_record(covariance, block):
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 6, 6, generator=random)
    labels = torch.arange(4000) % 2
    vectors = torch.einsum("nij,nj->ni", mixing[labels], torch.randn(4000, 6, generator=random)) + 5 * labels[:, None]
    accumulator = recorded(vectors, labels, covariance=covariance)
    layer = GaussianLayer(accumulator.tensors(), "fc")
    many = torch.arange(60_000) % 2
    samples = layer.sample(many, random)
    within = torch.block_diag(*[torch.ones(block, block)] * -(-6 // block))[:6, :6]
    for label in range(2):
        own = samples[many == label]
        expected = vectors[labels == label].T.cov() * within
        scale = expected.diagonal().max()
        torch.testing.assert_close(own.mean(0), vectors[labels == label].mean(0), atol=0.1, rtol=0.02)
        assert (own.T.cov() - expected).abs().max() < 0.05 * scale


def test_pooled_classes_are_one_gaussian():
    vectors, labels = torch.randn(100, 3), torch.arange(100) % 4
    layer = GaussianLayer(recorded(vectors, labels, class_independent=True).tensors(), "fc")
    assert layer.classes == 1
    assert layer.sample(torch.tensor([3, 0, 2]), torch.Generator().manual_seed(0)).shape == (3, 3)


def test_a_process_that_saw_nothing_adds_nothing():
    vectors, labels = torch.randn(40, 5), torch.arange(40) % 2
    accumulator, idle = recorded(vectors, labels), GaussianAccumulator({"fc": vectors[:1]}, RecordSettings(), 2)
    before = accumulator.tensors()
    accumulator.merge(idle.state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in accumulator.tensors().items())


def test_a_singular_covariance_is_factored():
    factor = cholesky(torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))[None])
    torch.testing.assert_close(
        factor[0] @ factor[0].T, torch.diag(torch.tensor([4.0, 0.0, 1.0]).double()), atol=1e-6, rtol=0
    )
    few = torch.randn(5, 40, dtype=torch.float64)
    assert cholesky(few.T.cov()[None]).isfinite().all()


def test_logits_are_divided_by_the_temperature():
    logits = torch.randn(30, 10)
    accumulator = GaussianAccumulator({"logits": logits[:1]}, RecordSettings(kind="top-layer", temperature=4.0), 1)
    accumulator.update([logits], torch.zeros(30, dtype=torch.long), torch.arange(30))
    torch.testing.assert_close(accumulator.tensors()["mean.logits"][0], logits.mean(0) / 4)


def test_a_pair_of_4096_units_fits_by_itself():
    accumulator = GaussianAccumulator(PAIR_OF_4096, RecordSettings(), 10)
    assert accumulator.bytes <= AUTO_RECORD_BYTES
    assert accumulator.memory_bytes < 2 * 2**30
    assert accumulator.covariance.startswith("block:")


def test_convolutions_of_hundreds_of_thousands_of_units_fit_too():
    accumulator = GaussianAccumulator({"conv1": torch.zeros(1, 64, 55, 55), **PAIR_OF_4096}, RecordSettings(), 10)
    assert accumulator.bytes <= AUTO_RECORD_BYTES
    assert accumulator.covariance not in ("full", "diagonal")


def test_what_fits_into_no_memory_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr("dfcompress.synthesis.records.record_file.free_bytes", lambda target: 2**31)
    with pytest.raises(BadInput, match=r"Summing up 8,202 units takes 3\.\d GiB, and there is room for 1\.2"):
        GaussianAccumulator(PAIR_OF_4096, RecordSettings(covariance="full"), 10)


@pytest.mark.parametrize("covariance", ["full", "block:100", "diagonal", "auto"])
def test_the_predicted_bytes_are_those_of_the_tensors(covariance):
    vectors, labels = torch.randn(50, 250), torch.arange(50) % 2
    accumulator = recorded(vectors, labels, covariance=covariance)
    assert accumulator.bytes == sum(tensor.nbytes for tensor in accumulator.tensors().values())
