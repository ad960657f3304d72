"""Let SB3's algorithms train on gymnasium's vectorised environments: many environments stepped by one call."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_ppo_penalty.arguments import ArgumentError, require

Array = npt.NDArray[Any]
#: Observations of all environments by key, None where they have no keys
ObservationRows = dict[Any, Array]
NEXT_STEP, SAME_STEP, DISABLED = "NextStep", "SameStep", "Disabled"
FINAL_KEYS = {"final_obs", "final_info", "_final_obs", "_final_info"}


class BatchedVecEnv(VecEnv):
    """
    Adapt a ``gymnasium.vector.VectorEnv`` to SB3's ``VecEnv``.

    Training sees what it would see of the same environments in ``DummyVecEnv``: an episode ends with ``terminal_observation``
    and ``TimeLimit.truncated`` in its info, and the observation returned with it is the first of the next episode.

    What the batch does at the end of an episode (``metadata["autoreset_mode"]``) is translated. ``SameStep`` already resets in
    the step that ends an episode, and is the cheapest. With ``NextStep`` and ``Disabled`` the environments whose episode ended
    are reset at once by ``reset(options={"reset_mask": ...})``, so that no transition comes from a step that only resets.
    Gymnasium (1.1 or later) and EnvPool support that for their own environments; a batch that resets other environments too
    raises an error.

    Statistics of episodes come from ``VecMonitor``, normalisation from ``VecNormalize``, both around this class::

        env = VecMonitor(BatchedVecEnv(gym.make_vec("CartPole-v1", num_envs=64)))

    Seeds: gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv`` seed as ``DummyVecEnv`` does; a batch with one random generator
    takes the first seed; EnvPool takes its seed when it is made, and warns.

    :param env: the batch of environments
    """

    actions: Array

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        require(isinstance(env, VectorEnv), "env", env, "a gymnasium.vector.VectorEnv, as gymnasium.make_vec returns it")
        self.env = ResettableCartPole(env) if type(env) is CartPoleVectorEnv else env
        self.mode = _autoreset_mode(self.env)
        self.keys, _, self.dtypes = obs_space_info(env.single_observation_space)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        # VecMonitor writes the spec's id into its files; EnvPool's spec is of another class
        self.spec = env.spec if isinstance(env.spec, EnvSpec) else None

    def step_async(self, actions: Array) -> None:
        """
        Keep the actions for :meth:`step_wait`.

        :param actions: actions of all environments, shape (n_envs, ...)
        """
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step all environments.

        :return: observations, rewards, dones and infos of all environments; their memory is not used again by a later step
        """
        observations, rewards, terminated, truncated, batch = self.env.step(self.actions)
        rows, infos = self._copy_observations(observations), _split_infos(batch, self.num_envs)
        dones = np.logical_or(terminated, truncated)
        if dones.any():
            self._end_episodes(rows, infos, batch, dones)
        for info, timeout in zip(infos, np.greater(truncated, terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = timeout
        return dict_to_obs(self.observation_space, rows), np.array(rewards, dtype=np.float32), dones, infos

    def reset(self) -> VecEnvObs:
        """
        Reset all environments.

        :return: first observations, shape (n_envs, ...)
        """
        options: dict[str, Any] = {"options": self._common_options()} if any(self._options) else {}
        seed = None if self._seeds[0] is None else int(self._seeds[0])
        observations, batch = self.env.reset(seed=seed, **options)
        self._reset_seeds()
        self._reset_options()
        rows = self._copy_observations(observations)
        count = len(rows[self.keys[0]])
        require(count == self.num_envs, "env", self.env, f"synchronous: {self.num_envs} environments, {count} observations")
        self.reset_infos = _split_infos(batch, self.num_envs)
        return dict_to_obs(self.observation_space, rows)

    def _common_options(self) -> dict[str, Any]:
        """
        Return the options of the next reset, which a batch takes only once for all environments.

        :return: the options
        :raises ArgumentError: if they differ between environments
        """
        first = self._options[0]
        same = all(each is first or each == first for each in self._options)
        require(same, "options", self._options, "the same for all environments of a batch")
        return first

    def _copy_observations(self, observations: Any) -> ObservationRows:
        """
        Copy observations, whose memory the batch may use again, into arrays of the observation space's types.

        :param observations: observations of the batch, an array or a dict of arrays
        :return: a copy by key
        """
        return {key: np.array(observations if key is None else observations[key], dtype=self.dtypes[key]) for key in self.keys}

    def _end_episodes(self, rows: ObservationRows, infos: list[dict[str, Any]], batch: dict[str, Any], dones: Array) -> None:
        """
        Record the last observations of the episodes that ended, and begin the next ones.

        :param rows: observations after the step; replaced by the first ones of the next episodes where an episode ended
        :param infos: infos of the step, one for each environment; get ``terminal_observation``
        :param batch: infos of the step in the batch's own form
        :param dones: whether the episode ended, shape (n_envs,)
        """
        ended = np.flatnonzero(dones).tolist()
        if self.mode == SAME_STEP:
            last, finals = batch.get("final_obs"), _split_infos(batch.get("final_info", {}), self.num_envs)
            require(last is not None, "env", self.env, "one that gives the last observation of an episode as `final_obs`")
            for place in ended:
                # These infos are the reset's, except `episode`, in which RecordEpisodeStatistics describes the last episode
                finished = {key: infos[place].pop(key) for key in {"episode"} & set(infos[place])}
                self.reset_infos[place], infos[place] = infos[place], {**finished, **finals[place]}
                infos[place]["terminal_observation"] = deepcopy(_observation_at(last, place))
            return
        for place in ended:
            single = {key: values[place].copy() for key, values in rows.items()}
            infos[place]["terminal_observation"] = dict_to_obs(self.observation_space, single)
        self._reset_some(rows, dones)

    def _reset_some(self, rows: ObservationRows, dones: Array) -> None:
        """
        Reset the environments whose episode ended, and no others.

        :param rows: observations; replaced in the environments that are reset
        :param dones: whether the episode ended, shape (n_envs,)
        :raises ArgumentError: if other environments changed, too
        """
        observations, batch = self.env.reset(options={"reset_mask": dones.copy()})
        fresh = self._copy_observations(observations)
        count = len(fresh[self.keys[0]])  # all environments, or with EnvPool only those that were reset
        for key, values in fresh.items():
            if count == self.num_envs:
                kept, before = values[~dones], rows[key][~dones]
                if not np.all((kept == before) | (before != before)):
                    raise ArgumentError(
                        f"`env` must reset single environments when asked to by options['reset_mask'], or in the step that "
                        f"ends an episode (autoreset_mode SameStep), but {self.env} has also changed the others"
                    )
                values = values[dones]
            rows[key][dones] = values
        ended, infos = np.flatnonzero(dones).tolist(), _split_infos(batch, count)
        for place, info in zip(ended, infos if count == len(ended) else [infos[place] for place in ended], strict=True):
            self.reset_infos[place] = info

    def close(self) -> None:
        """Close all environments."""
        self.env.close()

    def get_images(self) -> Sequence[npt.NDArray[Any] | None]:
        """
        Render all environments.

        :return: an RGB picture of each environment, None where it draws none
        """
        frames: Any = self.env.render()
        return list(frames or [None] * self.num_envs)

    def has_attr(self, attr_name: str) -> bool:
        """
        Say whether all environments have an attribute.

        :param attr_name: name of an attribute or method of the single environments
        :return: False also for a batch that is not made of single environments
        """
        batch: Any = self.env.unwrapped
        return hasattr(batch, "call") and all(batch.call("has_wrapper_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Read an attribute of single environments.

        :param attr_name: name of the attribute
        :param indices: indices of the environments to ask, None for all
        :return: the value of each
        :raises AttributeError: if the batch is not made of single environments, or they lack the attribute
        """
        if attr_name == "render_mode":
            values: Sequence[Any] = [self.env.render_mode] * self.num_envs
        else:
            values = self._environments_with(attr_name).call("get_wrapper_attr", attr_name)
        return [values[place] for place in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of single environments.

        :param attr_name: name of the attribute, which need not exist
        :param value: its value, the same for all
        :param indices: indices of the environments to change, None for all
        :raises AttributeError: if the batch is not made of single environments
        """
        batch, places = self._environments(attr_name), list(self._get_indices(indices))
        if hasattr(batch, "envs"):
            for place in places:
                setattr(batch.envs[place], attr_name, value)
        else:
            self._require_all(places)
            batch.set_attr(attr_name, [value] * self.num_envs)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of single environments.

        :param method_name: name of the method
        :param method_args: its positional arguments
        :param indices: indices of the environments whose method is called, None for all
        :param method_kwargs: its keyword arguments
        :return: what each call returned
        :raises AttributeError: if the batch is not made of single environments, or they lack the method
        """
        batch, places = self._environments_with(method_name), list(self._get_indices(indices))
        if hasattr(batch, "envs"):
            methods = [batch.envs[place].get_wrapper_attr(method_name) for place in places]
            return [method(*method_args, **method_kwargs) for method in methods]
        self._require_all(places)
        return list(batch.call(method_name, *method_args, **method_kwargs))

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """
        Say which environments are wrapped with a class.

        :param wrapper_class: wrapper of single environments; in other processes any class of that name counts
        :param indices: indices of the environments to ask, None for all
        :return: one answer for each environment
        """
        batch: Any = self.env.unwrapped
        if hasattr(batch, "envs"):
            wrapped = [is_wrapped(env, wrapper_class) for env in batch.envs]
        elif hasattr(batch, "call"):
            wrapped = [f"<{wrapper_class.__name__}<" in name for name in batch.call("__str__")]
        else:
            wrapped = [False] * self.num_envs
        return [wrapped[place] for place in self._get_indices(indices)]

    def _environments(self, name: str) -> Any:
        """
        Return the innermost batch if it is made of single environments.

        :param name: the attribute or method wanted, for the error
        :return: gymnasium's vectorised environment, which has ``call`` and ``set_attr``
        :raises AttributeError: if there are no single environments
        """
        batch = self.env.unwrapped
        if not hasattr(batch, "call"):
            raise AttributeError(f"`{name}` cannot be asked of single environments: {batch} is one batch and has none")
        return batch

    def _environments_with(self, name: str) -> Any:
        """
        Return the innermost batch if its single environments have an attribute.

        :param name: name of an attribute or method; calling one that is missing would end gymnasium's worker processes
        :return: gymnasium's vectorised environment, which has ``call`` and ``set_attr``
        :raises AttributeError: if there are no single environments, or they lack the attribute
        """
        batch = self._environments(name)
        if not self.has_attr(name):
            raise AttributeError(f"the environments of {batch} have no attribute `{name}`")
        return batch

    def _require_all(self, places: list[int]) -> None:
        """
        Check that all environments are addressed, because gymnasium reaches those in other processes only together.

        :param places: indices of the environments
        :raises ArgumentError: if some are missing
        """
        allowed = f"None or all of range({self.num_envs}), because {self.env.unwrapped} asks its environments together"
        require(sorted(places) == list(range(self.num_envs)), "indices", places, allowed)


class ResettableCartPole(VectorWrapper):  # VectorWrapper takes type arguments only from gymnasium 1.1 on
    """
    Let gymnasium's batched CartPole reset some of its environments at once.

    They begin as the batch itself would begin them one step later, from the same random numbers.

    :param env: the batch of cart poles
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Reset all environments, or those that ``reset_mask`` selects.

        :param seed: seed of the batch
        :param options: options of the batch, or ``reset_mask``, booleans of shape (n_envs,)
        :return: observations of all environments, and infos
        """
        if options is None or "reset_mask" not in options:
            return self.env.reset(seed=seed, options=options)
        batch: Any = self.env
        mask = options["reset_mask"]
        batch.state[:, mask] = batch.np_random.uniform(low=batch.low, high=batch.high, size=(4, mask.sum()))
        batch.steps[mask] = 0
        batch.prev_done[mask] = False
        return batch.state.T.astype(np.float32), {}


def _autoreset_mode(env: VectorEnv[Any, Any, Any]) -> str:
    """
    Read what a batch does at the end of an episode, and check that it can be translated.

    :param env: the batch of environments
    :return: ``"NextStep"``, ``"SameStep"`` or ``"Disabled"``
    :raises ArgumentError: if the batch does not say, or cannot reset some of its environments
    """
    mode = env.metadata.get("autoreset_mode", NEXT_STEP if isinstance(env, ResettableCartPole) else None)
    mode = getattr(mode, "value", mode)
    modes = [NEXT_STEP, SAME_STEP, DISABLED]
    require(mode in modes, "env.metadata['autoreset_mode']", mode, f"one of {modes} (gymnasium 1.1 or later says so itself)")
    if mode != SAME_STEP:
        base: Any = env.unwrapped
        separate = isinstance(base, AsyncVectorEnv) and not base.shared_memory
        require(not separate, "env", env, "made with autoreset_mode SameStep, or with shared_memory")
        allowed = f"without RecordEpisodeStatistics, which counts wrongly in mode {mode}: use VecMonitor"
        layer: Any = env
        while isinstance(layer, VectorWrapper):
            require(not isinstance(layer, RecordEpisodeStatistics), "env", env, allowed)
            layer = layer.env
    return str(mode)


def _split_infos(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """
    Turn the infos of a batch into one dict for each environment.

    :param batch: arrays by key; the booleans at ``_key`` say which environments have the key; dicts of the same
    :param count: number of environments
    :return: dicts that share no memory with the batch; a value that is not one for each environment goes to all
    """
    infos: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in batch.items():
        if key in FINAL_KEYS or (key[:1] == "_" and key[1:] in batch):
            continue
        mask = batch.get(f"_{key}")
        rows = _split_values(values, count)
        for place in range(count) if mask is None else np.flatnonzero(mask).tolist():
            infos[place][key] = rows[place]
    return infos


def _split_values(values: Any, count: int) -> list[Any]:
    """
    Split the values of one key into one for each environment.

    :param values: values of one key of a batch's infos
    :param count: number of environments
    :return: a value for each environment
    """
    if isinstance(values, dict):
        return _split_infos(values, count)
    if np.shape(values)[:1] != (count,):
        return [deepcopy(values) for _ in range(count)]
    rows = deepcopy(np.asarray(values))  # an array of objects, too
    return rows.tolist() if rows.ndim == 1 else list(rows)


def _observation_at(observations: Any, place: int) -> Any:
    """
    Pick the observation of one environment.

    :param observations: observations of all environments: an array, also one of objects, or a dict or tuple of arrays
    :param place: index of the environment
    :return: its observation
    """
    if isinstance(observations, dict):
        return {key: values[place] for key, values in observations.items()}
    if isinstance(observations, tuple):
        return tuple(values[place] for values in observations)
    return observations[place]
