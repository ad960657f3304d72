"""The Gaussian with fixed covariance against torch's Gaussians and SB3's."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import MultivariateNormal, Normal

from sb3_ppo_penalty import MlpPolicy
from sb3_ppo_penalty.policies.distributions import FixedGaussianDistribution, GaussianConstants, covariance_tensor

VARIANCES = [0.5, 0.1, 2.0]
FULL = [[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]]
COVARIANCES = pytest.mark.parametrize("covariance", [0.5, VARIANCES, FULL], ids=["isotropic", "diagonal", "full"])


def draw(rows: int, seed: int) -> th.Tensor:
    return th.randn(rows, 3, generator=th.Generator().manual_seed(seed))


def fixed_gaussian(mean: th.Tensor, covariance: object) -> FixedGaussianDistribution:
    constants = GaussianConstants.of(covariance_tensor(covariance, 3).float())
    return FixedGaussianDistribution(3).proba_distribution(mean, constants)


def torch_gaussian(mean: th.Tensor, covariance: object) -> MultivariateNormal:
    matrix = th.tensor(covariance) * (th.ones(3) if np.ndim(covariance) < 2 else 1)
    return MultivariateNormal(mean, matrix if matrix.dim() == 2 else matrix.diag())


# --- the distribution


def test_log_prob_by_hand():
    # One dimension's variance is 0.5 and 0.5 of it off the mean: -0.25 / (2 * 0.5) - ln(2 pi 0.5) / 2, three times
    distribution = fixed_gaussian(th.zeros(2, 3), 0.5)
    log_prob = distribution.log_prob(th.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]))
    assert log_prob.tolist() == pytest.approx([-0.75 - 1.5 * math.log(math.pi), -1.5 * math.log(math.pi)])


@COVARIANCES
def test_log_prob_and_entropy_are_torchs(covariance):
    mean, actions = draw(50, 0), draw(50, 1)
    distribution, reference = fixed_gaussian(mean, covariance), torch_gaussian(mean, covariance)
    th.testing.assert_close(distribution.log_prob(actions), reference.log_prob(actions), rtol=1e-6, atol=2e-6)
    assert distribution.entropy().shape == (50,)
    th.testing.assert_close(distribution.entropy(), reference.entropy(), rtol=1e-6, atol=1e-6)
    assert th.equal(distribution.mode(), mean)


@COVARIANCES
def test_log_prob_pulls_the_mean_as_torchs_does(covariance):
    gradients = []
    for make in (fixed_gaussian, torch_gaussian):
        mean = draw(5, 0).requires_grad_()
        make(mean, covariance).log_prob(draw(5, 1)).sum().backward()
        gradients.append(mean.grad)
    th.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variances", [[0.5, 0.5, 0.5], VARIANCES])
def test_it_is_sb3s_gaussian_with_the_same_stream(variances):
    mean = draw(40, 0)
    reference = DiagGaussianDistribution(3).proba_distribution(mean, 0.5 * th.tensor(variances).log())
    distribution = fixed_gaussian(mean, variances)
    actions = []
    for gaussian in (distribution, reference):
        th.manual_seed(3)
        actions.append(gaussian.sample())
    th.testing.assert_close(*actions, rtol=1e-6, atol=1e-6)
    th.testing.assert_close(distribution.log_prob(actions[0]), reference.log_prob(actions[0]), rtol=1e-6, atol=2e-6)
    th.testing.assert_close(distribution.entropy(), reference.entropy(), rtol=1e-6, atol=1e-6)
    assert th.equal(distribution.get_actions(deterministic=True), reference.get_actions(deterministic=True))


@COVARIANCES
def test_samples_have_the_covariance(covariance):
    th.manual_seed(0)
    count = 200_000
    samples = fixed_gaussian(th.tensor([1.0, -2.0, 3.0]).expand(count, 3), covariance).sample()
    expected = torch_gaussian(th.zeros(3), covariance).covariance_matrix
    # The variance of a sample covariance is (s_ii s_jj + s_ij^2) / n
    error = ((expected.diagonal()[:, None] * expected.diagonal() + expected.square()) / count).sqrt()
    assert ((samples.T.cov() - expected).abs() < 4 * error).all()
    assert ((samples.mean(dim=0) - th.tensor([1.0, -2.0, 3.0])).abs() < 4 * (expected.diagonal() / count).sqrt()).all()


@COVARIANCES
def test_samples_carry_the_gradient_of_the_mean(covariance):
    mean = draw(4, 0).requires_grad_()
    fixed_gaussian(mean, covariance).sample().sum().backward()
    assert mean.grad.tolist() == th.ones(4, 3).tolist()


@pytest.mark.parametrize(("covariance", "kind"), [(0.5, Normal), (VARIANCES, Normal), (FULL, MultivariateNormal)])
def test_torchs_own_object(covariance, kind):
    mean = draw(4, 0)
    inner = fixed_gaussian(mean, covariance).distribution
    assert type(inner) is kind
    assert th.equal(inner.mean, mean)
    reference = torch_gaussian(mean, covariance)
    th.testing.assert_close(inner.variance, reference.variance)
    if kind is MultivariateNormal:
        th.testing.assert_close(inner.covariance_matrix, reference.covariance_matrix)


def test_sb3s_one_call_forms():
    constants = GaussianConstants.of(th.tensor(FULL))
    mean = draw(4, 0)
    th.manual_seed(1)
    actions, log_prob = FixedGaussianDistribution(3).log_prob_from_params(mean, constants)
    th.testing.assert_close(log_prob, torch_gaussian(mean, FULL).log_prob(actions), rtol=1e-6, atol=2e-6)
    assert th.equal(FixedGaussianDistribution(3).actions_from_params(mean, constants, deterministic=True), mean)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_cannot_be_sampled(bad):
    mean = th.zeros(4, 3)
    mean[2, 1] = bad
    with pytest.raises(ValueError, match="mean action is not finite"):
        fixed_gaussian(mean, 0.5).sample()


def test_the_constants_keep_the_covariances_type():
    for dtype in (th.float32, th.float64):
        assert {constant.dtype for constant in GaussianConstants.of(th.tensor(FULL, dtype=dtype))} == {dtype}


def test_the_constants_by_hand():
    constants = GaussianConstants.of(th.tensor([[4.0, 2.0], [2.0, 5.0]]))
    assert constants.scale.tolist() == [[2, 0], [1, 2]]
    assert constants.whitening.tolist() == [[0.5, 0], [-0.25, 0.5]]
    # det = 16: ln(2 pi) + ln(16) / 2, and 1 more for the entropy of two dimensions
    assert constants.log_normalizer.item() == pytest.approx(math.log(2 * math.pi) + math.log(4))
    assert constants.entropy.item() == pytest.approx(math.log(2 * math.pi) + math.log(4) + 1)


def test_the_constants_are_worked_out_in_double_precision():
    # An almost singular matrix, whose determinant loses three digits in single precision
    matrix = th.tensor([[1.0, 0.9999], [0.9999, 1.0]])
    constants, exact = GaussianConstants.of(matrix), matrix.double().numpy()
    np.testing.assert_allclose(constants.whitening, np.linalg.inv(np.linalg.cholesky(exact)), rtol=2e-7)
    expected = math.log(2 * math.pi) + 0.5 * np.linalg.slogdet(exact)[1]
    assert constants.log_normalizer.item() == pytest.approx(expected, rel=2e-7)


# --- whole policies


def test_a_policy_acts_as_sb3s_with_the_same_spread():
    spaces_ = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (3,))
    outputs, observations = [], th.randn(100, 4, generator=th.Generator().manual_seed(0))
    for policy_class, arguments in ((MlpPolicy, {}), (ActorCriticPolicy, {"log_std_init": 0.5 * math.log(0.5)})):
        th.manual_seed(5)
        policy = policy_class(*spaces_, lambda _: 1e-3, **arguments)
        with th.no_grad():
            outputs.append((*policy(observations), *policy(observations, deterministic=True)))
            outputs[-1] += policy.evaluate_actions(observations, outputs[-1][0])
    for ours, reference in zip(*outputs, strict=True):
        th.testing.assert_close(ours, reference, rtol=1e-6, atol=2e-6)


# --- what may be asked for


@pytest.mark.parametrize(
    ("covariance", "expected"),
    [
        pytest.param(0.5, [0.5] * 3, id="number"),
        pytest.param(2, [2.0] * 3, id="integer"),
        pytest.param(np.float32(0.25), [0.25] * 3, id="numpy scalar"),
        pytest.param(th.tensor(0.25), [0.25] * 3, id="torch scalar"),
        pytest.param([0.5, 1, 2], [0.5, 1, 2], id="list"),
        pytest.param((0.5, 1, 2), [0.5, 1, 2], id="tuple"),
        pytest.param(np.array([0.5, 1, 2]), [0.5, 1, 2], id="array"),
        pytest.param(th.tensor([0.5, 1, 2], requires_grad=True), [0.5, 1, 2], id="tensor"),
        pytest.param(np.diag([0.5, 1, 2]), np.diag([0.5, 1, 2]).tolist(), id="matrix"),
    ],
)
def test_forms_of_a_covariance(covariance, expected):
    tensor = covariance_tensor(covariance, 3)
    assert tensor.dtype == th.float64
    assert not tensor.requires_grad
    assert tensor.tolist() == expected


def test_one_dimension_takes_every_form():
    assert covariance_tensor(0.5, 1).tolist() == [0.5]
    assert covariance_tensor([0.5], 1).tolist() == [0.5]
    assert covariance_tensor([[0.5]], 1).tolist() == [[0.5]]


def test_a_covariance_is_checked_as_single_precision_will_hold_it():
    assert covariance_tensor(0.1, 1).item() == np.float32(0.1)


def test_a_product_with_rounding_errors_is_symmetric_enough():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    product = rotation @ np.diag([0.1, 1, 3]) @ rotation.T
    assert covariance_tensor(product, 3).shape == (3, 3)
    # 2e-17 and -3e-17 where 0 is meant, beside variances of 1
    product = np.array([[1, 2e-17, 0.5], [-3e-17, 1, 0], [0.5, 0, 1]])
    assert covariance_tensor(product, 3).shape == (3, 3)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        pytest.param(0.0, "must be positive: a variance cannot be 0", id="zero"),
        pytest.param(-0.5, "must be positive: a variance cannot be -0.5", id="negative"),
        pytest.param([0.5, -1, 2], "must be positive: a variance cannot be -1", id="one negative"),
        pytest.param(1e-50, "must be positive", id="nothing left in single precision"),
        pytest.param(math.nan, "must be finite, got nan", id="nan"),
        pytest.param(math.inf, "must be finite, got inf", id="infinite"),
        pytest.param(1e39, "must be finite", id="infinite in single precision"),
        pytest.param([0.5, math.nan, 1], "must be finite", id="one nan"),
        pytest.param([[1, 0, 0], [0, math.inf, 0], [0, 0, 1]], "must be finite", id="infinity in a matrix"),
        pytest.param([0.5, 0.5], r"3 variances or a 3 x 3 matrix .* got shape \(2,\)", id="too short"),
        pytest.param([0.5], r"got shape \(1,\)", id="a list of one"),
        pytest.param([], r"got shape \(0,\)", id="empty"),
        pytest.param(np.eye(2), r"got shape \(2, 2\)", id="too small a matrix"),
        pytest.param(np.ones((3, 2)), r"got shape \(3, 2\)", id="not square"),
        pytest.param(np.ones((1, 3, 3)), r"got shape \(1, 3, 3\)", id="three axes"),
        pytest.param([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]], "must be symmetric", id="not symmetric"),
        pytest.param(-np.eye(3), "positive definite: its smallest eigenvalue is -1", id="negative definite"),
        pytest.param([[1, 2, 0], [2, 1, 0], [0, 0, 1]], "smallest eigenvalue is -1", id="indefinite"),
        pytest.param(np.ones((3, 3)), "positive definite", id="singular"),
        pytest.param("wide", "must be a number, a list or a square matrix, got 'wide'", id="a word"),
        pytest.param("0.5", "must be a number, a list or a square matrix, got '0.5'", id="a number in quotes"),
        pytest.param(True, "must be a number, a list or a square matrix, got True", id="a boolean"),
        pytest.param([[1], [1, 2]], "must be a number, a list or a square matrix", id="ragged"),
        pytest.param({"variance": 1}, "must be a number, a list or a square matrix", id="a dict"),
        pytest.param(1j, "must be a number, a list or a square matrix", id="complex"),
    ],
)
def test_what_is_no_covariance(covariance, message):
    with pytest.raises(ValueError, match=f"`covariance` must .*{message.removeprefix('must ')}"):
        covariance_tensor(covariance, 3)


def test_nearly_singular_matrices_are_refused_or_work():
    generator = np.random.default_rng(0)
    for _ in range(500):
        direction = np.round(generator.normal(size=3), 1)
        try:
            covariance = covariance_tensor(np.outer(direction, direction), 3)
        except ValueError:
            continue
        assert all(constant.isfinite().all() for constant in GaussianConstants.of(covariance))
