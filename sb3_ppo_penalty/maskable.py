"""
PPO with an adaptive KL penalty where some actions are not allowed in some states, with sb3-contrib's policies and buffers.

Nothing of sb3-contrib is repeated: the masks travel with the observations, so that whatever cuts, shuffles or compiles
minibatches needs to know nothing of them. The package does not import this module: sb3-contrib takes its time.
"""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.distributions import MaskableDistribution, MaskableMultiCategoricalDistribution
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty.arguments import require
from sb3_ppo_penalty.divergence import ActionParameters, kl_categorical, parameters_of
from sb3_ppo_penalty.ppo_penalty import PPOPenalty
from sb3_ppo_penalty.rollout import Rollout

#: Under these keys an observation and the mask of its actions are kept together: none that an environment would use
OBSERVATION, MASKS = "<observation>", "<action_masks>"


@parameters_of.register
def _(distribution: MaskableMultiCategoricalDistribution) -> ActionParameters:
    return ActionParameters(kl_categorical, tuple(part.logits for part in distribution.distributions))


class MasksInObservations(MaskableActorCriticPolicy):
    """A policy that finds the masks beside the observations of a rollout; elsewhere it is sb3-contrib's."""

    def __init__(self, *args: Any, use_sde: bool = False, **kwargs: Any) -> None:
        # SB3's algorithms pass it to every policy and refuse it for actions that can be masked
        super().__init__(*args, **kwargs)

    def evaluate_actions(
        self, obs: Any, actions: th.Tensor, action_masks: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param obs: observations, or a dict of them and their masks
        :param actions: shape (batch, ...)
        :param action_masks: where they are not in ``obs``
        :return: value, log-probability and entropy
        """
        return super().evaluate_actions(*self._apart(obs, actions, action_masks=action_masks))

    def get_distribution(self, obs: Any, action_masks: Any = None) -> MaskableDistribution:
        """
        :param obs: observations, or a dict of them and their masks
        :param action_masks: where they are not in ``obs``
        :return: of the actions that are allowed
        """
        return super().get_distribution(*self._apart(obs, action_masks=action_masks))

    def _apart(self, obs: Any, *others: Any, action_masks: Any) -> tuple[Any, ...]:
        """
        :param obs: observations, or a dict of them and their masks
        :param others: stand between observations and masks
        :param action_masks: where they are not in ``obs``
        :return: observations, the others, masks
        """
        if not isinstance(obs, dict) or MASKS not in obs:
            return obs, *others, action_masks
        several = isinstance(self.observation_space, spaces.Dict)
        inputs = {key: value for key, value in obs.items() if key != MASKS} if several else obs[OBSERVATION]
        return inputs, *others, obs[MASKS]


class MlpPolicy(MasksInObservations):
    """For array observations."""


class CnnPolicy(MasksInObservations, MaskableActorCriticCnnPolicy):
    """For images."""


class MultiInputPolicy(MasksInObservations, MaskableMultiInputActorCriticPolicy):
    """For Dict observations."""


class MaskablePPOPenalty(PPOPenalty):
    """
    :class:`~sb3_ppo_penalty.ppo_penalty.PPOPenalty` for environments that tell which actions are allowed.

    Masks are asked for as by ``sb3_contrib.MaskablePPO``: a method ``action_masks`` of the environment, or its wrapper
    ``ActionMasker``. An action that is not allowed has no probability under either policy, and no part in the divergence.
    sb3-contrib's ``evaluate_policy`` and callbacks for masked actions take these models too.

    The arguments are those of ``PPOPenalty``; ``use_sde`` has no meaning.
    """

    _rollout_buffer_classes: ClassVar[tuple[type[RolloutBuffer], ...]] = (MaskableRolloutBuffer, MaskableDictRolloutBuffer)
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def _check_arguments(self) -> None:
        if self.rollout_buffer_class is None:
            dicts = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = MaskableDictRolloutBuffer if dicts else MaskableRolloutBuffer
        maskable = isinstance(self.action_space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
        require(maskable, "env's action space", self.action_space, "Discrete, MultiDiscrete or MultiBinary")
        super()._check_arguments()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Collect as sb3-contrib's MaskablePPO does.

        :param env: the training environments
        :param callback: called at each step
        :param rollout_buffer: filled with the rollout
        :param n_rollout_steps: number of steps per environment
        :return: False if the callback ended training
        """
        # It uses nothing that the two classes do not share
        collect: Any = MaskablePPO.collect_rollouts
        return self._ranks.collect(
            self, callback, lambda watched: bool(collect(self, env, watched, rollout_buffer, n_rollout_steps))
        )

    def _collected(self) -> Rollout:
        buffer: Any = self.rollout_buffer
        masks = th.as_tensor(buffer.swap_and_flatten(buffer.action_masks), device=self.device)
        rollout = super()._collected()
        seen = rollout.observations
        observations = seen if isinstance(seen, dict) else {OBSERVATION: seen}
        return replace(rollout, observations={**observations, MASKS: masks})

    def predict(
        self,
        observation: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]],
        state: tuple[np.ndarray[Any, Any], ...] | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """
        :param observation: one, or one per environment
        :param state: not used: nothing is recurrent
        :param episode_start: not used
        :param deterministic: whether to take the most probable action
        :param action_masks: of the actions that are allowed; None: all
        :return: the actions, and the state
        """
        policy: Any = self.policy
        actions: tuple[Any, Any] = policy.predict(observation, state, episode_start, deterministic, action_masks)
        return actions
