"""The exact divergence against closed forms, torch, Monte Carlo and SB3's own policies."""

import math
import re
from functools import partial

import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from scipy.integrate import quad
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.distributions import (
    kl_divergence as sb3_kl_divergence,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Beta, Categorical, MultivariateNormal, Normal
from torch.distributions import kl_divergence as torch_kl_divergence

from sb3_ppo_penalty import MlpPolicy
from sb3_ppo_penalty.objectives.divergence import (
    ActionParameters,
    collect_rows,
    concatenate,
    directed_divergence,
    kl_bernoulli,
    kl_categorical,
    kl_diagonal_gaussian,
    kl_divergence,
    kl_fixed_diagonal,
    kl_fixed_full,
    kl_gaussian,
    parameters_of,
    register_divergence,
)

LN2 = math.log(2.0)

OBSERVATIONS = spaces.Box(-1, 1, (4,))
BOX = spaces.Box(-1, 1, (3,))
FULL = [[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]]

#: Every action distribution that an SB3 policy of either algorithm can have
POLICIES = {
    "fixed": (MlpPolicy, BOX, {}),
    "fixed, one variance each": (MlpPolicy, BOX, {"covariance": [0.1, 0.5, 2.0]}),
    "fixed, full": (MlpPolicy, BOX, {"covariance": FULL}),
    "learned from a covariance": (MlpPolicy, BOX, {"learn_covariance": True}),
    "learned": (ActorCriticPolicy, BOX, {}),
    "gSDE": (ActorCriticPolicy, BOX, {"use_sde": True, "log_std_init": -1.0}),
    "gSDE, this package's policy": (MlpPolicy, BOX, {"use_sde": True, "log_std_init": -1.0}),
    "gSDE, one std for all features": (ActorCriticPolicy, BOX, {"use_sde": True, "log_std_init": -1.0, "full_std": False}),
    "gSDE, squashed": (ActorCriticPolicy, BOX, {"use_sde": True, "log_std_init": -1.5, "squash_output": True}),
    "Discrete": (ActorCriticPolicy, spaces.Discrete(5), {}),
    "MultiDiscrete": (ActorCriticPolicy, spaces.MultiDiscrete([2, 3, 4]), {}),
    "MultiBinary": (ActorCriticPolicy, spaces.MultiBinary(6), {}),
}


def double(*rows: object) -> th.Tensor:
    return th.tensor(rows, dtype=th.float64)


def make_policy(name: str) -> ActorCriticPolicy:
    th.manual_seed(0)
    policy_class, action_space, arguments = POLICIES[name]
    return policy_class(OBSERVATIONS, action_space, lambda _: 1e-3, net_arch=[16], **arguments)


def stir(policy: ActorCriticPolicy, size: float) -> None:
    """Move every parameter in place, as an optimizer does."""
    generator = th.Generator().manual_seed(7)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * th.randn(parameter.shape, generator=generator))


def states(count: int) -> th.Tensor:
    return th.randn(count, 4, generator=th.Generator().manual_seed(3))


def frozen(policy: ActorCriticPolicy, observations: th.Tensor) -> ActionParameters:
    with th.no_grad():
        return concatenate([parameters_of(policy.get_distribution(observations))], len(observations))


def holding(inner: object) -> DiagGaussianDistribution:
    """An SB3 distribution around any torch distribution."""
    distribution = DiagGaussianDistribution(1)
    distribution.distribution = inner
    return distribution


# --- Gaussians with a diagonal covariance


def test_four_dimensions_are_summed_where_sb3_would_average():
    mean, std = th.zeros(5, 4), th.zeros(4)
    old, new = DiagGaussianDistribution(4), DiagGaussianDistribution(4)
    old.proba_distribution(mean, std)
    new.proba_distribution(mean + 0.1, std)
    assert sb3_kl_divergence(old, new).mean().item() == pytest.approx(0.005)
    # 4 * 0.1^2 / 2
    assert kl_divergence(parameters_of(old), parameters_of(new)).tolist() == pytest.approx([0.02] * 5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param((0, 1), (3, 1), 4.5, id="shift alone: 9 / 2"),
        pytest.param((0, 1), (3, 2), LN2 + 10 / 8 - 0.5, id="ln 2 + (1 + 9) / 8 - 1/2"),
        pytest.param((1, 1), (1, 2), 0.31814718, id="wider: ln 2 + 1/8 - 1/2"),
        pytest.param((1, 2), (1, 1), 0.80685282, id="narrower: -ln 2 + 4/2 - 1/2"),
        pytest.param((0, 0.01), (0.01, 0.01), 0.5, id="a small std makes a small step large: 1/2"),
    ],
)
def test_one_dimension(old, new, expected):
    parameters = [double([x]) for x in (*old, *new)]
    assert kl_diagonal_gaussian(*parameters).tolist() == pytest.approx([expected], abs=1e-8)


def test_two_states_of_two_dimensions():
    mean, new_mean = double([0, 1], [0, 0]), double([3, 1], [0, 0])
    std, new_std = double([1, 1], [1, 2]), double([1, 2], [1, 1])
    # 4.5 + 0.31814718, and 0 + 0.80685282
    assert kl_diagonal_gaussian(mean, std, new_mean, new_std).tolist() == pytest.approx([4.81814718, 0.80685282])


def test_gradient_pulls_back_to_the_old_gaussian():
    mean, std = th.ones(1, 1, dtype=th.float64, requires_grad=True), double([2]).requires_grad_()
    kl_diagonal_gaussian(double([0]), double([1]), mean, std).backward()
    # d/dm' = (m' - m) / s'^2 = 1/4; d/ds' = 1/s' - (s^2 + (m - m')^2) / s'^3 = 1/2 - 2/8
    assert mean.grad.item() == pytest.approx(0.25)
    assert std.grad.item() == pytest.approx(0.25)


@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_a_tiny_change_of_scale_is_seen_in_single_precision(std):
    # A relative change e costs e^2, to first order: 9e-8 where e = 3e-4, which is about the rounding error of 1
    kl = kl_diagonal_gaussian(*(th.full((1, 1), x) for x in (0.0, std, 0.0, std * 1.0003)))
    assert kl.item() == pytest.approx(9e-8, rel=0.01)


# --- Gaussians with a full covariance

#: Lower factor of [[2, 1], [1, 2]], whose determinant is 3 and whose inverse is [[2, -1], [-1, 2]] / 3
FACTOR = [[math.sqrt(2), 0], [1 / math.sqrt(2), math.sqrt(1.5)]]


def test_full_covariance_against_the_identity():
    eye = th.eye(2, dtype=th.float64)
    # (tr - d + shift - ln 3) / 2 = (4 - 2 + 1 - 1.0986123) / 2
    assert kl_gaussian(double([0, 0]), double(*FACTOR), double([1, 0]), eye).tolist() == pytest.approx([0.95069386])
    # and back: (4/3 - 2 + 2/3 + 1.0986123) / 2
    assert kl_gaussian(double([0, 0]), eye, double([1, 0]), double(*FACTOR)).tolist() == pytest.approx([0.54930614])


def test_full_covariance_that_stays_leaves_the_shift():
    factor = double(*FACTOR)
    # (d0, d1) S^-1 (d0, d1)^T / 2: (1, 0) gives 1/3, (1, 1) gives 1/3, (1, -1) gives 1
    kl = kl_gaussian(th.zeros(3, 2, dtype=th.float64), factor, double([1, 0], [1, 1], [1, -1]), factor)
    assert kl.tolist() == pytest.approx([1 / 3, 1 / 3, 1])


def random_factor(*shape: int, seed: int) -> th.Tensor:
    generator = th.Generator().manual_seed(seed)
    raw = th.randn(*shape, 4, 4, generator=generator, dtype=th.float64)
    return th.linalg.cholesky(raw @ raw.mT + 0.5 * th.eye(4, dtype=th.float64))


@pytest.mark.parametrize(
    ("old_shape", "new_shape"), [((), ()), ((6,), (6,)), ((), (6,)), ((6,), ())], ids=["shared", "per state", "to", "from"]
)
def test_full_covariance_against_torch(old_shape, new_shape):
    generator = th.Generator().manual_seed(0)
    means = [th.randn(6, 4, generator=generator, dtype=th.float64) for _ in range(2)]
    old = MultivariateNormal(means[0], scale_tril=random_factor(*old_shape, seed=1))
    new = MultivariateNormal(means[1], scale_tril=random_factor(*new_shape, seed=2))
    kl = kl_divergence(parameters_of(holding(old)), parameters_of(holding(new)))
    assert kl.shape == (6,)
    th.testing.assert_close(kl, torch_kl_divergence(old, new), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_full_covariance_gradient_against_torch(shape):
    mean, factor = th.zeros(6, 4, dtype=th.float64), random_factor(*shape, seed=1)
    gradients = []
    for divergence in ("ours", "torch"):
        new_mean = th.ones(6, 4, dtype=th.float64, requires_grad=True)
        new_factor = random_factor(*shape, seed=2).requires_grad_()
        if divergence == "ours":
            kl = kl_gaussian(mean, factor, new_mean, new_factor)
        else:
            kl = torch_kl_divergence(
                MultivariateNormal(mean, scale_tril=factor), MultivariateNormal(new_mean, scale_tril=new_factor)
            )
        kl.sum().backward()
        gradients.append((new_mean.grad, new_factor.grad.tril()))
    for ours, reference in zip(*gradients, strict=True):
        th.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10)


def test_a_full_matrix_without_correlations_is_the_diagonal_form():
    mean, new_mean = double([0, 1], [2, 3]), double([1, 1], [0, 5])
    std, new_std = double([1, 2])[0], double([0.5, 3])[0]
    full = kl_gaussian(mean, std.diag(), new_mean, new_std.diag())
    th.testing.assert_close(full, kl_diagonal_gaussian(mean, std.expand(2, 2), new_mean, new_std.expand(2, 2)))


# --- Gaussians whose covariance all states share, with its inverse at hand


def test_shared_deviations_that_change():
    mean, new_mean = double([0, 1], [1, 0], [0, 0]), double([3, 1], [1, 0], [0, 1])
    std, new_std = double([1, 2])[0], double([2, 1])[0]
    kl = kl_fixed_diagonal(mean, std, double([1, 0.5])[0], new_mean, new_std, double([0.5, 1])[0])
    # wider ln 2 + 1/8 - 1/2, narrower -ln 2 + 4/2 - 1/2: together 1.125; shifts of 3 / 2, 0 and 1 add half their squares
    assert kl.tolist() == pytest.approx([2.25, 1.125, 1.625])


def test_shared_deviations_that_stay():
    mean, new_mean = double([0, 0], [1, 0]), double([2, 2], [0, 0])
    std, whitening = double([1, 2])[0], double([1, 0.5])[0]
    # (2^2 + 1^2) / 2, whether the tensor is the very same or another of equal numbers
    for new_std in (std, std.clone()):
        assert kl_fixed_diagonal(mean, std, whitening, new_mean, new_std, whitening).tolist() == pytest.approx([2.5, 0.5])


#: Inverse of FACTOR
WHITENING = [[1 / math.sqrt(2), 0], [-1 / math.sqrt(6), math.sqrt(2 / 3)]]


def test_a_shared_matrix_that_changes():
    factor, whitening, eye = double(*FACTOR), double(*WHITENING), th.eye(2, dtype=th.float64)
    mean, new_mean = double([0, 0], [1, 1]), double([1, 0], [1, 1])
    # as in `test_full_covariance_against_the_identity`, and without its shift of 1/2 and 1/3
    there = kl_fixed_full(mean, factor, whitening, new_mean, eye, eye.clone())
    assert there.tolist() == pytest.approx([0.95069386, 0.45069386])
    back = kl_fixed_full(mean, eye, eye.clone(), new_mean, factor, whitening)
    assert back.tolist() == pytest.approx([0.54930614, 0.21597281])


def test_a_shared_matrix_that_stays():
    factor, whitening = double(*FACTOR), double(*WHITENING)
    mean, new_mean = th.zeros(3, 2, dtype=th.float64), double([1, 0], [1, 1], [1, -1])
    # as in `test_full_covariance_that_stays_leaves_the_shift`
    for new_factor in (factor, factor.clone()):
        kl = kl_fixed_full(mean, factor, whitening, new_mean, new_factor, whitening)
        assert kl.tolist() == pytest.approx([1 / 3, 1 / 3, 1])


# --- categorical


#: https://github.com/ray-project/ray/issues/21297
RAY_OLD = [[-84.742, -7.2213, -0.00073051, -51.313, -103.49]]
RAY_NEW = [[-86.197, -5.939, -0.0026379, -53.358, -105.7]]


def test_rays_logits():
    old, new = th.tensor(RAY_OLD), th.tensor(RAY_NEW)
    assert torch_kl_divergence(Categorical(logits=old), Categorical(logits=new)).item() == math.inf
    # Two actions count: 0.000731 (-7.2213 + 5.939) + 0.99927 (-0.00073051 + 0.0026379)
    assert kl_categorical(old, new).tolist() == pytest.approx([0.00097], abs=1e-5)
    distributions = (CategoricalDistribution(5).proba_distribution(logits) for logits in (old, new))
    assert kl_divergence(*map(parameters_of, distributions)).tolist() == pytest.approx([0.00097], abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 30.0, -500.0])
def test_categorical_by_hand(shift):
    old, new = double([1 / 2, 1 / 2]).log(), double([1 / 4, 3 / 4]).log() + shift
    # ln 2 / 2 + ln(2/3) / 2, whatever is added to all logits of a state
    assert kl_categorical(old, new).tolist() == pytest.approx([0.14384104])


def test_multi_discrete_is_summed():
    old = double([1 / 2, 1 / 2]).log(), double([1 / 3, 1 / 3, 1 / 3]).log()
    new = double([1 / 4, 3 / 4]).log(), double([1 / 2, 1 / 4, 1 / 4]).log()
    # 0.14384104 as above, and ln(2/3) / 3 + 2 ln(4/3) / 3 = 0.05663301
    assert kl_categorical(*old, *new).tolist() == pytest.approx([0.20047405])


@pytest.mark.parametrize("masked", [-math.inf, -1e8])
def test_masked_actions_add_nothing(masked):
    old = double([math.log(1 / 2), masked, math.log(1 / 2)])
    new = double([math.log(1 / 4), masked, math.log(3 / 4)]).requires_grad_()
    kl = kl_categorical(old, new)
    kl.backward()
    assert kl.tolist() == pytest.approx([0.14384104])
    # p' - p
    assert new.grad.tolist()[0] == pytest.approx([-0.25, 0, 0.25])


@pytest.mark.parametrize("masked", [-math.inf, -1e8])
def test_masked_actions_at_equality(masked):
    logits = th.tensor([[0.0, masked, 1.0]])
    assert kl_categorical(logits, logits.clone()).item() == 0


def test_taking_away_an_action_that_was_taken_is_infinitely_far():
    assert kl_categorical(double([0, 0]), double([0, -math.inf])).item() == math.inf


def test_masks_of_sb3_contrib():
    mask = [[True, False, True]]
    old, new = (MaskableCategoricalDistribution(3).proba_distribution(double(p).log()) for p in ([2, 7, 2], [1, 1, 3]))
    for distribution in (old, new):
        distribution.apply_masking(mask)
    assert kl_divergence(parameters_of(old), parameters_of(new)).tolist() == pytest.approx([0.14384104])


# --- bits


def test_bernoulli_by_hand():
    # one half to three quarters in each bit, as in the categorical; logit(3/4) = ln 3
    kl = kl_bernoulli(double([0, 0], [0, 0]), double([math.log(3), -math.log(3)], [math.log(3), 0]))
    assert kl.tolist() == pytest.approx([2 * 0.14384104, 0.14384104])


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_bernoulli_with_extreme_logits(dtype):
    old = th.tensor([[1000.0], [-1000.0], [1000.0], [200.0], [0.0]], dtype=dtype)
    new = th.tensor([[-1000.0], [1000.0], [1000.0], [100.0], [200.0]], dtype=dtype).requires_grad_()
    kl = kl_bernoulli(old, new)
    kl.sum().backward()
    # certain of the opposite: 1000; certain of the same: 0; a coin against certainty: (200 - 2 ln 2) / 2
    assert kl.tolist() == pytest.approx([1000, 1000, 0, 0, 100 - LN2], abs=1e-5)
    # p' - p
    assert new.grad.flatten().tolist() == pytest.approx([-1, 1, 0, 0, 0.5], abs=1e-6)


# --- all of them, through SB3's policies


@pytest.mark.parametrize("name", POLICIES)
def test_monte_carlo(name):
    policy = make_policy(name)
    observations = states(2).repeat_interleave(20_000, dim=0)
    moved = make_policy(name)
    stir(moved, 0.3)
    with th.no_grad():
        if policy.use_sde:
            policy.reset_noise(len(observations))
        old, new = policy.get_distribution(observations), moved.get_distribution(observations)
        exact = kl_divergence(parameters_of(old), parameters_of(new))
        actions = old.sample()
        log_ratio = (old.log_prob(actions) - new.log_prob(actions)).double()
    assert exact.shape == (40_000,)
    for kl, samples in zip(exact.split(20_000), log_ratio.split(20_000), strict=True):
        error = samples.std().item() / math.sqrt(len(samples))
        assert kl[0].item() > 10 * error, "the samples must be able to tell a sum from a mean"
        assert samples.mean().item() == pytest.approx(kl[0].item(), abs=4 * error)


@pytest.mark.parametrize("name", POLICIES)
def test_exactly_zero_at_the_old_policy_and_a_number_per_state(name):
    policy, observations = make_policy(name), states(7)
    kl = kl_divergence(frozen(policy, observations), parameters_of(policy.get_distribution(observations)))
    assert kl.tolist() == [0.0] * 7


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2, 1.0])
def test_never_below_zero_by_more_than_rounding(name, size):
    policy, observations = make_policy(name), states(500)
    old = frozen(policy, observations)
    stir(policy, size)
    kl = frozen_kl(old, policy, observations)
    assert kl.shape == (500,)
    assert kl.min().item() > -1e-6
    assert kl.mean().item() > -1e-7


def frozen_kl(old: ActionParameters, policy: ActorCriticPolicy, observations: th.Tensor) -> th.Tensor:
    return kl_divergence(old, frozen(policy, observations))


def gradient(old: ActionParameters, policy: ActorCriticPolicy, observations: th.Tensor) -> th.Tensor:
    policy.zero_grad()
    kl_divergence(old, parameters_of(policy.get_distribution(observations))).mean().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    return th.cat([part.flatten() for part in gradients])


@pytest.mark.parametrize("name", POLICIES)
def test_gradient_is_zero_at_the_old_policy_and_pulls_back_after_a_step(name):
    policy, observations = make_policy(name), states(50)
    old = frozen(policy, observations)
    assert gradient(old, policy, observations).abs().max() < 1e-6
    stir(policy, 0.1)
    before = frozen_kl(old, policy, observations).mean()
    assert gradient(old, policy, observations).abs().max() > 1e-3
    th.optim.SGD(policy.parameters(), lr=1e-3).step()
    assert frozen_kl(old, policy, observations).mean() < before - 1e-6


@pytest.mark.parametrize("name", POLICIES)
def test_every_parameter_of_the_actor_is_pulled_and_none_of_the_critic(name):
    policy, observations = make_policy(name), states(50)
    old = frozen(policy, observations)
    stir(policy, 0.1)
    gradient(old, policy, observations)
    actor = {"action_net.weight", "action_net.bias", "mlp_extractor.policy_net.0.weight", "mlp_extractor.policy_net.0.bias"}
    if name.startswith(("learned", "gSDE")):
        actor.add("log_std")
    pulled = {name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert pulled == actor


def test_a_frozen_policy_takes_no_gradient():
    for name in ("learned", "fixed, full", "Discrete"):
        policy = make_policy(name)
        old = concatenate([parameters_of(policy.get_distribution(states(5)))], 5)
        assert not any(tensor.requires_grad for tensor in (*old.per_state, *old.shared))


def test_what_all_states_share_is_copied_where_it_learns_and_else_kept():
    mean, factor = th.zeros(3, 2, dtype=th.float64), double(*FACTOR)
    fixed = concatenate([parameters_of(holding(MultivariateNormal(mean, scale_tril=factor)))], 3)
    assert fixed.shared[0] is factor  # the same object, by which an unchanged covariance is recognised
    learned = factor.clone().requires_grad_()
    joined = concatenate([parameters_of(holding(MultivariateNormal(mean, scale_tril=learned)))] * 2, 6)
    with th.no_grad():
        learned.add_(1)  # as an optimizer does
    assert th.equal(joined.shared[0], factor)
    assert not joined.shared[0].requires_grad
    assert joined.per_state[0].shape == (6, 2)


def test_a_matrix_of_each_state_is_joined_with_its_state():
    generator = th.Generator().manual_seed(0)
    mean, factor = th.randn(6, 4, generator=generator, dtype=th.float64), random_factor(6, seed=1)
    new = MultivariateNormal(th.zeros(6, 4, dtype=th.float64), scale_tril=random_factor(seed=2))
    chunks = [MultivariateNormal(mean[rows], scale_tril=factor[rows]) for rows in (slice(4), slice(4, 6))]
    joined = concatenate((parameters_of(holding(chunk)) for chunk in chunks), 6)
    kl = kl_divergence(joined, parameters_of(holding(new)))
    reference = torch_kl_divergence(MultivariateNormal(mean, scale_tril=factor), new)
    th.testing.assert_close(kl, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_frozen_parameters_stay_when_the_policy_moves(name):
    policy, observations = make_policy(name), states(5)
    old = frozen(policy, observations)
    tensors = (*old.per_state, *old.shared)
    before = [tensor.clone() for tensor in tensors]
    stir(policy, 0.5)
    state = policy.state_dict()
    # Loading writes into the covariance in place
    policy.load_state_dict({key: 2 * value if key == "covariance" else value for key, value in state.items()})
    kl = frozen_kl(old, policy, observations)
    assert all(th.equal(tensor, copied) for tensor, copied in zip(tensors, before, strict=True))
    assert not any(tensor.requires_grad for tensor in tensors)
    assert kl.min() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_rows_and_chunks(name):
    policy, observations = make_policy(name), states(6)
    old = frozen(policy, observations)
    stir(policy, 0.3)
    whole = frozen_kl(old, policy, observations)
    index = th.tensor([4, 0, 4])
    th.testing.assert_close(
        frozen_kl(old._replace(per_state=tuple(t[index] for t in old.per_state)), policy, observations[index]), whole[index]
    )
    with th.no_grad():
        chunks = [parameters_of(policy.get_distribution(chunk)) for chunk in observations.split(4)]
    th.testing.assert_close(kl_divergence(old, concatenate(chunks, 6)), whole)


# --- the other direction, and both

LITERALS = {
    # two dimensions: from N(0, 1) to N(0, 4): ln 2 + 1/8 - 1/2 each, and back: -ln 2 + 4/2 - 1/2
    "Gaussian": (
        lambda: DiagGaussianDistribution(2).proba_distribution(th.zeros(1, 2), th.zeros(2)),
        lambda: DiagGaussianDistribution(2).proba_distribution(th.zeros(1, 2), th.full((2,), LN2)),
        (2 * 0.31814718, 2 * 0.80685282),
    ),
    # one half to three quarters: ln(2) / 2 + ln(2/3) / 2; back: ln(1/2) / 4 + 3 ln(3/2) / 4
    "categorical": (
        lambda: CategoricalDistribution(2).proba_distribution(double([0.0, 0.0])),
        lambda: CategoricalDistribution(2).proba_distribution(double([0.0, math.log(3)])),
        (0.14384104, 0.13081204),
    ),
    "three bits": (
        lambda: BernoulliDistribution(3).proba_distribution(double([0.0] * 3)),
        lambda: BernoulliDistribution(3).proba_distribution(double([math.log(3)] * 3)),
        (3 * 0.14384104, 3 * 0.13081204),
    ),
    # as in `test_full_covariance_against_the_identity`
    "full Gaussian": (
        lambda: holding(MultivariateNormal(double([0, 0]), scale_tril=double(*FACTOR))),
        lambda: holding(MultivariateNormal(double([1, 0]), scale_tril=th.eye(2, dtype=th.float64))),
        (0.95069386, 0.54930614),
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_directions_by_hand(name):
    make_old, make_new, (there, back) = LITERALS[name]
    old, new = parameters_of(make_old()), parameters_of(make_new())
    expected = {"old_new": there, "new_old": back, "symmetric": (there + back) / 2}
    for direction, value in expected.items():
        assert directed_divergence(old, new, direction).tolist() == pytest.approx([value], rel=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_monte_carlo_the_other_way(name):
    """Actions of the new policy: E[log p_new - log p_old]."""
    policy, moved = make_policy(name), make_policy(name)
    observations = states(1).repeat_interleave(20_000, dim=0)
    stir(moved, 0.3)
    with th.no_grad():
        if policy.use_sde:
            moved.reset_noise(len(observations))
        old, new = policy.get_distribution(observations), moved.get_distribution(observations)
        there, back = (
            directed_divergence(parameters_of(old), parameters_of(new), direction)[0].item()
            for direction in ("old_new", "new_old")
        )
        actions = new.sample()
        log_ratio = (new.log_prob(actions) - old.log_prob(actions)).double()
    error = log_ratio.std().item() / math.sqrt(len(log_ratio))
    assert back > 10 * error
    assert log_ratio.mean().item() == pytest.approx(back, abs=4 * error)
    if not name.startswith("fixed"):  # their covariance does not change, so both directions agree
        assert abs(there - back) > 1e-4 * back


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("direction", ["new_old", "symmetric"])
def test_either_way_it_is_zero_at_the_old_policy_and_pulls_back_after_a_step(name, direction):
    policy, observations = make_policy(name), states(50)
    old = frozen(policy, observations)

    def pull() -> tuple[th.Tensor, float]:
        policy.zero_grad()
        kl = directed_divergence(old, parameters_of(policy.get_distribution(observations)), direction)
        kl.mean().backward()
        gradients = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]
        return kl, th.cat(gradients).abs().max().item()

    kl, steepest = pull()
    assert kl.tolist() == [0.0] * 50
    assert steepest < 1e-6
    stir(policy, 0.1)
    before, steepest = pull()
    assert before.shape == (50,)
    assert before.min() > -1e-6
    assert steepest > 1e-3
    th.optim.SGD(policy.parameters(), lr=1e-3).step()
    assert pull()[0].mean() < before.mean() - 1e-6


@pytest.mark.parametrize("masked", [-math.inf, -1e8])
@pytest.mark.parametrize("direction", ["new_old", "symmetric"])
def test_masked_actions_leave_the_gradient_finite_either_way(masked, direction):
    old = ActionParameters(kl_categorical, (double([0.0, masked, 0.0]),))
    logits = double([0.0, masked, math.log(3)]).requires_grad_()
    kl = directed_divergence(old, ActionParameters(kl_categorical, (logits,)), direction)
    kl.backward()
    back = [-3 / 16 * math.log(3), 0, 3 / 16 * math.log(3)]  # p'_i (log(p'_i / p_i) - KL)
    there = [-0.25, 0, 0.25]  # p' - p
    expected = back if direction == "new_old" else [(x + y) / 2 for x, y in zip(there, back, strict=True)]
    assert kl.item() == pytest.approx(0.13081204 if direction == "new_old" else (0.14384104 + 0.13081204) / 2)
    assert logits.grad.tolist()[0] == pytest.approx(expected)


def test_the_directions_agree_for_small_steps():
    policy, observations = make_policy("learned"), states(200)
    old = frozen(policy, observations)
    stir(policy, 3e-3)
    new = frozen(policy, observations)
    there, back, both = (directed_divergence(old, new, each).mean().item() for each in ("old_new", "new_old", "symmetric"))
    assert there > 1e-6
    assert [back, both] == pytest.approx([there, there], rel=0.02)


# --- squashing


def test_squashing_does_not_change_the_divergence():
    old, new = SquashedDiagGaussianDistribution(1), SquashedDiagGaussianDistribution(1)
    old.proba_distribution(double([0.2]), double([-0.7])[0])
    new.proba_distribution(double([-0.1]), double([-0.4])[0])

    def integrand(action: float) -> float:
        log_p, log_q = (distribution.log_prob(double([action])).item() for distribution in (old, new))
        return math.exp(log_p) * (log_p - log_q)

    squashed, _ = quad(integrand, -1 + 1e-9, 1 - 1e-9, epsabs=1e-7)
    assert squashed > 0.05
    assert kl_divergence(parameters_of(old), parameters_of(new)).item() == pytest.approx(squashed, rel=1e-3)


# --- classes that users add


class Exponential:
    """Waiting times, with a rate for each state and dimension."""

    def __init__(self, *rates: list[list[float]]) -> None:
        self.rates = [th.tensor(each, dtype=th.float64) for each in rates]


def kl_exponential(rate, new_rate):
    return ((rate / new_rate).log() + new_rate / rate - 1).sum(dim=-1)


def rates_of(distribution):
    yield from distribution.rates


@pytest.fixture
def waiting():
    """A class that no test has registered yet."""
    return type("Waiting", (Exponential,), {})


def test_a_class_that_is_registered_has_its_divergence_and_so_have_its_subclasses(waiting):
    register_divergence(waiting, rates_of, kl_exponential)
    for kind in (waiting, type("Subclass", (waiting,), {})):
        old, new = parameters_of(kind([[2, 1], [1, 1]])), parameters_of(kind([[1, 1], [2, 2]]))
        # ln 2 + 1/2 - 1 from rate 2 to 1; ln 1/2 + 2 - 1 from 1 to 2, in both dimensions
        assert kl_divergence(old, new).tolist() == pytest.approx([LN2 - 0.5, 2 * (1 - LN2)])
        assert (len(old.per_state), old.shared) == (1, ())


@pytest.mark.parametrize(("rates", "rows"), [([[[1]], [[1], [1]]], "[1, 2]"), ([], "[]")])
def test_parameters_of_a_registered_class_have_a_row_for_each_state(rates, rows, waiting):
    register_divergence(waiting, rates_of, kl_exponential)
    message = f"`parameters` must return tensors with a row for each state, got {rows} rows"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parameters_of(waiting(*rates))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, rates_of, kl_exponential), "`distribution_class` must be a class, got 7"),
        ((Exponential, 8, kl_exponential), "`parameters` must be a function, got 8"),
        ((Exponential, rates_of, 9), "`divergence` must be a function, got 9"),
    ],
)
def test_what_is_registered_is_checked(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        register_divergence(*arguments)


def test_a_divergence_without_a_name_is_told_by_its_class():
    named, nameless = (ActionParameters(kl, (th.ones(2, 1),)) for kl in (kl_exponential, partial(kl_exponential)))
    with pytest.raises(ValueError, match=r"^cannot compare exponential of 1 tensors with partial of 1$"):
        kl_divergence(named, nameless)


# --- what cannot be compared


def test_different_kinds():
    gaussian = parameters_of(DiagGaussianDistribution(2).proba_distribution(th.zeros(3, 2), th.zeros(2)))
    bits = parameters_of(BernoulliDistribution(2).proba_distribution(th.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"cannot compare diagonal_gaussian .*with bernoulli"):
        kl_divergence(gaussian, bits)


def test_different_numbers_of_categoricals():
    three = parameters_of(MultiCategoricalDistribution([2, 2, 2]).proba_distribution(th.zeros(4, 6)))
    one = parameters_of(CategoricalDistribution(2).proba_distribution(th.zeros(4, 2)))
    for old, new, counts in ((three, one, (3, 1)), (one, three, (1, 3))):
        message = "cannot compare categorical of {} tensors with categorical of {}".format(*counts)
        with pytest.raises(ValueError, match=f"^{message}$"):
            kl_divergence(old, new)


def test_an_odd_number_of_logits_is_no_pair_of_policies():
    with pytest.raises(ValueError, match="longer"):
        kl_categorical(*double([0, 0], [0, 0], [0, 0]).split(1))


@pytest.mark.parametrize("rows", [4, 6])
def test_batches_that_do_not_add_up_are_not_joined(rows):
    """With fewer rows some states would stay undefined, with more some would be lost."""
    batches = [(th.zeros(3), th.ones(3, 2)), (th.zeros(2), th.ones(2, 2))]
    with pytest.raises(ValueError, match=f"^the batches should have {rows} rows together$"):
        collect_rows(batches, rows)
    assert [tuple(column.shape) for column in collect_rows(batches, 5)] == [(5,), (5, 2)]
    assert collect_rows([], 0) == ()


def test_batches_of_different_kinds_are_not_joined():
    logits = double([0, 0])
    two, one = ActionParameters(kl_categorical, (logits, logits)), ActionParameters(kl_categorical, (logits,))
    for parts in ([two, one], [one, two]):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            concatenate(parts, 2)


@pytest.mark.parametrize(
    "inner",
    [Beta(th.ones(3, 2), th.ones(3, 2)), [Categorical(th.ones(3, 2)), Normal(th.zeros(3), th.ones(3))]],
    ids=["Beta", "a mixture of kinds"],
)
def test_unknown_distributions(inner):
    with pytest.raises(ValueError, match=r"no closed-form KL divergence is known .*DiagGaussianDistribution"):
        parameters_of(holding(inner))


def test_a_distribution_that_keeps_its_parts_elsewhere():
    """Such as sb3-contrib's masked distributions, until ``algorithms.maskable`` is imported and registers them."""

    class Elsewhere(MultiCategoricalDistribution):
        def proba_distribution(self, action_logits):
            self.distributions = super().proba_distribution(action_logits).distribution
            del self.distribution
            return self

    with pytest.raises(ValueError, match=r"no closed-form KL divergence is known .*Elsewhere"):
        parameters_of(Elsewhere([2, 3]).proba_distribution(th.zeros(4, 5)))
