"""
SB3's actor-critic policies with a Gaussian action distribution whose covariance is not learned (the article, section 5).

The article is named in :mod:`sb3_ppo_penalty.objectives`.
"""

import inspect
import warnings
from collections.abc import Container, Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_penalty.arguments import require
from sb3_ppo_penalty.policies.distributions import (
    DEFAULT_VARIANCE,
    FixedGaussianDistribution,
    GaussianConstants,
    covariance_tensor,
)

#: Names of SB3's constructor arguments after the two spaces and the schedule, in SB3's order
SB3_ARGUMENTS = tuple(inspect.signature(ActorCriticPolicy.__init__).parameters)[4:]


def covariance_mismatch(own: Container[str], found: Container[str]) -> str | None:
    """
    Explain why weights do not fit a policy if one has a learned covariance and the other a fixed one.

    :param own: names in the ``state_dict`` of the policy that is to hold the weights
    :param found: names of the weights
    :return: explanation with a remedy, as the end of an error message; None if the covariances are not the reason
    """
    if "covariance" in own and "log_std" in found:
        remedy = "`policy_kwargs=dict(learn_covariance=True)`"
        return f"they are of a policy that learns `log_std`, as SB3's does: build this one with {remedy}"
    if "log_std" in own and "covariance" in found:
        remedy = "this package's policy, without `learn_covariance`"
        return f"they are of a policy with a fixed `covariance`, which is this package's: build this one with {remedy}"
    return None


def with_fused_adam(optimizer_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """
    Choose torch's fused Adam, one kernel for all weights instead of a dozen for each, unless the user chose another.

    :param optimizer_kwargs: user's arguments of Adam; None for SB3's default, an ``eps`` of 1e-5
    :return: the arguments with ``fused=True``; unchanged if they ask for an implementation that excludes it
    """
    options = {"eps": 1e-5} if optimizer_kwargs is None else optimizer_kwargs
    other = options.get("foreach") is not None or options.get("differentiable", False)
    return dict(options) if other else {"fused": True, **options}


class FixedCovarianceMixin(ActorCriticPolicy):
    """
    Gives an actor-critic policy of SB3, on Box action spaces, the distribution ``N(mean(s), S)`` with a constant S.

    On other action spaces, and with ``use_sde=True``, the distribution is SB3's. The optimizer is torch's fused Adam in all
    cases; ``optimizer_kwargs=dict(fused=False)`` gives SB3's results to the last bit. The mean is not squashed; SB3 clips
    actions to the space's bounds before the environment gets them.

    :param observation_space: space of the observations
    :param action_space: space of the actions
    :param lr_schedule: learning rate as a function of the remaining progress
    :param args: SB3's further arguments, in SB3's order
    :param covariance: S: one variance for all action dimensions, one per dimension, or a symmetric positive-definite
        matrix of shape (action_dim, action_dim), in the squared unit of the action. Default: 0.5, the article's, or
        ``exp(2 * log_std_init)`` if SB3's ``log_std_init`` is given. Also a schedule, like ``learning_rate``: a function that
        is called before each rollout with the remaining progress, from 1 to 0, and returns any of these, see
        :meth:`update_covariance`
    :param learn_covariance: whether to learn the variances (SB3's ``log_std``) from ``covariance`` on, which is no matrix then
    :param kwargs: SB3's further arguments by name
    :raises ValueError: for a covariance of the wrong shape, not positive definite or not finite (a schedule is called for both
        ends), and for one given together with ``use_sde``, ``log_std_init`` or an action space that is not a Box
    """

    #: Name of the class in saved files; never changes. SB3 writes the attributes of a class beside its pickle, not its name
    saved_as: ClassVar[str]
    #: Names of the constructor's further arguments in their order
    argument_names: ClassVar[tuple[str, ...]] = SB3_ARGUMENTS
    covariance: th.Tensor
    _scale: th.Tensor
    _whitening: th.Tensor
    _log_normalizer: th.Tensor
    _entropy: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        covariance: Any = None,
        learn_covariance: bool = False,
        **kwargs: Any,
    ) -> None:
        # By name from here on, so that a positional `log_std_init` is found
        kwargs.update(zip(self.argument_names, args, strict=False))
        require(isinstance(learn_covariance, bool), "learn_covariance", learn_covariance, "True or False")
        self.learn_covariance = learn_covariance
        if covariance is not None and "log_std_init" in kwargs:
            raise ValueError("`covariance` and `log_std_init` both set the starting spread: give one of them")
        self._requested_covariance = covariance
        self._schedule_not_followed = callable(covariance)
        if covariance is None and "log_std_init" in kwargs:
            with np.errstate(over="ignore"):
                self._requested_covariance = float(np.exp(2 * kwargs["log_std_init"]))
            if not 0 < self._requested_covariance < np.inf:
                raise ValueError(f"`log_std_init` must give a positive finite spread, got {kwargs['log_std_init']!r}")
        self._covariance_was_given = covariance is not None or learn_covariance
        chosen = kwargs.get("optimizer_kwargs")
        if kwargs.get("optimizer_class", th.optim.Adam) is th.optim.Adam:
            kwargs["optimizer_kwargs"] = with_fused_adam(chosen)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        if "fused" not in (chosen or {}) and not all(weight.is_floating_point() for weight in self.parameters()):
            # The fused kernel takes no complex weight
            self.optimizer_kwargs.pop("fused", None)
            for group in self.optimizer.param_groups:
                group["fused"] = None

    @property
    def has_fixed_covariance(self) -> bool:
        """Whether the action distribution is the Gaussian with fixed covariance rather than one of SB3's."""
        return isinstance(self.action_dist, FixedGaussianDistribution)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Build SB3's networks and optimizer around the action distribution.

        :param lr_schedule: learning rate as a function of the remaining progress; its value at 1 is the initial one
        """
        gaussian = isinstance(self.action_space, spaces.Box) and not self.use_sde
        if not gaussian:
            if self._covariance_was_given:
                where = "use_sde=True" if self.use_sde else f"the action space {self.action_space}"
                raise ValueError(f"`covariance` and `learn_covariance` have no meaning with {where}: leave them out")
            super()._build(lr_schedule)
            return
        action_dim = get_action_dim(self.action_space)
        covariance = self._covariance_at(1.0)
        if self.learn_covariance:
            if callable(self._requested_covariance):
                raise ValueError("`covariance` must be no schedule with `learn_covariance`: it is where learning starts")
            if covariance.dim() == 2:
                raise ValueError("`covariance` must be given as variances with `learn_covariance`: only a diagonal learns")
            super()._build(lr_schedule)
            self.log_std.data.copy_(0.5 * covariance.log())
            return
        self.action_dist = FixedGaussianDistribution(action_dim)
        self.register_buffer("covariance", covariance.float())
        self.register_buffer("log_std", None, persistent=False)
        super()._build(lr_schedule)
        self._update_constants()
        self._check_covariance_shape(self._covariance_at(0.0))

    def _covariance_at(self, progress_remaining: float) -> th.Tensor:
        """
        Return the requested covariance, or its schedule's value, after checking it.

        :param progress_remaining: remaining progress, from 1 to 0
        :return: variances, shape (action_dim,), or the matrix, shape (action_dim, action_dim)
        :raises ValueError: if it is not a covariance
        """
        requested = DEFAULT_VARIANCE if self._requested_covariance is None else self._requested_covariance
        action_dim = get_action_dim(self.action_space)
        if not callable(requested):
            return covariance_tensor(requested, action_dim)
        try:
            return covariance_tensor(requested(progress_remaining), action_dim)
        except ValueError as error:
            raise ValueError(f"{error} (the schedule's answer at a remaining progress of {progress_remaining:g})") from error

    def _check_covariance_shape(self, covariance: th.Tensor) -> None:
        """
        Require a schedule to return variances always, or matrices always.

        :param covariance: value of the schedule
        :raises ValueError: if it has another shape than the first one
        """
        if covariance.shape != self.covariance.shape:
            shapes = f"{tuple(covariance.shape)} after {tuple(self.covariance.shape)}"
            raise ValueError(f"`covariance` must be a schedule of one shape, got {shapes}")

    def update_covariance(self, progress_remaining: float) -> None:
        """
        Set the covariance to the schedule's value; does nothing if ``covariance`` is no schedule.

        This package's algorithms call it before each rollout, so that the covariance is the same during a rollout and its
        update. For other algorithms call it in a callback's ``_on_rollout_start``. ``policy.save`` writes the present
        covariance; ``model.save`` also writes the schedule.

        :param progress_remaining: remaining progress, from 1 to 0; SB3 goes below 0 at the end, which counts as 0
        :raises ValueError: if the schedule's value is not a covariance
        """
        if not callable(self._requested_covariance):
            return
        self._schedule_not_followed = False
        covariance = self._covariance_at(min(max(progress_remaining, 0.0), 1.0))
        self._check_covariance_shape(covariance)
        self.covariance.copy_(covariance)
        self._update_constants()

    def set_training_mode(self, mode: bool) -> None:
        """
        Set training or evaluation mode, and warn if training begins with a schedule that nothing has called.

        :param mode: whether the policy is about to be trained
        """
        if mode and self._schedule_not_followed:
            self._schedule_not_followed = False
            warnings.warn(
                "`covariance` is a schedule, but this algorithm does not follow it: it stays at its first value. Take "
                "PPOPenalty or PPOClip, or call `policy.update_covariance` from a callback before each rollout",
                UserWarning,
                stacklevel=2,
            )
        super().set_training_mode(mode)

    def _update_constants(self) -> None:
        """Compute the constants of the covariance; the ones that did not change stay the same tensors."""
        constants = {f"_{name}": constant for name, constant in GaussianConstants.of(self.covariance)._asdict().items()}
        variances = self.covariance if self.covariance.dim() == 1 else self.covariance.diagonal()
        # Each dimension's own standard deviation: SB3 logs the mean of its exponential as train/std
        constants["log_std"] = 0.5 * variances.log()
        for name, constant in constants.items():
            known = getattr(self, name, None)
            if known is None or not th.equal(known, constant):
                self.register_buffer(name, constant, persistent=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Load weights; the error has a remedy if one covariance is learned and the other fixed.

        :param state_dict: tensors by name
        :param strict: whether the names must be those of this policy
        :param assign: whether to keep the passed tensors rather than copy them
        :return: missing names and unexpected names, as torch returns them
        :raises RuntimeError: if names or shapes do not fit
        """
        mismatch = covariance_mismatch(self.state_dict().keys(), state_dict.keys()) if strict else None
        if mismatch:
            raise RuntimeError(f"the weights do not fit {type(self).__name__}: {mismatch}")
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the tensors and compute the constants of the loaded covariance."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.has_fixed_covariance:
            self._update_constants()

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Return actions, values and log-probabilities as SB3's policy does, in fewer operations if the covariance is fixed.

        :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
        :param deterministic: whether to return the mean actions
        :return: actions, shape (batch, *action_shape); values, shape (batch, 1); log-probabilities, shape (batch,)
        """
        if not self.has_fixed_covariance or deterministic:
            actions, values, log_prob = super().forward(obs, deterministic)
            return actions, values, log_prob
        mean, values = self.mean_and_value(obs)
        assert isinstance(self.action_space, spaces.Box)
        assert isinstance(self.action_dist, FixedGaussianDistribution)
        actions, log_prob = self.action_dist.proba_distribution(mean, self._constants()).sample_with_log_prob()
        return actions.reshape(-1, *self.action_space.shape), values, log_prob

    def mean_and_value(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute the mean actions and the values, which is all that the networks do in :meth:`forward`.

        :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
        :return: mean actions, shape (batch, action_dim), and values, shape (batch, 1)
        """
        features = self.extract_features(obs)
        if self.share_features_extractor:
            latent_pi, latent_vf = self.mlp_extractor(features)
        else:
            latent_pi = self.mlp_extractor.forward_actor(features[0])
            latent_vf = self.mlp_extractor.forward_critic(features[1])
        return self.action_net(latent_pi), self.value_net(latent_vf)

    def _constants(self) -> GaussianConstants:
        """Return the constants of the present covariance."""
        return GaussianConstants(self._scale, self._whitening, self._log_normalizer, self._entropy)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        """
        Return the action distributions in a batch of states.

        :param latent_pi: output of the policy network's last hidden layer, shape (batch, width)
        :return: SB3's mutable distribution object
        """
        if not self.has_fixed_covariance:
            return super()._get_action_dist_from_latent(latent_pi)
        return self.action_dist.proba_distribution(self.action_net(latent_pi), self._constants())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return the arguments that build this policy again, for ``policy.save``."""
        data = super()._get_constructor_parameters()
        # SB3 omits this argument, so that a saved policy with two extractors would be loaded with one
        data["share_features_extractor"] = self.share_features_extractor
        if self.has_fixed_covariance or self.learn_covariance:
            del data["log_std_init"]
            spread = self.covariance if self.has_fixed_covariance else (2 * self.log_std).exp()
            data.update(covariance=spread.tolist(), learn_covariance=self.learn_covariance)
        return data


class MlpPolicy(FixedCovarianceMixin, ActorCriticPolicy):
    """SB3's ``MlpPolicy`` with a fixed covariance: see :class:`FixedCovarianceMixin` for the arguments it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.MlpPolicy"


class CnnPolicy(FixedCovarianceMixin, ActorCriticCnnPolicy):
    """SB3's ``CnnPolicy`` with a fixed covariance: see :class:`FixedCovarianceMixin` for the arguments it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.CnnPolicy"


class MultiInputPolicy(FixedCovarianceMixin, MultiInputActorCriticPolicy):
    """SB3's ``MultiInputPolicy`` with a fixed covariance: see :class:`FixedCovarianceMixin` for the arguments it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.MultiInputPolicy"
