"""The shape of the penalty: how it is asked for, and that it is the sum of its parts, with tensors and with numbers."""

import math
import pickle

import pytest
import torch as th

from sb3_ppo_penalty.objectives.divergence import ActionParameters, kl_categorical, kl_diagonal_gaussian
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.objectives.losses import surrogate, truncate_ratio


def tensor(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


#: From one half to three quarters, in two states
OLD = ActionParameters(kl_categorical, (tensor(0, 0).repeat(2, 1),))
NEW = ActionParameters(kl_categorical, (tensor(0, math.log(3)).repeat(2, 1),))


# --- how it is asked for


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("old_new", KLPenalty()),
        ("new_old", KLPenalty(direction="new_old")),
        ("symmetric", KLPenalty(direction="symmetric")),
        ({}, KLPenalty()),
        ({"cutoff_coef": 1000, "per_state": True}, KLPenalty(cutoff_coef=1000.0, per_state=True)),
        ({"direction": "symmetric", "cutoff_coef": 10}, KLPenalty("symmetric", cutoff_coef=10)),
        (KLPenalty(cutoff_coef=3.0), KLPenalty(cutoff_coef=3.0)),
    ],
)
def test_ways_to_ask(choice, expected):
    assert KLPenalty.of(choice) == expected


def test_the_default_is_the_articles():
    names = {"sampled": False, "advantage_weighted": False}
    assert KLPenalty() == KLPenalty(direction="old_new", cutoff_coef=0.0, per_state=False, **names)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param("new", r"`kl_penalty.direction` must be one of \['old_new', .*, got 'new'", id="direction"),
        pytest.param({"direction": None}, "`kl_penalty.direction` must be", id="no direction"),
        pytest.param({"direction": ["old_new"]}, "`kl_penalty.direction` must be", id="a direction that is no name"),
        pytest.param(
            {"cutoff_coef": -1.0}, "`kl_penalty.cutoff_coef` must be a finite number at least 0, got -1.0", id="cutoff"
        ),
        pytest.param({"cutoff_coef": math.inf}, "`kl_penalty.cutoff_coef` must be", id="infinite cutoff"),
        pytest.param({"cutoff_coef": None}, "`kl_penalty.cutoff_coef` must be", id="no cutoff"),
        pytest.param(
            {"cutoff_coef": 1, "per_state": 1}, "`kl_penalty.per_state` must be True or False, got 1", id="per_state"
        ),
        pytest.param({"per_state": True}, "`kl_penalty.per_state` must be False without a `cutoff_coef`", id="of no cutoff"),
        pytest.param({"sampled": True, "direction": "new_old"}, "`kl_penalty.direction` must be left out", id="of a sample"),
        pytest.param({"sampled": 1}, "`kl_penalty.sampled` must be True or False, got 1", id="sampled"),
        pytest.param({"advantage_weighted": None}, "`kl_penalty.advantage_weighted` must be True or False", id="weighted"),
        pytest.param({"coef": 1.0}, r"`kl_penalty` must be a KLPenalty, .* a dict of \['direction', 'cut", id="unknown field"),
        pytest.param(None, "`kl_penalty` must be a KLPenalty", id="None"),
        pytest.param(1.0, "`kl_penalty` must be a KLPenalty", id="a number"),
        pytest.param(KLPenalty, "`kl_penalty` must be a KLPenalty", id="the class"),
    ],
)
def test_what_cannot_be_asked_for(choice, message):
    with pytest.raises(ValueError, match=message):
        KLPenalty.of(choice)


def test_it_is_a_value():
    shape = KLPenalty("symmetric", 10.0, True)
    assert pickle.loads(pickle.dumps(shape)) == shape
    assert hash(shape) == hash(KLPenalty("symmetric", 10.0, True))
    with pytest.raises(AttributeError):
        shape.cutoff_coef = 0.0


# --- what it does


@pytest.mark.parametrize(
    ("direction", "expected"), [("old_new", 0.14384104), ("new_old", 0.13081204), ("symmetric", 0.13732654)]
)
def test_the_direction_is_the_one_asked_for(direction, expected):
    ratio, advantages = tensor(0.5, 1.5), tensor(1, -1)
    assert KLPenalty(direction).charge(ratio, advantages, OLD, lambda: NEW).tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Half the squares of -1/2 and 2
        pytest.param(KLPenalty(sampled=True), [0.125, 2.0], id="sampled"),
        # times 4 and 0.5
        pytest.param(KLPenalty(sampled=True, advantage_weighted=True), [0.5, 1.0], id="sampled and weighted"),
        # KL(old || new) = 0.14384104 times 4 and 0.5
        pytest.param(KLPenalty(advantage_weighted=True), [0.57536414, 0.07192052], id="weighted"),
    ],
)
def test_what_is_charged(shape, expected):
    charged = shape.charge(tensor(0.5, 3.0), tensor(-4.0, 0.5), OLD, lambda: NEW)
    assert charged.tolist() == pytest.approx(expected)


def test_a_sampled_charge_asks_for_no_distribution():
    def never():
        raise AssertionError("asked for the distribution")

    KLPenalty(sampled=True).charge(tensor(0.5), tensor(1.0), OLD, never)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # J = 0.5, beta = 2, KL = 0.04 and 0.02: the penalty is 2 * 0.03
        pytest.param(KLPenalty(), 0.44, id="the penalty alone"),
        # target 0.01: (0.03 - 0.02)^2 = 1e-4, a thousand times
        pytest.param(KLPenalty(cutoff_coef=1000.0), 0.34, id="cutoff of the mean"),
        # ((0.04 - 0.02)^2 + 0) / 2 = 2e-4
        pytest.param(KLPenalty(cutoff_coef=1000.0, per_state=True), 0.24, id="cutoff of every state"),
    ],
)
@pytest.mark.parametrize("wrap", [float, tensor], ids=["numbers", "tensors"])
def test_penalized_objective(shape, expected, wrap):
    coefficients = [wrap(x) if wrap is float else wrap(x)[0] for x in (2.0, 0.01)]
    assert shape.penalize(tensor(0.5)[0], tensor(0.04, 0.02), *coefficients).item() == pytest.approx(expected)


@pytest.mark.parametrize("direction", ["old_new", "new_old", "symmetric"])
@pytest.mark.parametrize("per_state", [False, True])
def test_no_value_decides_what_is_computed(direction, per_state):
    """`vmap` refuses to look at a value: what passes through it can be compiled once for all coefficients and targets."""
    shape = KLPenalty(direction, cutoff_coef=30.0, per_state=per_state)
    ratio, advantages = tensor(0.5, 100), tensor(1, -1)

    def objective(kl_coef, target_kl):
        truncated = (truncate_ratio(ratio, advantages, 4.0) * advantages).mean()
        return shape.penalize(truncated, shape.charge(ratio, advantages, OLD, lambda: NEW), kl_coef, target_kl)

    kl_coefs, targets = tensor(0.0, 1.0, 7.0), tensor(0.001, 0.05, 1.0)
    batched = th.func.vmap(objective)(kl_coefs, targets)
    assert batched.tolist() == pytest.approx(
        [objective(*pair).item() for pair in zip(kl_coefs.tolist(), targets.tolist(), strict=True)]
    )
    assert len(set(batched.tolist())) == 3


# --- where gradient ascent comes to rest


def resting_ratio(penalty: KLPenalty, z: float, advantage: float, kl_coef: float, max_ratio: float | None = None) -> float:
    """
    Follow the gradient from the old policy, a Gaussian of deviation 1, for one action that lay z deviations out.

    :return: the ratio at the first mean where the gradient no longer points to the action; inf where it does up to the action
    """
    shift = th.linspace(0, abs(z), 200_001, dtype=th.float64)[1:-1].requires_grad_()
    mean, one = shift[:, None], th.ones(len(shift), 1, dtype=th.float64)
    ratio = th.exp(abs(z) * shift - shift**2 / 2)
    old, new = (ActionParameters(kl_diagonal_gaussian, (each, one)) for each in (th.zeros_like(mean), mean))
    advantages = th.full_like(ratio, advantage)
    charged = penalty.charge(ratio, advantages, old, lambda: new)
    pulled = ratio if max_ratio is None else truncate_ratio(ratio, advantages, max_ratio)
    # Times the number of states: each by itself
    objective = penalty.penalize(surrogate(pulled, advantages), charged, kl_coef, 0.01) * len(shift)
    objective.backward()
    rests = (shift.grad <= 0).nonzero()
    return ratio[rests[0]].item() if len(rests) else math.inf


@pytest.mark.parametrize("z", [8.0, 20.0])
@pytest.mark.parametrize("advantage", [1.0, 3.0])
def test_under_the_exact_divergence_a_rare_action_runs_away_below_e_times_its_square(z, advantage):
    """The pull z A exp(z shift) and the penalty's, beta shift, meet where beta >= e A z^2, to leading order in 1 / z."""
    bound = math.e * advantage * z**2
    assert resting_ratio(KLPenalty(), z, advantage, 1.01 * bound) < math.e
    far = resting_ratio(KLPenalty(), z, advantage, 0.9 * bound)
    # Next to the action itself, where the density has its top
    assert far > math.exp(0.4 * z**2)
    # Truncation ends it, and so does a penalty that is quadratic in the ratio
    assert resting_ratio(KLPenalty(), z, advantage, 0.9 * bound, max_ratio=1.3) < 1.31
    assert resting_ratio(KLPenalty(sampled=True), z, advantage, 5 * advantage) == pytest.approx(1.2, abs=0.01)


@pytest.mark.parametrize("z", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("advantage", [0.1, 30.0])
@pytest.mark.parametrize("kl_coef", [1.0, 5.0])
def test_sampled_and_weighted_a_ratio_rests_at_the_inverse_of_the_coefficient(z, advantage, kl_coef):
    weighted = KLPenalty(sampled=True, advantage_weighted=True)
    expected = 1 + 1 / kl_coef
    reached = resting_ratio(weighted, z, advantage, kl_coef)
    # The action itself may lie nearer
    assert reached == pytest.approx(expected, abs=0.01) if expected < math.exp(z**2 / 2) else reached == math.inf
