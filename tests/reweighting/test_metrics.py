"""What is reported about weights and domains, against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rw.reweighting import DomainLosses, Weighting, WeightMetrics
from tests.reweighting import oracle
from tests.reweighting.test_reweighter import SAMPLES, micro_batch, weigh

DOMAINS = 4  # the fourth occurs in no batch


def test_report_over_two_sets_is_the_sum_done_by_hand() -> None:
    metrics = WeightMetrics(DOMAINS)
    assert metrics.read() is None
    batches = [micro_batch(seed, torch.float32) for seed in (0, 1)]
    for losses, mask, domain in batches:
        metrics.add(weigh("linupper", losses, mask, domain).weighted)
    report = metrics.read()
    assert report is not None

    every = []
    for losses, mask, domain in batches:
        sample = oracle.sample_losses(losses.tolist(), mask.tolist())
        active = [loss is not None for loss in sample]
        how = Weighting(strategy="linupper", temperature=0.4)
        w = oracle.weights([loss or 0.0 for loss in sample], how, active)
        tokens, sums = mask.sum(1).tolist(), (losses * mask).sum(1).tolist()
        every.append((sample, w, tokens, sums, domain.tolist()))

    used = [[x for x in sample if x is not None] for sample, *_ in every]
    ess = [1 / sum(v * v for v in w) for _, w, *_ in every]
    assert report.objective == pytest.approx(
        sum(v * (x or 0) for s, w, *_ in every for v, x in zip(w, s, strict=True)) / 2, rel=1e-5
    )
    assert report.ess == pytest.approx(sum(ess) / sum(map(len, used)), rel=1e-5)
    assert report.max_weight == pytest.approx(max(max(w) for _, w, *_ in every), rel=1e-5)
    assert report.relative_max_weight == pytest.approx(
        sum(len(u) * max(w) for u, (_, w, *_) in zip(used, every, strict=True)) / 2, rel=1e-5
    )
    assert report.over_bound == pytest.approx(
        sum(len(u) * max(w) > 2 for u, (_, w, *_) in zip(used, every, strict=True)) / 2
    )
    assert report.set_size == SAMPLES - 1  # one sample has no active token
    assert report.nonfinite_samples == 0
    assert report.sample_loss_min == pytest.approx(min(map(min, used)), rel=1e-6)
    assert report.sample_loss_max == pytest.approx(max(map(max, used)), rel=1e-6)

    for index in range(3):
        rows = [
            (v, x, n, t)
            for sample, w, tokens, sums, domain in every
            for v, x, n, t, d in zip(w, sample, tokens, sums, domain, strict=True)
            if d == index and x is not None
        ]
        domain_report = report.domains[index]
        assert domain_report.weight_share == pytest.approx(sum(r[0] for r in rows) / 2, rel=1e-5)
        assert domain_report.lm_loss == pytest.approx(
            sum(r[3] for r in rows) / sum(r[2] for r in rows), rel=1e-5
        )
        assert domain_report.sample_share == pytest.approx(len(rows) / sum(map(len, used)))
    assert report.domains[3].lm_loss is None
    assert report.domains[3].ess is None
    assert report.domains[3].weight_share == 0
    assert sum(d.weight_share for d in report.domains) == pytest.approx(1)


def test_domain_ess_is_one_under_uniform_weights() -> None:
    metrics = WeightMetrics(3)
    losses, mask, domain = micro_batch(0, torch.float32)
    metrics.add(weigh("uniform", losses, torch.ones_like(mask), domain).weighted)
    report = metrics.read()
    assert report is not None
    assert report.ess == pytest.approx(1)
    assert [d.ess for d in report.domains] == pytest.approx([1, 1, 1])


def test_nonfinite_samples_are_counted_and_leave_the_sums_finite() -> None:
    losses, mask, domain = micro_batch(0, torch.float32)
    losses[0, 0], mask[0, 0] = math.nan, 1
    metrics = WeightMetrics(3)
    metrics.add(weigh("linupper", losses, mask, domain).weighted)
    report = metrics.read()
    assert report is not None
    assert report.nonfinite_samples == 1
    assert math.isfinite(report.objective)
    assert all(math.isfinite(d.lm_loss) for d in report.domains if d.lm_loss is not None)


def test_domain_losses_are_token_means_and_restart() -> None:
    losses = DomainLosses(3)
    assert losses.read(None).by_domain == [None, None, None]
    domain = torch.tensor([0, 0, 2])
    losses.add(torch.tensor([4.0, 6.0, 9.0]), torch.tensor([2.0, 3.0, 3.0]), domain)
    losses.add(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]), domain)
    kept = losses.read(None, reset=False)
    assert kept == losses.read(None)
    assert kept.by_domain == [2.0, None, 3.0]
    assert kept.overall == pytest.approx(24 / 10)
    assert losses.read(None).overall is None
