"""SB3's actor-critic policies with a Gaussian whose covariance does not learn (the document, section 5)."""

import inspect
import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_ppo_penalty.policies.distributions import (
    DEFAULT_VARIANCE,
    FixedGaussianDistribution,
    GaussianConstants,
    covariance_tensor,
)

#: What SB3's policies take after the two spaces and the schedule, in SB3's order
SB3_ARGUMENTS = tuple(inspect.signature(ActorCriticPolicy.__init__).parameters)[4:]

#: What stands in for a policy's `mean_and_value` for a while. Not on the policy, so that no copy and no file of it has it
FORWARD_OVERRIDES: WeakKeyDictionary[nn.Module, Callable[[Any], tuple[th.Tensor, th.Tensor]]] = WeakKeyDictionary()


def covariance_mismatch(own: Container[str], found: Container[str]) -> str | None:
    """
    Say why weights do not fit where the covariance of one policy's Gaussian learns and that of the other's is fixed.

    :param own: names in the ``state_dict`` of the policy that is to hold the weights
    :param found: names of the weights
    :return: what to build the policy with; None if this is not the matter
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
    Choose torch's fused Adam, one kernel for all weights instead of a dozen for each, where nothing else was chosen.

    :param optimizer_kwargs: a user's; None for SB3's own, which is an ``eps`` of 1e-5
    :return: the same with ``fused=True``, unless they choose another implementation, with which torch refuses it
    """
    options = {"eps": 1e-5} if optimizer_kwargs is None else optimizer_kwargs
    other = options.get("foreach") is not None or options.get("differentiable", False)
    return dict(options) if other else {"fused": True, **options}


class FixedCovarianceMixin(ActorCriticPolicy):
    """
    Gives an actor-critic policy of SB3, on Box action spaces, the distribution ``N(mean(s), S)`` with a constant S.

    On other action spaces, and with ``use_sde=True``, the policy is SB3's own, and everywhere its Adam is torch's fused one
    (``optimizer_kwargs=dict(fused=False)`` is SB3's, to the last bit). The mean is not squashed; SB3 clips actions to
    the space's bounds before the environment sees them.

    :param observation_space: as in SB3
    :param action_space: as in SB3
    :param lr_schedule: as in SB3
    :param args: SB3's further arguments, in SB3's order
    :param covariance: S: one variance for all action dimensions, one per dimension, or a symmetric positive-definite
        matrix of shape (action_dim, action_dim), in the squared unit of the action. Default: 0.5, the document's; or
        ``exp(2 * log_std_init)`` where SB3's ``log_std_init`` is given instead. A schedule, as ``learning_rate`` may be, is
        asked before each rollout with the remaining progress, which goes from 1 to 0, and returns any of these: see
        :meth:`update_covariance`
    :param learn_covariance: start at ``covariance`` (variances only) and learn SB3's ``log_std`` from there
    :param kwargs: SB3's further arguments by name
    :raises ValueError: for a covariance of the wrong shape, not positive definite or not finite, and for one given together
        with ``use_sde``, ``log_std_init`` or an action space that is not a Box; a schedule is asked for both ends
    """

    #: Each class's name in saved files, which stays: SB3 writes a class's own attributes beside its pickle, but not its name
    saved_as: ClassVar[str]
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
        # Named, so that a `log_std_init` in SB3's place is seen
        kwargs.update(zip(SB3_ARGUMENTS, args, strict=False))
        if not isinstance(learn_covariance, bool):
            raise ValueError(f"`learn_covariance` must be True or False, got {learn_covariance!r}")
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
        """Whether the action distribution is the Gaussian of this module rather than one of SB3's."""
        return isinstance(self.action_dist, FixedGaussianDistribution)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Build SB3's networks and optimizer around the distribution asked for.

        :param lr_schedule: its value at 1 is the initial learning rate
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
        :param progress_remaining: from 1 to 0
        :return: what was asked for, or the schedule's answer, checked
        :raises ValueError: if that is no covariance
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
        :param covariance: of a schedule
        :raises ValueError: if it is a matrix where its first answer was variances, or the other way round
        """
        if covariance.shape != self.covariance.shape:
            shapes = f"{tuple(covariance.shape)} after {tuple(self.covariance.shape)}"
            raise ValueError(f"`covariance` must be a schedule of one shape, got {shapes}")

    def update_covariance(self, progress_remaining: float) -> None:
        """
        Take the covariance that the schedule has for this moment; where ``covariance`` is no schedule, do nothing.

        This package's algorithms call it before each rollout, so that the covariance is the same during the rollout and the
        update made of it. With another algorithm call it in a callback's ``_on_rollout_start``. What ``policy.save`` keeps is
        the covariance of the moment; ``model.save`` also keeps the schedule.

        :param progress_remaining: from 1 to 0; below it, where SB3's training has overshot ``total_timesteps``, counts as 0
        :raises ValueError: if the schedule's answer is no covariance
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
        As in SB3; warns if training begins and nobody has told the schedule how far it is.

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
        """Derive from the covariance what every call needs; what does not change stays the very same tensor."""
        constants = {f"_{name}": constant for name, constant in GaussianConstants.of(self.covariance)._asdict().items()}
        variances = self.covariance if self.covariance.dim() == 1 else self.covariance.diagonal()
        # Of each dimension by itself: SB3 logs the mean of its exponential as train/std
        constants["log_std"] = 0.5 * variances.log()
        for name, constant in constants.items():
            known = getattr(self, name, None)
            if known is None or not th.equal(known, constant):
                self.register_buffer(name, constant, persistent=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Load weights, as torch does; the error says what to do where only one of two covariances learns.

        :param state_dict: tensors by name
        :param strict: whether the names have to be those of this policy
        :param assign: whether to keep the tensors given rather than to copy them
        :return: the names that were missing and those that were not expected
        :raises RuntimeError: if names or shapes do not fit
        """
        mismatch = covariance_mismatch(self.state_dict().keys(), state_dict.keys()) if strict else None
        if mismatch:
            raise RuntimeError(f"the weights do not fit {type(self).__name__}: {mismatch}")
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Let the constants follow a covariance that was loaded."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.has_fixed_covariance:
            self._update_constants()

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Act, as SB3's policy does, in fewer operations where the covariance is fixed.

        :param obs: shape (batch, *obs_shape), or one such tensor per key
        :param deterministic: whether to take the mean
        :return: actions, shape (batch, *action_shape); values, shape (batch, 1); log-probabilities, shape (batch,)
        """
        if not self.has_fixed_covariance or deterministic:
            actions, values, log_prob = super().forward(obs, deterministic)
            return actions, values, log_prob
        mean, values = FORWARD_OVERRIDES.get(self, self.mean_and_value)(obs)
        assert isinstance(self.action_space, spaces.Box)
        assert isinstance(self.action_dist, FixedGaussianDistribution)
        actions, log_prob = self.action_dist.proba_distribution(mean, self._constants()).sample_with_log_prob()
        return actions.reshape(-1, *self.action_space.shape), values, log_prob

    def mean_and_value(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        All that the networks do to act, where the covariance is fixed.

        :param obs: shape (batch, *obs_shape), or one such tensor per key
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
        """:return: of the covariance, where they are now."""
        return GaussianConstants(self._scale, self._whitening, self._log_normalizer, self._entropy)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        if not self.has_fixed_covariance:
            return super()._get_action_dist_from_latent(latent_pi)
        return self.action_dist.proba_distribution(self.action_net(latent_pi), self._constants())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        # SB3 leaves this one out, and a policy with two extractors comes back with one
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
