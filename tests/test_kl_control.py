"""The controller's rule on numbers: it needs neither torch nor an environment."""

import math

import pytest

from sb3_ppo_penalty.kl_control import clamp, kl_thresholds, next_kl_coef


def test_the_papers_band():
    # 0.03 / 1.5 = 0.02, 0.03 * 1.5 = 0.045
    assert kl_thresholds(0.03) == pytest.approx((0.02, 0.045))


def test_given_thresholds_come_first():
    assert kl_thresholds(0.03, kl_min=0.001) == pytest.approx((0.001, 0.045))
    assert kl_thresholds(0.03, kl_max=0.5) == pytest.approx((0.02, 0.5))
    assert kl_thresholds(0.03, kl_min=0.0, kl_max=0.5) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        pytest.param(0.0201, 8.0, id="above: raised"),
        pytest.param(0.02, 4.0, id="the upper edge rests"),
        pytest.param(0.01, 4.0, id="inside rests"),
        pytest.param(0.005, 4.0, id="the lower edge rests"),
        pytest.param(0.0049, 2.0, id="below: lowered"),
        pytest.param(0.0, 2.0, id="a policy that did not move"),
        pytest.param(1e300, 8.0, id="very far"),
        pytest.param(math.inf, 4.0, id="infinite: says nothing"),
        pytest.param(-math.inf, 4.0, id="minus infinite: says nothing"),
        pytest.param(math.nan, 4.0, id="nan: says nothing"),
    ],
)
def test_next_coefficient(kl, expected):
    assert next_kl_coef(4.0, kl, kl_min=0.005, kl_max=0.02, factor=2.0) == expected


def test_the_factor_is_the_one_given():
    assert next_kl_coef(1.0, 1.0, 0.1, 0.2, factor=1.5) == 1.5
    assert next_kl_coef(3.0, 0.0, 0.1, 0.2, factor=1.5) == 2.0


def test_up_and_down_again():
    assert next_kl_coef(next_kl_coef(0.7, 1.0, 0.1, 0.2, 1.5), 0.0, 0.1, 0.2, 1.5) == pytest.approx(0.7)


def test_equal_thresholds_rest_on_the_target_alone():
    assert [next_kl_coef(1.0, kl, 0.1, 0.1, 2.0) for kl in (0.09, 0.1, 0.11)] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("kl_coef", "expected"),
    [(0.5, 0.5), (0.1, 0.1), (10.0, 10.0), (0.01, 0.1), (11.0, 10.0), (math.inf, 10.0), (0.0, 0.1), (-math.inf, 0.1)],
)
def test_clamp(kl_coef, expected):
    assert clamp(kl_coef, (0.1, 10.0)) == expected


def test_equal_bounds_hold_the_coefficient():
    assert [clamp(kl_coef, (2.0, 2.0)) for kl_coef in (1.0, 2.0, 4.0)] == [2.0, 2.0, 2.0]


def test_the_coefficient_comes_back_from_a_bound():
    kl_coef = 1.0
    for _ in range(50):
        kl_coef = clamp(next_kl_coef(kl_coef, 9.0, 0.005, 0.02, 2.0), (1e-3, 1e3))
    assert kl_coef == 1000.0
    assert clamp(next_kl_coef(kl_coef, 0.0, 0.005, 0.02, 2.0), (1e-3, 1e3)) == 500.0
