"""
Gaussian action distribution whose covariance is not learned: isotropic, diagonal or full.

The article is named in :mod:`sb3_ppo_penalty.objectives`.
"""

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from sb3_ppo_penalty.arguments import require
from sb3_ppo_penalty.objectives.divergence import ActionParameters, kl_fixed_diagonal, kl_fixed_full, parameters_of

SelfFixedGaussian = TypeVar("SelfFixedGaussian", bound="FixedGaussianDistribution")

#: Variance of every action dimension in the article, section 5, in the squared unit of the action
DEFAULT_VARIANCE = 0.5


def covariance_tensor(covariance: Any, action_dim: int) -> th.Tensor:
    """
    Check a covariance and return it as one variance per action dimension or as a matrix.

    :param covariance: one variance for all action dimensions, one variance per dimension, or a full symmetric
        positive-definite matrix; in the squared unit of the action
    :param action_dim: number of action dimensions
    :return: variances, shape (action_dim,), or the matrix, shape (action_dim, action_dim); float64
    :raises ValueError: for a wrong shape, a value that is not finite or not positive, an asymmetric or indefinite matrix
    """
    try:
        values = np.array(covariance.tolist() if isinstance(covariance, th.Tensor) else covariance)
    except ValueError:  # rows of unequal lengths: refused below as any other object
        values = np.array(None)
    require(values.dtype.kind in "iuf", "covariance", covariance, "a number, a list or a square matrix")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32).astype(np.float64)  # the policy holds float32
    if values.ndim == 0:
        values = np.full(action_dim, values)
    if values.shape not in ((action_dim,), (action_dim, action_dim)):
        raise ValueError(
            f"`covariance` must be one variance, {action_dim} variances or a {action_dim} x {action_dim} matrix "
            f"for this action space, got shape {values.shape}"
        )
    require(bool(np.isfinite(values).all()), "covariance", covariance, "finite")
    if values.ndim == 1 and (values <= 0).any():
        raise ValueError(f"`covariance` must be positive: a variance cannot be {values.min():g}")
    if values.ndim == 2:
        _check_matrix(values)
    return th.as_tensor(values)


def _check_matrix(values: np.ndarray[Any, Any]) -> None:
    """
    Require a covariance matrix to be symmetric and positive definite, up to rounding errors.

    :param values: finite square matrix
    :raises ValueError: if it is not
    """
    deviations = np.sqrt(np.abs(values.diagonal()))
    # A product R D R^T has asymmetric rounding errors in place of zeros: small compared to the variances, not to each other
    if (np.abs(values - values.T) > 1e-6 * np.outer(deviations, deviations)).any():
        raise ValueError(f"`covariance` must be symmetric, got {values.tolist()}")
    eigenvalues = np.linalg.eigvalsh(values)
    if eigenvalues.min() <= len(values) * np.finfo(np.float64).eps * np.abs(eigenvalues).max():
        raise ValueError(f"`covariance` must be positive definite: its smallest eigenvalue is {eigenvalues.min():g}")


class GaussianConstants(NamedTuple):
    """
    Constants of a Gaussian that depend on the covariance alone, computed once instead of at every call.

    :param scale: standard deviations, shape (action_dim,), or the lower Cholesky factor, shape (action_dim, action_dim)
    :param whitening: inverse of ``scale`` (of each number, or of the matrix), same shape
    :param log_normalizer: log of the density's denominator, ``(d log(2 pi) + log det S) / 2``, scalar
    :param entropy: ``(d (1 + log(2 pi)) + log det S) / 2``, scalar, in nats
    """

    scale: th.Tensor
    whitening: th.Tensor
    log_normalizer: th.Tensor
    entropy: th.Tensor

    @classmethod
    def of(cls, covariance: th.Tensor) -> "GaussianConstants":
        """
        Compute the constants in float64 and return them in the covariance's type.

        :param covariance: variances, shape (action_dim,), or the matrix, shape (action_dim, action_dim)
        :return: constants on the covariance's device
        """
        exact = covariance.double().cpu()
        if exact.dim() == 1:
            scale = deviations = exact.sqrt()
            whitening = 1 / scale
        else:
            scale = th.linalg.cholesky(exact)
            deviations = scale.diagonal()
            whitening = th.linalg.solve_triangular(scale, th.eye(len(scale), dtype=scale.dtype), upper=False)
        log_normalizer = deviations.log().sum() + 0.5 * len(deviations) * math.log(2 * math.pi)
        constants = (scale, whitening, log_normalizer, log_normalizer + 0.5 * len(deviations))
        return cls(*(constant.to(covariance) for constant in constants))


class FixedGaussianDistribution(DiagGaussianDistribution):
    """
    Gaussian ``N(mean, S)`` with a covariance S that is not learned (the article, section 5, has ``S = 0.5 I``).

    It replaces SB3's ``DiagGaussianDistribution`` and draws the same random numbers in the same order.

    :param action_dim: number of action dimensions
    """

    def __init__(self, action_dim: int):
        super().__init__(action_dim)
        self._mean: th.Tensor
        self.constants: GaussianConstants

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> tuple[nn.Module, Any]:
        """
        Make the layer that outputs the mean.

        :param latent_dim: width of the policy's last hidden layer
        :param log_std_init: ignored, the covariance is an argument of :meth:`proba_distribution`
        :return: the layer, and None in place of SB3's learned ``log_std``
        """
        return nn.Linear(latent_dim, self.action_dim), None

    def proba_distribution(  # type: ignore[override]
        self: SelfFixedGaussian, mean_actions: th.Tensor, constants: GaussianConstants
    ) -> SelfFixedGaussian:
        """
        Set the parameters of the distribution.

        :param mean_actions: means of the actions, shape (batch, action_dim)
        :param constants: constants of the covariance
        :return: self
        """
        self._mean, self.constants = mean_actions, constants
        return self

    @property
    def distribution(self) -> Normal | MultivariateNormal:  # type: ignore[override]
        """Same distribution as an object of torch, which sb3-contrib's TRPO asks for."""
        scale = self.constants.scale
        if scale.dim() == 1:
            return Normal(self._mean, scale, validate_args=False)
        return MultivariateNormal(self._mean, scale_tril=scale, validate_args=False)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Return the log-density of actions: ``-|L^-1 (a - mean)|^2 / 2 - log_normalizer`` with ``L L^T = S``.

        :param actions: actions, one per mean, shape (batch, action_dim)
        :return: log-densities, shape (batch,)
        """
        difference, whitening = actions - self._mean, self.constants.whitening
        white = difference * whitening if whitening.dim() == 1 else difference @ whitening.mT
        return -0.5 * white.square().sum(dim=1) - self.constants.log_normalizer

    def entropy(self) -> th.Tensor:
        """
        Return the entropy in each state, which depends on the covariance alone.

        :return: the same entropy for all states, shape (batch,), in nats
        """
        return self.constants.entropy.expand(len(self._mean))

    def sample(self) -> th.Tensor:
        """
        Draw an action for each state, differentiable in the mean.

        :return: ``mean + L noise``, shape (batch, action_dim)
        :raises ValueError: if a mean is not finite, as torch's own Normal does
        """
        return self._mean + self._scale_noise(self._noise())

    def sample_with_log_prob(self) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw actions and return their log-densities from the same noise: ``-|noise|^2 / 2 - log_normalizer``.

        :return: actions, shape (batch, action_dim), and their log-densities, shape (batch,)
        :raises ValueError: if a mean is not finite
        """
        noise = self._noise()
        return self._mean + self._scale_noise(noise), -0.5 * noise.square().sum(dim=1) - self.constants.log_normalizer

    def get_actions(self, deterministic: bool = False) -> th.Tensor:
        """
        Return the mean or draw an action in each state.

        :param deterministic: whether to return the mean
        :return: actions, shape (batch, action_dim)
        :raises ValueError: if a mean is not finite
        """
        if deterministic:
            # Not in `mode`, which the divergence reads after every evaluation: the check would make the device wait
            self._require_finite_mean()
        actions: th.Tensor = super().get_actions(deterministic)
        return actions

    def _require_finite_mean(self) -> None:
        """
        Require all means to be finite, except in a compiled graph, which cannot branch on a value.

        :raises ValueError: if a mean is not finite
        """
        if th.compiler.is_compiling():
            return
        # The sum is cheaper to look at; it can overflow although all means are finite, so each is looked at then
        if not math.isfinite(self._mean.sum().item()) and not th.isfinite(self._mean).all():
            raise ValueError(f"the policy's mean action is not finite: {self._mean}")

    def _noise(self) -> th.Tensor:
        """
        Draw standard normal noise for each state.

        :return: noise, shape (batch, action_dim)
        :raises ValueError: if a mean is not finite
        """
        self._require_finite_mean()
        return th.randn_like(self._mean)

    def _scale_noise(self, noise: th.Tensor) -> th.Tensor:
        """
        Give standard normal noise the covariance of the distribution.

        :param noise: standard normal noise, shape (batch, action_dim)
        :return: ``L noise``, same shape
        """
        scale = self.constants.scale
        return noise * scale if scale.dim() == 1 else noise @ scale.mT

    def mode(self) -> th.Tensor:
        """
        Return the most likely action in each state, the mean.

        :return: means, shape (batch, action_dim)
        """
        return self._mean


@parameters_of.register
def _(distribution: FixedGaussianDistribution) -> ActionParameters:
    """Take the means and the shared covariance out of the distribution."""
    scale, whitening = distribution.constants.scale, distribution.constants.whitening
    return ActionParameters(
        kl_fixed_diagonal if scale.dim() == 1 else kl_fixed_full, (distribution.mode(),), (scale, whitening)
    )
