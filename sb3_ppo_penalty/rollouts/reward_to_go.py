"""The article's rewards-to-go (section 5) in the place of SB3's lambda-returns, as a rollout buffer."""

from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class RewardToGoMixin(RolloutBuffer):
    """
    Compute targets and advantages as the article does (section 5), instead of SB3's lambda-returns.

    The target of a step is the discounted sum of the rewards from there to the end of its episode, with no bootstrapping;
    its advantage is the target minus the critic's prediction, normalised once over the whole rollout with 1e-10 in the
    denominator. ``gae_lambda`` is not used, and episodes that a time limit ends are not bootstrapped either.

    An episode that the rollout cuts short is taken as if it had ended there: its targets hold only the rewards seen, and
    are too small in size. Its remaining steps come at the start of the next rollout, as the article's own loop, which
    collects whole episodes, never does. Choose ``n_steps`` as a multiple of the episodes' length to cut none.
    """

    #: Asked by the algorithm: SB3 adds the value of the last observation to the reward at a time limit unless told not to
    bootstrap_timeouts = False
    #: Each class's name in saved files, which stays: SB3 writes a class's own attributes beside its pickle, but not its name
    saved_as: ClassVar[str]

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray[Any, Any]) -> None:
        """
        Fill ``returns`` and ``advantages``, both of shape (n_steps, n_envs).

        :param last_values: not used: nothing is bootstrapped
        :param dones: not used: the last step of the rollout ends every episode in it
        """
        to_go = np.zeros(self.n_envs)
        for step in reversed(range(self.buffer_size)):
            to_go = self.rewards[step] + self.gamma * to_go
            self.returns[step] = to_go
            # Where a step starts an episode, nothing of it belongs to the step before
            to_go = to_go * (1 - self.episode_starts[step])
        advantages = self.returns - self.values
        if advantages.size > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-10)
        self.advantages = advantages


class RewardToGoRolloutBuffer(RewardToGoMixin):
    """The buffer of rewards-to-go for array observations: see :class:`RewardToGoMixin`."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.RewardToGoRolloutBuffer"


class RewardToGoDictRolloutBuffer(RewardToGoMixin, DictRolloutBuffer):
    """The buffer of rewards-to-go for dict observations: see :class:`RewardToGoMixin`."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.RewardToGoDictRolloutBuffer"


class IgnoreTimeLimits(VecEnvWrapper):
    """Hide from SB3 whether a time limit ended the episode, so that it bootstraps none."""

    def reset(self) -> VecEnvObs:
        """Return the first observations."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Return observations, rewards, dones, and infos without the time limit."""
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards, dones, [{**info, "TimeLimit.truncated": False} for info in infos]


def without_time_limits(env: VecEnv, rollout_buffer: RolloutBuffer) -> VecEnv:
    """
    Hide time limits from SB3 where a buffer asks for no bootstrapping.

    :param env: the training environments
    :param rollout_buffer: to be filled
    :return: the environments to collect from
    """
    return env if getattr(rollout_buffer, "bootstrap_timeouts", True) else IgnoreTimeLimits(env)
