"""Every objective and every measure of the ratio on numbers worked by hand."""

import math

import pytest
import torch as th

from sb3_ppo_penalty.objectives import losses

LN2 = math.log(2.0)


def tensor(*values: float, grad: bool = False) -> th.Tensor:
    return th.tensor(values, dtype=th.float64, requires_grad=grad)


def test_advantages_of_three():
    # mean 2; sample variance (1 + 0 + 1) / 2 = 1
    assert losses.normalize_advantages(tensor(1, 2, 3)).tolist() == pytest.approx([-1, 0, 1], abs=1e-7)


def test_the_standard_deviation_is_the_samples():
    # mean 2; (1 + 1) / (2 - 1) = 2, so each is 1 / sqrt(2) from the mean; with n in the denominator it would be 1
    assert losses.normalize_advantages(tensor(1, 3)).tolist() == pytest.approx([-0.70710678, 0.70710678], abs=1e-7)


def test_equal_advantages_become_zero_and_not_nan():
    assert losses.normalize_advantages(tensor(3, 3, 3)).tolist() == [0, 0, 0]


def test_the_guard_of_the_denominator():
    # mean 0, standard deviation 1e-8: 1e-8 / sqrt(2) / (1e-8 + 1e-8) = 0.70710678 / 2
    small = losses.normalize_advantages(tensor(-0.5, 0.5) * 1e-8 * math.sqrt(2))
    assert small.tolist() == pytest.approx([-0.35355339, 0.35355339], abs=1e-7)


def test_a_single_advantage_stays_as_it_is():
    assert losses.normalize_advantages(tensor(5)).tolist() == [5]


def test_ratio():
    # exp(ln 2 - 0), exp(0 - ln 2), exp(-3 + 3)
    ratio = losses.importance_ratio(tensor(LN2, 0, -3), tensor(0, LN2, -3))
    assert ratio.tolist() == pytest.approx([2, 0.5, 1])


def test_gradient_of_the_ratio_is_the_ratio():
    log_prob = tensor(LN2, 0, grad=True)
    losses.importance_ratio(log_prob, tensor(0, LN2)).sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([2, 0.5])


def test_surrogate():
    ratio = tensor(1, 2, 0.5, grad=True)
    objective = losses.surrogate(ratio, tensor(1, -1, 4))
    objective.backward()
    assert objective.item() == pytest.approx(1 / 3)  # (1 - 2 + 2) / 3
    assert ratio.grad.tolist() == pytest.approx([1 / 3, -1 / 3, 4 / 3])


def test_clipped_surrogate():
    ratio = tensor(1.5, 0.5, 1.5, 0.5, 1.1)
    # A > 0: min(1.5, 1.2) = 1.2 and min(0.5, 0.8) = 0.5; A < 0: min(-1.5, -1.2) = -1.5 and min(-0.5, -0.8) = -0.8;
    # inside: 2.2. The mean of 1.2 + 0.5 - 1.5 - 0.8 + 2.2 = 1.6 is 0.32
    assert losses.clipped_surrogate(ratio, tensor(1, 1, -1, -1, 2), 0.2).item() == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        pytest.param(1.5, 2.0, 0.0, id="A > 0, already too likely: nothing more to gain"),
        pytest.param(0.5, 2.0, 2.0, id="A > 0, too unlikely: the way back is open"),
        pytest.param(1.5, -2.0, -2.0, id="A < 0, too likely: the way back is open"),
        pytest.param(0.5, -2.0, 0.0, id="A < 0, already too unlikely: nothing more to gain"),
        pytest.param(1.1, 2.0, 2.0, id="A > 0, inside"),
        pytest.param(0.9, -2.0, -2.0, id="A < 0, inside"),
    ],
)
def test_where_the_clip_takes_the_gradient(ratio, advantage, slope):
    r = tensor(ratio, grad=True)
    losses.clipped_surrogate(r, tensor(advantage), 0.2).backward()
    assert r.grad.item() == slope


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        pytest.param(3.0, 2.0, 3.0, 2.0, id="A > 0, below: the surrogate"),
        pytest.param(3.0, -2.0, 3.0, -2.0, id="A < 0, below: the surrogate"),
        pytest.param(0.0, 2.0, 0.0, 2.0, id="A > 0, so unlikely that the ratio is no float"),
        pytest.param(0.0, -2.0, 0.0, -2.0, id="A < 0, the same"),
        pytest.param(4.0, -2.0, 4.0, -2.0, id="on the edge the slope is not counted twice"),
        pytest.param(4.0, 2.0, 4.0, 2.0, id="A > 0, on the edge: still the surrogate"),
        pytest.param(4 * math.e, 2.0, 4.0, 0.0, id="A > 0, beyond: nothing more to gain"),
        # 4 (1 + ln e) = 8; the slope in log pi is -2 * 4, in the ratio that divided by the ratio
        pytest.param(4 * math.e, -2.0, 8.0, -2 / math.e, id="A < 0, beyond: pushed back with the weight of 4"),
        pytest.param(4e30, -1.0, 4 * (1 + 30 * math.log(10)), -1e-30, id="A < 0, far beyond"),
    ],
)
def test_truncated_ratio(ratio, advantage, value, slope):
    r = tensor(ratio, grad=True)
    truncated = losses.truncate_ratio(r, tensor(advantage), 4.0)
    assert truncated.item() == pytest.approx(value)
    losses.surrogate(truncated, tensor(advantage)).backward()
    assert r.grad.item() == pytest.approx(slope)


def test_an_advantage_of_zero_truncates_as_a_negative_one():
    # 4 (1 + ln e) = 8, and not the 4 that a positive advantage leaves
    assert losses.truncate_ratio(tensor(4 * math.e), tensor(0.0), 4.0).item() == pytest.approx(8.0)


def test_no_state_weighs_more_than_the_truncated_ratio():
    """The gradient in log pi is at most c |A|, as V-trace's and ACER's weights have it, whatever the ratio."""
    log_prob = th.linspace(-20, 60, 161, dtype=th.float64).repeat(2).requires_grad_()
    advantages = th.cat([th.full((161,), -3.0), th.full((161,), 3.0)]).double()
    ratio = losses.importance_ratio(log_prob, th.zeros(322, dtype=th.float64))
    (losses.truncate_ratio(ratio, advantages, 10.0) * advantages).sum().backward()
    weights = log_prob.grad / advantages
    # e^2 is the last ratio of the row below 10, e^2.5 the first above
    assert weights.max().item() == pytest.approx(10.0)
    assert weights[:161][-1].item() == pytest.approx(10.0)
    assert weights[161:].max().item() == pytest.approx(math.exp(2))
    assert weights[161:][-1].item() == 0.0
    assert weights.min().item() >= 0


def test_truncation_bounds_what_the_clip_leaves_open():
    ratio, advantages = tensor(100, 100, 1.1, 0.5), tensor(1, -1, -1, -1)
    # A > 0: the clip's 1.2; A < 0: -4 (1 + ln 25) instead of -100; inside: -1.1; the clip's -0.8
    assert losses.clipped_surrogate(ratio, advantages, 0.2).item() == pytest.approx((1.2 - 100 - 1.1 - 0.8) / 4)
    truncated = losses.truncate_ratio(ratio, advantages, 4.0)
    expected = (1.2 - 16.8755033 - 1.1 - 0.8) / 4
    assert losses.clipped_surrogate(truncated, advantages, 0.2).item() == pytest.approx(expected)


def test_penalized_surrogate():
    # J = 0.5 minus 2 times the mean of 0.01 and 0.03, which is 0.02
    assert losses.penalized_surrogate(tensor(0.5)[0], tensor(0.01, 0.03), 2.0).item() == pytest.approx(0.46)


def test_gradient_of_the_penalized_surrogate():
    theta = tensor(0.2, 0.4, grad=True)
    objective = losses.penalized_surrogate(theta.mean(), theta.square(), 3.0)
    objective.backward()
    # 1/2 - 3 * 2 theta / 2 = 0.5 - 3 theta
    assert theta.grad.tolist() == pytest.approx([-0.1, -0.7])


def test_a_coefficient_of_zero_leaves_the_surrogate():
    assert losses.penalized_surrogate(tensor(0.5)[0], tensor(7, 9), 0.0).item() == 0.5


@pytest.mark.parametrize(
    ("kl", "per_state", "cost", "slopes"),
    [
        # target 0.01, so that 0.02 is free
        pytest.param([0.02, 0.0], False, 0.0, [0.0, 0.0], id="the mean is inside"),
        pytest.param([0.02, 0.0], True, 0.0, [0.0, 0.0], id="every state is inside"),
        pytest.param([0.04, 0.0], False, 0.0, [0.0, 0.0], id="one state far out, the mean on the edge"),
        # (0.04 - 0.02)^2 / 2; its slope 2 * 0.02 / 2
        pytest.param([0.04, 0.0], True, 0.0002, [0.02, 0.0], id="the same, per state"),
        # mean 0.05: 0.03^2; its slope 2 * 0.03 / 2 for each
        pytest.param([0.07, 0.03], False, 0.0009, [0.03, 0.03], id="the mean is outside"),
        # the squares of 0.05 and 0.01, halved
        pytest.param([0.07, 0.03], True, 0.0013, [0.05, 0.01], id="both are outside"),
    ],
)
def test_quadratic_cutoff(kl, per_state, cost, slopes):
    divergence = tensor(*kl, grad=True)
    cutoff = losses.quadratic_cutoff(divergence, 0.01, per_state)
    cutoff.backward()
    assert cutoff.item() == pytest.approx(cost, abs=1e-15)
    assert divergence.grad.tolist() == pytest.approx(slopes, abs=1e-15)


@pytest.mark.parametrize("own", [{}, {"squared_error": losses.mean_square}], ids=["PPO's", "RecurrentPPO's"])
def test_value_loss(own):
    values = tensor(1, 2, grad=True)
    loss = losses.value_loss(values, tensor(2, 4), tensor(0, 0), **own)
    loss.backward()
    assert loss.item() == pytest.approx(2.5)  # (1 + 4) / 2
    assert values.grad.tolist() == pytest.approx([-1, -2])  # 2 (V - R) / 2


def test_clipped_value_loss():
    values = tensor(1, 2, -3, grad=True)
    loss = losses.value_loss(values, tensor(2, 4, 0), tensor(0, 2, -2), clip_range_vf=0.5)
    loss.backward()
    # predictions 0 + 0.5, 2 + 0, -2 - 0.5: (1.5^2 + 2^2 + 2.5^2) / 3 = 12.5 / 3
    assert loss.item() == pytest.approx(12.5 / 3)
    # the two clipped ones have no gradient; 2 (2 - 4) / 3 for the other
    assert values.grad.tolist() == pytest.approx([0, -4 / 3, 0])


def test_entropy_loss():
    entropy = tensor(1, 3, grad=True)
    loss = losses.entropy_loss(entropy, tensor(9, 9))
    loss.backward()
    assert loss.item() == -2
    assert entropy.grad.tolist() == [-0.5, -0.5]


def test_entropy_loss_without_a_closed_form():
    log_prob = tensor(-1, -4, grad=True)
    loss = losses.entropy_loss(None, log_prob)
    loss.backward()
    assert loss.item() == -2.5  # the entropy is estimated as (1 + 4) / 2
    assert log_prob.grad.tolist() == [0.5, 0.5]


def test_clip_fraction():
    # 0.3 above and 0.3 below are outside 0.2; 0.1, 0.15 and 0 are not
    assert losses.clip_fraction(tensor(1.3, 1.1, 0.7, 0.85, 1.0), 0.2).item() == pytest.approx(0.4)


def test_clip_fraction_does_not_count_the_edge():
    assert losses.clip_fraction(tensor(1.25, 0.75, 1.5, 1.0), 0.25).item() == 0.25


def test_clip_fraction_without_a_clip_counts_against_a_fifth():
    assert losses.clip_fraction(tensor(1.25, 1.15, 0.75, 0.85), None).item() == 0.5


def test_squared_ratio_deviation():
    # Half the squares of 0, -1/2 and 2
    assert losses.squared_ratio_deviation(th.tensor([1.0, 0.5, 3.0])).tolist() == [0.0, 0.125, 2.0]


def test_squared_ratio_deviation_is_the_kl_to_second_order():
    """A mean that moves by 0.05 deviations: KL = 0.05^2 / 2; half the chi-squared divergence is (exp(0.05^2) - 1) / 2."""
    actions = th.randn(4_000_000, generator=th.Generator().manual_seed(0), dtype=th.float64)
    ratio = th.exp(0.05 * actions - 0.05**2 / 2)
    assert losses.squared_ratio_deviation(ratio).mean().item() == pytest.approx(0.00125, rel=0.01)


@pytest.mark.parametrize("advantage", [0.01, -1.0, 7.0])
def test_the_weighted_deviation_is_best_at_one_ratio_for_all_advantages(advantage):
    """b = 5: the objective r A - b |A| (r - 1)^2 / 2 has its maximum at 1 + sign(A) / 5."""
    ratio = th.tensor(1 + 0.2 * (1 if advantage > 0 else -1), dtype=th.float64, requires_grad=True)
    objective = ratio * advantage - 5 * abs(advantage) * losses.squared_ratio_deviation(ratio)
    assert th.autograd.grad(objective, ratio)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_entropy_of_a_state_is_known_or_estimated() -> None:
    log_prob = th.tensor([-1.0, 2.0])
    assert losses.state_entropy(th.tensor([0.5, 0.25]), log_prob).tolist() == [0.5, 0.25]
    assert losses.state_entropy(None, log_prob).tolist() == [1.0, -2.0]
