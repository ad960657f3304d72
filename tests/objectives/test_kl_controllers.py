"""The KL controllers on plain numbers; torch is here only as an oracle for Adam."""

import math
import pickle

import numpy as np
import pytest
import torch as th

from sb3_ppo_penalty.objectives.kl_controllers import (
    AdaptiveRule,
    DualAscent,
    FixedCoefficient,
    KLReading,
    Proportional,
    clamp,
    kl_band,
    make_controller,
    next_kl_coef,
    relative_kl,
)


def reading(kl: float, kl_coef: float = 1.0, target_kl: float = 0.01, factor: float = 2.0) -> KLReading:
    return KLReading(kl_coef, kl, target_kl, kl_min=target_kl / 2, kl_max=target_kl * 2, factor=factor)


def test_the_papers_band():
    # 0.03 / 1.5 = 0.02, 0.03 * 1.5 = 0.045
    assert kl_band(0.03) == pytest.approx((0.02, 0.045))


def test_given_thresholds_come_first():
    assert kl_band(0.03, kl_min=0.001) == pytest.approx((0.001, 0.045))
    assert kl_band(0.03, kl_max=0.5) == pytest.approx((0.02, 0.5))
    assert kl_band(0.03, kl_min=0.0, kl_max=0.5) == (0.0, 0.5)


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


# --- the controllers


def test_the_adaptive_rule_as_a_controller():
    rule = AdaptiveRule()
    # the thresholds of `reading` are 0.005 and 0.02
    assert [rule(reading(kl, 4.0)) for kl in (0.021, 0.02, 0.01, 0.005, 0.0049)] == [8.0, 4.0, 4.0, 4.0, 2.0]
    assert rule(reading(1.0, factor=1.5)) == 1.5


def test_a_fixed_coefficient_stays():
    assert [FixedCoefficient()(reading(kl, 3.7)) for kl in (0.0, 0.01, 1e9)] == [3.7] * 3


@pytest.mark.parametrize(
    ("kl", "exponent", "factor", "expected"),
    [
        pytest.param(0.01, 0.5, 2.0, 1.0, id="on the target: rests"),
        pytest.param(0.0225, 0.5, 2.0, 1.5, id="2.25 times the target: 1.5 times the coefficient"),
        pytest.param(0.0025, 0.5, 4.0, 0.5, id="a quarter: half"),
        pytest.param(0.02, 1.0, 4.0, 2.0, id="p = 1: the same ratio"),
        pytest.param(0.16, 0.25, 4.0, 2.0, id="p = 1/4: the fourth root of 16"),
        pytest.param(0.09, 0.5, 2.0, 2.0, id="no further than the factor"),
        pytest.param(0.0001, 0.5, 2.0, 0.5, id="nor down"),
        pytest.param(0.0, 0.5, 2.0, 0.5, id="a policy that did not move"),
        pytest.param(-1e-9, 0.5, 2.0, 0.5, id="a divergence rounded to below 0 gives no complex number"),
        pytest.param(1e308, 1.0, 2.0, 2.0, id="very far"),
    ],
)
def test_proportional(kl, exponent, factor, expected):
    assert Proportional(exponent)(reading(kl, 1.0, factor=factor)) == pytest.approx(expected, rel=1e-12)
    assert Proportional(exponent)(reading(kl, 10.0, factor=factor)) == pytest.approx(10 * expected, rel=1e-12)


def test_the_square_root_is_exact_where_the_update_converges():
    """With KL = c / beta^2, one step leads from nine times the target to the target; p = 1 oscillates for ever."""

    def divergences(exponent: float) -> list[float]:
        controller, kl_coef, seen = Proportional(exponent), 1.0, []
        for _ in range(5):
            seen.append(0.09 / kl_coef**2)
            kl_coef = controller(reading(seen[-1], kl_coef, factor=100.0))
        return seen

    assert divergences(0.5) == pytest.approx([0.09, 0.01, 0.01, 0.01, 0.01])
    # 0.09 is 9 d; 9 times the coefficient gives d / 9; and back
    assert divergences(1.0) == pytest.approx([0.09, 0.01 / 9, 0.09, 0.01 / 9, 0.09])


@pytest.mark.parametrize(
    ("kl", "target", "expected"),
    [
        (0.03, 0.01, 3.0),
        (0.0, 0.01, 0.0),
        (-1e-9, 0.01, 0.0),
        (1e-9, 0.0, math.inf),
        (0.0, 0.0, 1.0),
        (1e300, 1e-300, math.inf),
    ],
)
def test_relative_divergence(kl, target, expected):
    assert relative_kl(kl, target) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Proportional, DualAscent])
def test_a_target_that_a_schedule_took_to_zero(kind):
    controller = kind()
    assert controller(reading(0.0, 3.0, target_kl=0.0)) == 3.0
    assert controller(reading(0.1, 3.0, target_kl=0.0)) > 3.0


def adams_path(violations: list[float], learning_rate: float) -> list[float]:
    """log beta as torch's Adam moves it."""
    log_beta = th.zeros((), dtype=th.float64, requires_grad=True)
    adam = th.optim.Adam([log_beta], lr=learning_rate, maximize=True)
    path = []
    for violation in violations:
        log_beta.grad = th.tensor(violation, dtype=th.float64)
        adam.step()
        path.append(log_beta.item())
    return path


def test_dual_ascent_is_torchs_adam_on_the_logarithm():
    kls = [0.015, 0.004, 0.011, 0.0, 0.02, 0.5, 0.01]
    # KL / 0.01 - 1, at most 1
    violations = [0.5, -0.6, 0.1, -1.0, 1.0, 1.0, 0.0]
    controller, kl_coef, path = DualAscent(learning_rate=0.3), 1.0, []
    for kl in kls:
        kl_coef = controller(reading(kl, kl_coef))
        path.append(math.log(kl_coef))
    assert path == pytest.approx(adams_path(violations, 0.3), rel=1e-9, abs=1e-12)


def test_dual_ascent_goes_on_from_the_coefficient_that_it_finds():
    controllers = DualAscent(), DualAscent()
    first = [controller(reading(0.02, kl_coef)) for controller, kl_coef in zip(controllers, (1.0, 50.0), strict=True)]
    # Adam's first step is the learning rate itself: e^0.1
    assert first == pytest.approx([1.10517092, 50 * 1.10517092])


def test_dual_ascent_keeps_to_the_factor():
    assert DualAscent(learning_rate=5.0)(reading(1.0, 3.0)) == pytest.approx(6.0)
    assert DualAscent(learning_rate=5.0)(reading(0.0, 3.0)) == pytest.approx(1.5)


@pytest.mark.parametrize("start", [1e-4, 1.0])
def test_dual_ascent_finds_the_target(start):
    """KL = start / beta^2, from a hundredth and a hundred times the target; the answer is beta = sqrt(start / target)."""
    controller, kl_coef = DualAscent(), 1.0
    for _ in range(150):
        kl_coef = controller(reading(start / kl_coef**2, kl_coef))
    assert kl_coef == pytest.approx(math.sqrt(start / 0.01), rel=0.02)


def test_dual_ascents_memory_is_plain_and_survives_pickling():
    controller = DualAscent(learning_rate=0.3)
    for kl in (0.015, 0.004, 0.011):
        controller(reading(kl))
    assert {type(value) for value in vars(controller).values()} == {float, int}
    copied = pickle.loads(pickle.dumps(controller))
    assert [copied(reading(kl)) for kl in (0.02, 0.0)] == [controller(reading(kl)) for kl in (0.02, 0.0)]


# --- how they are asked for


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("adaptive", AdaptiveRule()),
        ("fixed", FixedCoefficient()),
        ("proportional", Proportional(0.5)),
        ("dual", DualAscent(0.1)),
        ({"name": "adaptive"}, AdaptiveRule()),
        ({"name": "proportional", "exponent": 0.25}, Proportional(0.25)),
        ({"name": "dual", "learning_rate": 0.03}, DualAscent(0.03)),
        (Proportional(1), Proportional(1)),
    ],
)
def test_ways_to_ask(choice, expected):
    assert make_controller(choice) == expected


def test_a_function_is_a_controller():
    controller = make_controller(lambda seen: seen.kl_coef + seen.kl)
    assert controller(reading(0.25)) == 1.25


def test_a_controller_that_remembers_is_copied():
    given = DualAscent()
    mine, yours = make_controller(given), make_controller(given)
    mine(reading(0.02))
    assert (given.steps, mine.steps, yours.steps) == (0, 1, 0)


def test_what_it_remembers_in_a_list_is_copied_too():
    class Listing:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def __call__(self, seen: KLReading) -> float:
            self.seen.append(seen.kl)
            return seen.kl_coef

    given = Listing()
    mine, yours = make_controller(given), make_controller(given)
    mine(reading(0.02))
    assert (given.seen, mine.seen, yours.seen) == ([], [0.02], [])


@pytest.mark.parametrize("controller", [AdaptiveRule(), FixedCoefficient(), Proportional()])
def test_a_controller_without_a_memory_is_a_value(controller):
    """Controllers without a memory are frozen, so that a checked exponent stays valid, and hashable."""
    with pytest.raises(AttributeError):
        controller.exponent = 7.0
    assert {controller, type(controller)()} == {controller}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param("adapt", r'`kl_controller` must be one of "adaptive", .*, got \'adapt\'', id="unknown name"),
        pytest.param(None, "`kl_controller` must be one of", id="None"),
        pytest.param(3, "`kl_controller` must be one of .*, got 3$", id="a number"),
        pytest.param(DualAscent, "`kl_controller` must be one of", id="a class, not one of its objects"),
        pytest.param({}, "`kl_controller` must be one of", id="no name"),
        pytest.param({"name": ["dual"]}, "`kl_controller` must be one of", id="a name that is none"),
        pytest.param({"exponent": 0.5}, "`kl_controller` must be one of", id="a parameter alone"),
        pytest.param(
            {"name": "dual", "exponent": 0.5},
            r"^`kl_controller` must be .dual. with no parameters but \['learning_rate'\], got {'name': 'dual', 'exponent': ",
            id="another's",
        ),
        pytest.param({"name": "dual", "steps": 3}, '"dual" with no parameters but', id="what it remembers"),
        pytest.param({"name": "fixed", "kl_coef": 3}, r'"fixed" with no parameters but \[\]', id="none to give"),
        pytest.param({"name": "proportional", "exponent": 0}, "`kl_controller.exponent` must be", id="exponent 0"),
        pytest.param({"name": "proportional", "exponent": 1.1}, "`kl_controller.exponent` must be", id="exponent above 1"),
        pytest.param({"name": "proportional", "exponent": "0.5"}, "`kl_controller.exponent` must be", id="exponent a string"),
        pytest.param({"name": "dual", "learning_rate": 0}, "`kl_controller.learning_rate` must be", id="learning rate 0"),
        pytest.param({"name": "dual", "learning_rate": np.nan}, "`kl_controller.learning_rate` must be", id="nan"),
    ],
)
def test_what_cannot_be_asked_for(choice, message):
    with pytest.raises(ValueError, match=message):
        make_controller(choice)
