"""SB3's ``DummyVecEnv`` and ``VecNormalize`` without the copies and checks that do not change the result."""

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

from sb3_ppo_penalty.vec_envs.running import clip_magnitude, constant_array, update, update_by_number

Array = npt.NDArray[Any]
#: numpy 2 divides single precision by a double in double precision, numpy 1 does not
NUMPY_2 = int(np.__version__.split(".")[0]) >= 2
#: Types whose values cannot change and need no copy
IMMUTABLE_TYPES = frozenset(
    {bool, int, float, complex, str, bytes, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64}
)


def copy_info(info: dict[str, Any]) -> dict[str, Any]:
    """
    Copy an info so that it shares nothing with the environment.

    :param info: info of one environment
    :return: equal to ``copy.deepcopy(info)``; numbers and strings are not copied
    """
    if type(info) is not dict:
        return deepcopy(info)
    return {key: value if type(value) in IMMUTABLE_TYPES else deepcopy(value) for key, value in info.items()}


class InfoList(list[dict[str, Any]]):
    """The infos of all environments; ``copy.deepcopy`` copies them by :func:`copy_info`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        return [copy_info(info) for info in self]


class LeanVecEnv(DummyVecEnv):
    """
    A ``DummyVecEnv`` that copies only what can change: the same results to the bit, in a fraction of the time.

    ``DummyVecEnv`` copies observations and infos deeply at each step, because an environment may reuse its arrays and dicts.
    Here numbers and strings, which cannot change, are not copied; arrays, dicts and other objects are. Nothing that it returns
    is shared with an environment, so it is safe wherever ``DummyVecEnv`` is.

    Usage: ``make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecEnv)``.

    :param env_fns: functions that make one environment each
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns)
        self.buf_infos = InfoList(self.buf_infos)

    def _obs_from_buf(self) -> VecEnvObs:
        """
        Copy the latest observations of all environments.

        :return: the copy, an array, or a dict or tuple of arrays
        """
        buffers: dict[Any, Array] = self.buf_obs  # by key, None where there are none
        if None in buffers:
            return buffers[None].copy()
        return dict_to_obs(self.observation_space, OrderedDict((key, rows.copy()) for key, rows in buffers.items()))


class LeanVecNormalize(VecNormalize):
    """
    A ``VecNormalize`` with fewer calls of numpy: the same observations, rewards, infos and statistics to the bit.

    Every floating-point operation is SB3's, in SB3's order. It is a ``VecNormalize`` wherever SB3 asks for one
    (``get_vec_normalize_env``, ``sync_envs_normalization``, ``EvalCallback``, ``CheckpointCallback``). Its files are
    ``VecNormalize``'s, byte for byte: each class loads those of the other, also where this package is not installed.

    Usage: ``LeanVecNormalize(make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecEnv))``, or in one
    ``make_vec_env("HalfCheetah-v5", vec_env_cls=LeanVecNormalize, vec_env_kwargs={"norm_reward": False})``.

    :param venv: the vectorised environment to wrap, or functions that make one environment each, for a :class:`LeanVecEnv`
    :param args: further arguments of ``VecNormalize``
    :param kwargs: further arguments of ``VecNormalize``: ``training``, ``norm_obs``, ``norm_reward``, ``clip_obs``,
        ``clip_reward``, ``gamma``, ``epsilon``, ``norm_obs_keys``
    """

    def __init__(self, venv: VecEnv | Sequence[Callable[[], gym.Env[Any, Any]]], *args: Any, **kwargs: Any) -> None:
        super().__init__(venv if isinstance(venv, VecEnv) else LeanVecEnv(list(venv)), *args, **kwargs)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Finish the step of the wrapped environments, update the statistics and normalise.

        :return: normalised observations and rewards, dones, and infos with normalised ``terminal_observation``
        """
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
        """Update the statistics of the observations with the latest ones."""
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
        Update the statistics of the discounted returns.

        :param reward: rewards of the step, shape (n_envs,)
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
        Normalise and clip observations.

        :param obs: observations of one environment or of all
        :param obs_rms: running statistics of the observations
        :return: double precision, the shape of ``obs``
        """
        scale = np.sqrt(obs_rms.var + constant_array(self.epsilon))
        result: Array = obs - obs_rms.mean
        result /= scale
        return clip_magnitude(result, self.clip_obs)

    def normalize_obs(self, obs: Array | dict[str, Array]) -> Array | dict[str, Array]:
        """
        Normalise observations without updating the statistics.

        :param obs: observations of one environment or of all; not changed
        :return: normalised observations, float32
        """
        if self.norm_obs:
            statistics: Any = self.obs_rms  # SB3's type is that of dict observations
            if isinstance(statistics, RunningMeanStd):
                return self._normalize_obs(obs, statistics).astype(np.float32)  # type: ignore[arg-type]
        return super().normalize_obs(obs)

    def normalize_reward(self, reward: Array) -> Array:
        """
        Normalise rewards by the statistics of the returns, without updating these.

        :param reward: rewards, shape (n_envs,); not changed
        :return: normalised rewards, float32
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
        Load statistics and settings from a file of this class or of ``VecNormalize``.

        :param load_path: path of the file
        :param venv: the vectorised environment to wrap
        :return: the normalised environment
        """
        loaded = VecNormalize.load(load_path, venv)
        loaded.__class__ = LeanVecNormalize  # which adds no attributes
        return loaded  # type: ignore[return-value]

    def save(self, save_path: str) -> None:
        """
        Save statistics and settings in a file that ``VecNormalize`` can load without this package.

        :param save_path: path of the file
        """
        plain = VecNormalize.__new__(VecNormalize)
        vars(plain).update(vars(self))
        plain.save(save_path)


def lean(env: VecEnv) -> VecEnv:
    """
    Replace ``DummyVecEnv`` and ``VecNormalize`` inside an environment by the lean classes, in place.

    :param env: the environment with its wrappers; layers of other classes, and of subclasses, stay as they are
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
    Make the training environment lean when training begins, for places where only a callback can be named.

    In RL Zoo's hyperparameter files: ``callback: sb3_ppo_penalty.vec_envs.LeanCallback``, with ``normalize`` as it is.
    """

    def _init_callback(self) -> None:
        lean(self.training_env)

    def _on_step(self) -> bool:
        return True
