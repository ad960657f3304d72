"""
PPO with an adaptive KL penalty where some actions are not allowed in some states, with sb3-contrib's policies and buffers.

Nothing of sb3-contrib is repeated: the masks travel with the observations, so that whatever cuts, shuffles or compiles
minibatches needs to know nothing of them. The package does not import this module: sb3-contrib takes its time.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.distributions import (
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.ppo_mask.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty.algorithms.ppo_penalty import PPOPenalty
from sb3_ppo_penalty.arguments import require
from sb3_ppo_penalty.compiled.noise import noise_shapes
from sb3_ppo_penalty.objectives.divergence import ActionParameters, kl_categorical, parameters_of
from sb3_ppo_penalty.rollouts.rollout import Observations, as_tensor

SelfMaskable = TypeVar("SelfMaskable", bound="MaskablePPOPenalty")

#: Under these keys an observation and the mask of its actions are kept together: none that an environment would use
OBSERVATION, MASKS = "<observation>", "<action_masks>"


@parameters_of.register
def _(distribution: MaskableMultiCategoricalDistribution) -> ActionParameters:
    return ActionParameters(kl_categorical, tuple(part.logits for part in distribution.distributions))


# A mask changes the probabilities, not how an action is drawn
noise_shapes.register(MaskableCategoricalDistribution, noise_shapes.dispatch(CategoricalDistribution))
noise_shapes.register(MaskableMultiCategoricalDistribution, noise_shapes.dispatch(MultiCategoricalDistribution))


class MaskablePPOPenalty(PPOPenalty):
    """
    Proximal Policy Optimization with an adaptive KL penalty where some actions are not allowed in some states.

    Masks are asked for as by ``sb3_contrib.MaskablePPO``: a method ``action_masks`` of the environment, or its wrapper
    ``ActionMasker``. An action that is not allowed has no probability under either policy, and no part in the divergence.
    sb3-contrib's policies, ``evaluate_policy`` and callbacks for masked actions are used as they are; its files can be loaded.

    The arguments are those of :class:`~.PPOPenalty`, with two differences:

    :param policy: a ``MaskableActorCriticPolicy`` of sb3-contrib, a subclass of one, or the names that ``MaskablePPO`` takes
    :param batch_size: None stands for the whole rollout, as in ``MaskablePPO``
    """

    #: What ``learn`` was told; no file holds it
    _use_masking: bool = True
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
        batch_size: Any = self.batch_size
        if batch_size is None:
            self.batch_size = self.n_steps * self.n_envs
        super()._check_arguments()

    def _check_policy(self) -> None:
        policy_class = self.policy_class
        maskable = isinstance(policy_class, type) and issubclass(policy_class, MaskableActorCriticPolicy)
        require(maskable, "policy", policy_class, "a MaskableActorCriticPolicy of sb3-contrib, or its name")

    def _policy_maker(self) -> Callable[..., Any]:
        policy_class = self.policy_class

        # SB3 tells every policy whether to explore by gSDE, for which these have no argument
        @functools.wraps(policy_class, updated=())
        def make(*args: Any, use_sde: bool, **kwargs: Any) -> Any:
            return policy_class(*args, **kwargs)

        return make

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_use_masking"]

    def learn(  # type: ignore[override]
        self: SelfMaskable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskable:
        """
        Train, as sb3-contrib's ``MaskablePPO`` does.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: number of updates between two logs
        :param tb_log_name: name of the run for TensorBoard; default: the class's
        :param reset_num_timesteps: whether to count steps from zero
        :param use_masking: False to let the policy take any action, without asking the environment for masks
        :param progress_bar: show one (needs tqdm and rich)
        :return: the trained model
        """
        self._use_masking = use_masking
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool | None = None,
    ) -> bool:
        """
        Collect as sb3-contrib's ``MaskablePPO`` does.

        :param env: the training environments
        :param callback: called at each step
        :param rollout_buffer: filled with the rollout
        :param n_rollout_steps: number of steps per environment
        :param use_masking: whether the environment is asked for masks; default: as ``learn`` was told
        :return: False if the callback ended training
        """
        if use_masking is not None:
            self._use_masking = use_masking
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _collect(self, *arguments: Any) -> bool:
        # It uses nothing that the two classes do not share
        collect: Any = MaskablePPO.collect_rollouts
        return bool(collect(self, *arguments, self._use_masking))

    def _unpacked(self, observations: Observations) -> tuple[Any, dict[str, Any]]:
        if not isinstance(observations, dict) or MASKS not in observations:
            return observations, {}
        several = isinstance(self.observation_space, spaces.Dict)
        seen = {key: value for key, value in observations.items() if key != MASKS} if several else observations[OBSERVATION]
        return seen, {"action_masks": observations[MASKS]}

    def _observed(self, observations: Observations, source: Any) -> Observations:
        masks = as_tensor(source.action_masks, self.rollout_buffer.device)
        return {**(observations if isinstance(observations, dict) else {OBSERVATION: observations}), MASKS: masks}

    def predict(
        self,
        observation: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]],
        state: tuple[np.ndarray[Any, Any], ...] | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """
        Choose actions, as sb3-contrib's ``MaskablePPO`` does.

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
