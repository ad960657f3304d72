"""How far an update moved the policy: closed forms, and that the parts of a rollout join to the whole."""

import math

import pytest
import torch as th

from sb3_ppo_penalty.objectives import drift

LN2 = math.log(2)


def tensor(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def test_k3():
    # r = 1: 0; r = 2: (2 - 1) - ln 2 = 0.3068528; r = 1/2: (1/2 - 1) + ln 2 = 0.1931472
    assert drift.k3_estimate(tensor(0, LN2, -LN2)).item() == pytest.approx(0.5 / 3)
    assert drift.k3_estimate(tensor(LN2)).item() == pytest.approx(0.30685282)


def test_k3_is_never_negative():
    log_ratios = th.cat([-th.logspace(-5, 1, 50), th.zeros(1), th.logspace(-5, 1, 50)])
    for dtype, rounding in ((th.float32, 1e-7), (th.float64, 1e-16)):
        assert min(drift.k3_estimate(x[None]).item() for x in log_ratios.to(dtype)) >= -rounding


def test_k3_is_unbiased():
    # KL(N(0, 1) || N(0.5, 1)) = 0.5^2 / 2 = 0.125
    noise = th.randn(200_000, generator=th.Generator().manual_seed(0), dtype=th.float64)
    log_ratio = th.distributions.Normal(0.5, 1.0).log_prob(noise) - th.distributions.Normal(0.0, 1.0).log_prob(noise)
    terms = th.stack([drift.k3_estimate(part) for part in log_ratio.split(200)])
    error = terms.std().item() / math.sqrt(len(terms))
    assert error < 0.001
    assert drift.k3_estimate(log_ratio).item() == pytest.approx(0.125, abs=4 * error)


@pytest.mark.parametrize(
    ("log_ratio", "fraction"),
    [
        pytest.param([0.0, 0.0, 0.0, 0.0], 1.0, id="ratios of 1"),
        pytest.param([-2.5, -2.5], 1.0, id="equal ratios"),
        pytest.param([0.0, math.log(3)], 0.8, id="weights 1 and 3: 4^2 / (2 * (1 + 9))"),
        pytest.param([100.0, 0.0, 0.0, 0.0], 0.25, id="one outweighs three"),
        pytest.param([100.0, 100.0, 0.0, 0.0], 0.5, id="two outweigh two: e^200 is no float32"),
        pytest.param([-100.0, -100.0, -200.0, -200.0], 0.5, id="the same, tiny"),
        pytest.param([1000.0, -1000.0], 0.5, id="e^1000 is no float at all"),
        pytest.param([7.0], 1.0, id="a single sample"),
    ],
)
def test_effective_sample_size(log_ratio, fraction):
    assert drift.effective_sample_size(th.tensor(log_ratio)).item() == pytest.approx(fraction, rel=1e-6)


def test_drift_in_numbers():
    """
    Ratios 2 and 1/2: k3 = ((2 - 1 - log 2) + (1/2 - 1 + log 2)) / 2 = 1/4; (5/2)^2 / (2 * 17/4) = 25/34.
    """
    found = drift.joined_drift([drift.DriftPart.of(tensor(0.25, 0.75), tensor(2.0, 0.5).log(), 2)])
    assert found == pytest.approx((0.5, 0.25, 25 / 34, 2, 0.75, 0.75))


def test_drift_without_a_known_divergence_is_what_samples_tell():
    found = drift.joined_drift([drift.DriftPart.of(None, tensor(2.0, 0.5).log(), 2)])
    assert (found.kl, found.kl_max_state, found.kl_p99) == (None, None, None)
    assert found[1:4] == pytest.approx((0.25, 25 / 34, 2))


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [300, 300, 400], [5] * 200])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_parts_join_to_the_whole(sizes, scale):
    """The 99th percentile of 1,000 values is the 990th; ties and an infinite one among them."""
    generator = th.Generator().manual_seed(0)
    kl, log_ratio = th.rand(1000, generator=generator) * scale, th.randn(1000, generator=generator)
    kl[::11] = kl[5]
    pairs = zip(kl.split(sizes), log_ratio.split(sizes), strict=True)
    found = drift.joined_drift([drift.DriftPart.of(*pair, 1000) for pair in pairs])
    assert found.kl == pytest.approx(kl.double().mean().item())
    assert found.kl_estimate == pytest.approx(drift.k3_estimate(log_ratio).item(), rel=1e-5)
    assert found.effective_sample_size == pytest.approx(drift.effective_sample_size(log_ratio).item(), rel=1e-5)
    assert found.max_ratio == pytest.approx(log_ratio.max().exp().item())
    assert (found.kl_p99, found.kl_max_state) == (kl.kthvalue(990).values.item(), kl.max().item())
    kl[3] = math.inf
    parts = [drift.DriftPart.of(*pair, 1000) for pair in zip(kl.split(sizes), log_ratio.split(sizes), strict=True)]
    assert drift.joined_drift(parts).kl_max_state == math.inf


@pytest.mark.parametrize(("count", "above"), [(1, 1), (99, 1), (100, 2), (101, 2), (200, 3), (1000, 11)])
def test_the_percentile_is_one_of_the_values(count, above):
    assert drift.count_above_p99(count) == above
