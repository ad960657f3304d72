"""SB3's environments of one process, and its normalisation of them, without copies and checks that change nothing."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_ppo_penalty.vec_envs.running import clip_magnitude, standardize, update, update_by_number

Array = npt.NDArray[Any]
#: From 2 on, numpy divides single precision by a double in double precision
NUMPY_2 = int(np.__version__.split(".")[0]) >= 2
#: What nobody can change needs no copy
IMMUTABLE_TYPES = frozenset(
    {bool, int, float, complex, str, bytes, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64}
)


def copy_info(info: dict[str, Any]) -> dict[str, Any]:
    """
    Copy an info so that nothing in it is shared with the environment.

    :param info: of one environment
    :return: as ``copy.deepcopy`` returns it, at the cost of a copy of the dict where it holds numbers and strings
    """
    if type(info) is not dict:
        return deepcopy(info)
    return {key: value if type(value) in IMMUTABLE_TYPES else deepcopy(value) for key, value in info.items()}


class InfoList(list[dict[str, Any]]):
    """The infos of all environments, which ``copy.deepcopy`` copies by :func:`copy_info`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        return [copy_info(info) for info in self]


class LeanVecEnv(DummyVecEnv):
    """
    ``DummyVecEnv`` that copies only what can change: the same to the bit, in a fraction of its time.

    ``DummyVecEnv`` copies observations and infos deeply at each step, because an environment may reuse its arrays and dicts.
    Here arrays, dicts and other objects in the infos are copied just so, and numbers and strings, which nobody can change, are
    not. Nothing that it returns is shared with an environment, so it is safe wherever ``DummyVecEnv`` is.

    Usage: ``make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecEnv)``.

    :param env_fns: functions that make one environment each
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns)
        self.buf_infos = InfoList(self.buf_infos)

    def _obs_from_buf(self) -> VecEnvObs:
        """:return: a copy of the latest observations of all environments."""
        buffers: dict[Any, Array] = self.buf_obs  # by key, None where there are none
        if None in buffers:
            return buffers[None].copy()
        return dict_to_obs(self.observation_space, OrderedDict((key, rows.copy()) for key, rows in buffers.items()))


class LeanVecNormalize(VecNormalize):
    """
    ``VecNormalize`` in fewer calls of numpy: the same observations, rewards, infos and statistics to the bit.

    Every floating-point operation is SB3's, in SB3's order. It is a ``VecNormalize`` wherever SB3 asks for one
    (``get_vec_normalize_env``, ``sync_envs_normalization``, ``EvalCallback``, ``CheckpointCallback``). Its files are
    ``VecNormalize``'s, byte for byte: each class loads those of the other, also where this package is not installed.

    Usage: ``LeanVecNormalize(make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecEnv))``, or in one
    ``make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecNormalize, vec_env_kwargs={"norm_reward": False})``.

    :param venv: the vectorised environment to wrap, or functions that make one environment each, for a :class:`LeanVecEnv`
    :param args: ``VecNormalize``'s, as are
    :param kwargs: ``training``, ``norm_obs``, ``norm_reward``, ``clip_obs``, ``clip_reward``, ``gamma``,
        ``epsilon``, ``norm_obs_keys``
    """

    def __init__(self, venv: VecEnv | Sequence[Callable[[], gym.Env[Any, Any]]], *args: Any, **kwargs: Any) -> None:
        super().__init__(venv if isinstance(venv, VecEnv) else LeanVecEnv(list(venv)), *args, **kwargs)

    def step_wait(self) -> VecEnvStepReturn:
        """:return: normalised observations and rewards, dones, and infos with normalised ``terminal_observation``."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self.old_obs, self.old_reward = obs, rewards  # type: ignore[assignment]  # never a tuple under VecNormalize
        if self.training:
            self._update_observations()
            self._update_reward(rewards)
        for place in dones.nonzero()[0].tolist():
            if "terminal_observation" in infos[place]:
                infos[place]["terminal_observation"] = self.normalize_obs(infos[place]["terminal_observation"])
            self.returns[place] = 0
        return self.normalize_obs(self.old_obs), self.normalize_reward(rewards), dones, infos

    def _update_observations(self) -> None:
        """Take the latest observations into their statistics."""
        if not self.norm_obs:
            return
        statistics: Any = self.obs_rms  # SB3's type is that of dict observations
        if isinstance(statistics, dict):
            for key, each in statistics.items():
                update(each, self.old_obs[key])
        else:
            update(statistics, self.old_obs)  # type: ignore[arg-type]

    def _update_reward(self, reward: Array) -> None:
        """
        Take the discounted returns into their statistics.

        :param reward: shape (n_envs,)
        """
        if len(reward) == 1:
            discounted = float(self.returns[0]) * self.gamma + float(reward[0])
            self.returns = np.array([discounted])
            update_by_number(self.ret_rms, discounted)
        else:
            self.returns = self.returns * self.gamma + reward
            update(self.ret_rms, self.returns)

    def _normalize_obs(self, obs: Array, obs_rms: RunningMeanStd) -> Array:
        """
        :param obs: of one environment or of all
        :param obs_rms: their statistics
        :return: normalised and clipped, as doubles
        """
        return standardize(obs, obs_rms, self.epsilon, self.clip_obs)

    def normalize_obs(self, obs: Array | dict[str, Array]) -> Array | dict[str, Array]:
        """
        Normalise observations by the statistics, which stay as they are.

        :param obs: of one environment or of all; not changed
        :return: normalised, float32
        """
        if self.norm_obs:
            statistics: Any = self.obs_rms  # SB3's type is that of dict observations
            if isinstance(statistics, RunningMeanStd):
                return self._normalize_obs(obs, statistics).astype(np.float32)  # type: ignore[arg-type]
        return super().normalize_obs(obs)

    def normalize_reward(self, reward: Array) -> Array:
        """
        Normalise rewards by the statistics of the returns, which stay as they are.

        :param reward: shape (n_envs,); not changed
        :return: float32
        """
        if not self.norm_reward:
            return reward.astype(np.float32)
        scale = np.sqrt(self.ret_rms.var + self.epsilon)
        if NUMPY_2 and np.shape(reward) == (1,) and scale > 0:
            ratio = float(reward[0]) / float(scale)
            ratio = -self.clip_reward if ratio < -self.clip_reward else ratio
            return np.array([self.clip_reward if ratio > self.clip_reward else ratio], dtype=np.float32)
        return clip_magnitude(reward / scale, self.clip_reward).astype(np.float32)

    @staticmethod
    def load(load_path: str, venv: VecEnv) -> "LeanVecNormalize":
        """
        Load statistics and settings.

        :param load_path: a file of this class or of ``VecNormalize``
        :param venv: the vectorised environment to wrap
        :return: the normalised environment
        """
        loaded = VecNormalize.load(load_path, venv)
        loaded.__class__ = LeanVecNormalize  # which adds no attributes
        return loaded  # type: ignore[return-value]

    def save(self, save_path: str) -> None:
        """
        Save statistics and settings in a file that ``VecNormalize`` could have saved.

        :param save_path: the file
        """
        plain = VecNormalize.__new__(VecNormalize)
        vars(plain).update(vars(self))
        plain.save(save_path)


def lean(env: VecEnv) -> VecEnv:
    """
    Make SB3's environments lean where they stand: ``DummyVecEnv`` and ``VecNormalize``, below whatever wrappers.

    :param env: changed; what is of another class, or a subclass, stays as it is
    :return: the same object
    """
    layer = env
    while isinstance(layer, VecEnvWrapper):
        if type(layer) is VecNormalize:
            layer.__class__ = LeanVecNormalize
        layer = layer.venv
    if type(layer) is DummyVecEnv:
        layer.__class__ = LeanVecEnv
        layer.buf_infos = InfoList(layer.buf_infos)
    return env


class LeanCallback(BaseCallback):
    """
    Make the training environment lean when training begins, where only a callback can be named.

    In RL Zoo's hyperparameter files: ``callback: sb3_ppo_penalty.vec_envs.LeanCallback``, with ``normalize`` as it is.
    """

    def _init_callback(self) -> None:
        lean(self.training_env)

    def _on_step(self) -> bool:
        return True
