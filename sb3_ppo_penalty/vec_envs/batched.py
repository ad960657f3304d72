"""Gymnasium's vectorised environments as SB3's: many environments in one batch, stepped by one call."""

from collections.abc import Iterator, Sequence
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
    A ``gymnasium.vector.VectorEnv`` as SB3's algorithms want their environments.

    Training sees what it sees of the same environments in ``DummyVecEnv``: an episode ends with ``terminal_observation`` and
    ``TimeLimit.truncated`` in its info, and the observation returned with it is the first of the next episode. What an
    environment does at the end of an episode, ``metadata["autoreset_mode"]``, is translated: ``SameStep`` as it is (the
    cheapest); ``NextStep`` and ``Disabled`` by resetting what has ended at once, with ``reset(options={"reset_mask": ...})``,
    so that the step that only resets never becomes a transition. Gymnasium (1.1 or later) and EnvPool do that for their own
    environments; an environment that would reset others with it is refused by an error.

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
        # VecMonitor writes its name into its files; EnvPool's is of another kind
        self.spec = env.spec if isinstance(env.spec, EnvSpec) else None

    def step_async(self, actions: Array) -> None:
        """:param actions: of all environments, shape (n_envs, ...)."""
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """:return: observations, rewards, dones and infos of all environments; nothing of it changes at the next step."""
        observations, rewards, terminated, truncated, batch = self.env.step(self.actions)
        rows, infos = self._copy_observations(observations), _split_infos(batch, self.num_envs)
        dones = np.logical_or(terminated, truncated)
        if dones.any():
            self._end_episodes(rows, infos, batch, dones)
        for info, timeout in zip(infos, np.greater(truncated, terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = timeout
        return dict_to_obs(self.observation_space, rows), np.array(rewards, dtype=np.float32), dones, infos

    def reset(self) -> VecEnvObs:
        """:return: the first observations of all environments."""
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
        :return: the options of the next reset
        :raises ArgumentError: if they are not the same for all environments
        """
        first = self._options[0]
        same = all(each is first or each == first for each in self._options)
        require(same, "options", self._options, "the same for all environments of a batch")
        return first

    def _copy_observations(self, observations: Any) -> ObservationRows:
        """
        :param observations: of the batch, which may use their memory again
        :return: a copy, in the types of the observation space
        """
        return {key: np.array(observations if key is None else observations[key], dtype=self.dtypes[key]) for key in self.keys}

    def _end_episodes(self, rows: ObservationRows, infos: list[dict[str, Any]], batch: dict[str, Any], dones: Array) -> None:
        """
        Note the last observations of the episodes that ended, and begin the next ones.

        :param rows: observations after the step; those of the next episodes come in their places
        :param infos: of the step; get ``terminal_observation``
        :param batch: the batch's infos of the step
        :param dones: whose episodes ended, shape (n_envs,)
        """
        ended = np.flatnonzero(dones).tolist()
        if self.mode == SAME_STEP:
            last, finals = batch.get("final_obs"), _split_infos(batch.get("final_info", {}), self.num_envs)
            require(last is not None, "env", self.env, "one that gives the last observation of an episode as `final_obs`")
            for place in ended:
                # What was put beside the reset's own infos is of the episode (gymnasium's RecordEpisodeStatistics)
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
        Reset environments whose episodes ended and leave the others alone.

        :param rows: observations, changed in these places
        :param dones: which, shape (n_envs,)
        :raises ArgumentError: if others changed with them
        """
        observations, batch = self.env.reset(options={"reset_mask": dones.copy()})
        fresh = self._copy_observations(observations)
        count = len(fresh[self.keys[0]])  # of all environments, or (EnvPool) of those that were reset
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
        """:return: a picture of each environment."""
        frames: Any = self.env.render()
        return list(frames or [None] * self.num_envs)

    def has_attr(self, attr_name: str) -> bool:
        """
        :param attr_name: of an attribute or method of the environments
        :return: whether all of them have it; a batch that is not made of environments has none
        """
        batch: Any = self.env.unwrapped
        return hasattr(batch, "call") and all(batch.call("has_wrapper_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: of an attribute of the environments
        :param indices: of those to ask, None for all
        :return: its values
        :raises AttributeError: if the batch is not made of environments, or they lack it
        """
        if attr_name == "render_mode":
            values: Sequence[Any] = [self.env.render_mode] * self.num_envs
        else:
            values = self._environments_with(attr_name).call("get_wrapper_attr", attr_name)
        return [values[place] for place in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        :param attr_name: of an attribute of the environments, new or not
        :param value: for each of them
        :param indices: of those to change, None for all
        :raises AttributeError: if the batch is not made of environments
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
        :param method_name: of a method of the environments
        :param method_args: for it
        :param indices: of those to call it of, None for all
        :param method_kwargs: for it
        :return: what it returned
        :raises AttributeError: if the batch is not made of environments, or they lack it
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
        :param wrapper_class: of single environments; in other processes a class of that name
        :param indices: of those to ask, None for all
        :return: whether each is wrapped with it
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
        :param name: of what is asked of them
        :return: gymnasium's vectorised environment, with its ``call`` and ``set_attr``
        :raises AttributeError: if there are no single environments
        """
        batch = self.env.unwrapped
        if not hasattr(batch, "call"):
            raise AttributeError(f"`{name}` cannot be asked of single environments: {batch} is one batch and has none")
        return batch

    def _environments_with(self, name: str) -> Any:
        """
        :param name: of an attribute or method; asking for one that is missing would end gymnasium's other processes
        :return: as :meth:`_environments`
        :raises AttributeError: if there are no single environments, or they lack it
        """
        batch = self._environments(name)
        if not self.has_attr(name):
            raise AttributeError(f"the environments of {batch} have no attribute `{name}`")
        return batch

    def _require_all(self, places: list[int]) -> None:
        """
        :param places: of environments in other processes
        :raises ArgumentError: if they are not all: gymnasium reaches them together only
        """
        allowed = f"None or all of range({self.num_envs}), because {self.env.unwrapped} asks its environments together"
        require(sorted(places) == list(range(self.num_envs)), "indices", places, allowed)


class ResettableCartPole(VectorWrapper):  # without types, which it takes from gymnasium 1.1 on
    """
    Gymnasium's batched CartPole, which can also reset some of its environments at once.

    They begin as the batch itself would let them begin one step later, from the same random numbers.

    :param env: the batch
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: for the batch
        :param options: for the batch, or ``reset_mask``: which environments to reset
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
    :param env: the batch
    :return: what happens at the end of an episode
    :raises ArgumentError: if the batch does not say so, or cannot reset some of its environments
    """
    mode = env.metadata.get("autoreset_mode", NEXT_STEP if isinstance(env, ResettableCartPole) else None)
    mode = getattr(mode, "value", mode)
    modes = [NEXT_STEP, SAME_STEP, DISABLED]
    require(mode in modes, "env.metadata['autoreset_mode']", mode, f"one of {modes} (gymnasium 1.1 or later says so itself)")
    if mode != SAME_STEP:
        base: Any = env.unwrapped
        separate = isinstance(base, AsyncVectorEnv) and not base.shared_memory
        require(not separate, "env", env, "made with autoreset_mode SameStep, or with shared_memory")
        counted = any(isinstance(layer, RecordEpisodeStatistics) for layer in _layers(env))
        require(
            not counted, "env", env, f"without RecordEpisodeStatistics, which counts wrongly in mode {mode}: use VecMonitor"
        )
    return str(mode)


def _layers(env: Any) -> Iterator[Any]:
    """
    :param env: the batch
    :return: its wrappers, from the outside, and what they wrap
    """
    while isinstance(env, VectorWrapper):
        yield env
        env = env.env
    yield env


def _split_infos(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """
    Turn the infos of a batch into one dict for each environment.

    :param batch: arrays by key, and boolean arrays by ``_key`` that say who has it; dicts of the same
    :param count: number of environments
    :return: dicts that share no memory with the batch; what is not one value for each environment goes to all
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
    :param values: of one key of a batch's infos
    :param count: number of environments
    :return: one for each environment
    """
    if isinstance(values, dict):
        return _split_infos(values, count)
    if np.shape(values)[:1] != (count,):
        return [deepcopy(values) for _ in range(count)]
    rows = deepcopy(np.asarray(values))  # objects too
    return rows.tolist() if rows.ndim == 1 else list(rows)


def _observation_at(observations: Any, place: int) -> Any:
    """
    :param observations: of all environments: an array, also one of objects, or a dict or tuple of arrays
    :param place: of an environment
    :return: its observation
    """
    if isinstance(observations, dict):
        return {key: values[place] for key, values in observations.items()}
    if isinstance(observations, tuple):
        return tuple(values[place] for values in observations)
    return observations[place]
