"""SB3's rollout buffers without the copies and the steps in numpy that do not change their content."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

Array = np.ndarray[Any, Any]


class LeanReturnsMixin(RolloutBuffer):
    """Works out advantages and returns as ``RolloutBuffer`` does, to the bit, but for all steps at once where it can."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: Array) -> None:
        """
        Fill ``advantages`` and ``returns``, both of shape (n_steps, n_envs), by GAE.

        Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438.

        :param last_values: predicted values of the states after the last step, shape (n_envs,) or (n_envs, 1)
        :param dones: whether the last step ended an episode, shape (n_envs,)
        """
        next_values = np.concatenate([self.values[1:], last_values.cpu().numpy().reshape(1, -1)])
        goes_on = 1.0 - np.concatenate([self.episode_starts[1:], dones.astype(np.float32).reshape(1, -1)])
        deltas = self.rewards + self.gamma * next_values * goes_on - self.values
        decays = self.gamma * self.gae_lambda * goes_on
        after = np.zeros_like(deltas[-1])
        for delta, decay, advantage in zip(deltas[::-1], decays[::-1], self.advantages[::-1], strict=True):
            np.multiply(decay, after, advantage)
            np.add(delta, advantage, advantage)
            after = advantage
        self.returns = self.advantages + self.values


class LeanRolloutBuffer(LeanReturnsMixin):
    """A ``RolloutBuffer`` with the same content to the bit, in less time; see :func:`make_lean`."""

    def add(
        self, obs: Array, action: Array, reward: Array, episode_start: Array, value: th.Tensor, log_prob: th.Tensor
    ) -> None:
        """
        Keep a step of all environments.

        :param obs: observations, shape (n_envs, *obs_shape)
        :param action: shape (n_envs, *action_shape)
        :param reward: shape (n_envs,)
        :param episode_start: whether an episode began with these observations, shape (n_envs,)
        :param value: predicted values of the observations, shape (n_envs,) or (n_envs, 1)
        :param log_prob: log-probabilities of the actions, shape (n_envs,)
        """
        position = self.pos
        if isinstance(self.observation_space, spaces.Discrete):
            obs = obs.reshape((self.n_envs, *self.obs_shape))
        self.observations[position] = obs
        self.actions[position] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[position] = reward
        self.episode_starts[position] = episode_start
        self.values[position] = value.cpu().numpy().reshape(-1)
        self.log_probs[position] = log_prob.cpu().numpy()
        self.pos = position + 1
        self.full = self.full or self.pos == self.buffer_size


class LeanDictRolloutBuffer(LeanReturnsMixin, DictRolloutBuffer):
    """A ``DictRolloutBuffer`` with the same content to the bit, in less time; see :func:`make_lean`."""


#: SB3's class -> the lean one
LEAN = {RolloutBuffer: LeanRolloutBuffer, DictRolloutBuffer: LeanDictRolloutBuffer}


def make_lean(buffer: Any) -> None:
    """
    Make a buffer of exactly SB3's class lean, in place.

    The model's ``rollout_buffer_class``, which is saved, stays SB3's, so that its files open without this package.

    :param buffer: of any class
    """
    buffer.__class__ = LEAN.get(type(buffer), type(buffer))
