"""The loss of a minibatch: what is asked of the policy, and what is made of its answers."""

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_penalty.algorithms.files import PortableAlgorithm
from sb3_ppo_penalty.arguments import ArgumentError
from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.objectives.divergence import ActionParameters, UnknownDivergenceError, parameters_of
from sb3_ppo_penalty.rollouts.rollout import Observations, Transitions
from sb3_ppo_penalty.updates.evaluation import (
    Evaluator,
    acting,
    actor_and_critic_weights,
    example,
    example_actions,
    find_source,
)
from sb3_ppo_penalty.updates.step import ActorCriticWeights, LossSettings, Terms

LOGGER = logging.getLogger(__name__)


class LossAlgorithm(PortableAlgorithm):
    """An algorithm whose loss is the policy's objective, the critic's squared error and an entropy bonus."""

    clip_range: Any
    clip_range_vf: float | Schedule | None
    normalize_advantage: bool
    #: The critic's squared error
    _value_loss: ClassVar[Callable[..., th.Tensor]] = staticmethod(losses.value_loss)

    def _unpacked(self, observations: Observations) -> tuple[Any, dict[str, Any]]:
        """
        Take apart what a minibatch holds in the place of observations.

        :param observations: of a minibatch, or the environments' own
        :return: what the policy takes as observations, and what it takes besides, by name
        """
        return observations, {}

    def _observed(self, observations: Observations, source: Any) -> Observations:
        """
        Join to the observations what a minibatch needs besides; :meth:`_unpacked` takes it apart.

        :param observations: of a rollout or of a minibatch
        :param source: the buffer, flattened, or the sample that they come from
        :return: in the place of the observations
        """
        return observations

    def _evaluator(self, source: str | None) -> Evaluator:
        """
        Give what asks the policy about transitions.

        :param source: where the action distribution is found
        """
        return Evaluator(self.policy, self._unpacked, source)

    def _examples(self) -> tuple[Observations, th.Tensor]:
        """Give the last observations, or made-up ones, and actions that could be taken there."""
        last = example(self.observation_space, rows=2) if self._last_obs is None else self._last_obs
        observations, _ = self.policy.obs_to_tensor(last)
        some = next(iter(observations.values())) if isinstance(observations, dict) else observations
        return observations, example_actions(self.policy, rows=len(some))

    def _actor_and_critic(self) -> ActorCriticWeights:
        """Find the weights behind the actions' probabilities and those behind the value."""
        examples, actions = self._examples()
        observations, others = self._unpacked(examples)
        return actor_and_critic_weights(self.policy, observations, actions, **others)

    def _look_at_policy(self) -> None:
        """Find the policy's action distribution before there is a rollout; the rollout is asked again."""
        try:
            with acting(self.policy):
                self._distribution_source = self._find_source(*self._examples())
        except ArgumentError:
            raise
        except Exception as error:
            # Made-up observations may be none that the policy can take; a rollout's are
            LOGGER.debug("the policy's action distribution is not known before the first rollout: %s", error)

    def _find_source(self, observations: Observations, actions: th.Tensor) -> str | None:
        """
        Find where the policy's action distribution is.

        :param observations: shape (batch, *obs_shape), or one such tensor per key
        :param actions: as ``evaluate_actions`` takes them
        :return: see :func:`~.find_source`; None where no divergence is known
        """
        try:
            inputs, others = self._unpacked(observations)
            return find_source(self.policy, inputs, actions, **others)
        except UnknownDivergenceError as error:
            self._require_no_divergence(error)
        return None

    def _require_no_divergence(self, error: UnknownDivergenceError) -> None:
        """
        Do without the exact divergence, which serves nothing but the log; a subclass that needs it raises.

        :param error: says why it is not known
        """

    def _loss_settings(self) -> LossSettings:
        """Give what the loss of this update depends on besides weights and minibatch; a subclass adds its own."""
        return LossSettings(
            clip_range=self._scheduled(self.clip_range),
            clip_range_vf=self._scheduled(self.clip_range_vf),
            # Over the minibatch of all ranks, before the loss sees a part of it, if there are several
            normalize_advantage=self.normalize_advantage and self._ranks.size == 1,
            ent_coef=self.ent_coef or None,
            vf_coef=self.vf_coef,
            distribution=self._distribution_source,
        )

    def _scheduled(self, schedule: Any) -> float | None:
        """
        Ask a schedule for its present value.

        :param schedule: a ``FloatSchedule`` or None
        """
        return None if schedule is None else float(schedule(self._current_progress_remaining))

    def _evaluate(self, batch: Transitions, settings: LossSettings) -> Terms:
        """
        Work out the loss, from nothing but the policy and the arguments, so that it can be compiled.

        :param batch: the minibatch
        :param settings: of the loss
        """
        evaluation = self._evaluator(settings.distribution).ask(batch.observations, batch.actions)
        values, log_prob, entropy, distribution = evaluation
        advantages = losses.normalize_advantages(batch.advantages) if settings.normalize_advantage else batch.advantages
        ratio = losses.importance_ratio(log_prob, batch.old_log_prob)
        surrogate, objective = self._policy_objective(
            batch, ratio, advantages, settings, lambda: parameters_of(distribution())
        )
        value_loss = self._value_loss(values.flatten(), batch.returns, batch.old_values, settings.clip_range_vf)
        policy_loss = -objective
        loss = policy_loss + settings.vf_coef * value_loss
        if settings.ent_coef is not None:
            loss = loss + settings.ent_coef * losses.entropy_loss(entropy, log_prob)
        # For the log alone: no gradient
        surrogate_loss = policy_loss if surrogate is objective else -surrogate.detach()
        log_ratio, entropies = log_prob.detach() - batch.old_log_prob, losses.state_entropy(entropy, log_prob)
        return Terms(loss, surrogate_loss, policy_loss, value_loss, log_ratio, entropies)

    def _policy_objective(
        self,
        batch: Transitions,
        ratio: th.Tensor,
        advantages: th.Tensor,
        settings: LossSettings,
        parameters: Callable[[], ActionParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Work out what the policy maximises.

        It may depend on no attribute but the policy: a compiled graph would not see another change.

        :param batch: the minibatch that the policy has just evaluated
        :param ratio: importance ratios, shape (batch,)
        :param advantages: normalised if asked for, shape (batch,)
        :param settings: of the loss
        :param parameters: gives the action distributions of that evaluation, with their gradient
        :return: the surrogate, and the objective made of it; two scalars
        """
        raise NotImplementedError
