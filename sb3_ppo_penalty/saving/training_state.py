"""What a training needs to go on where it stood, beside the model: random generators and environments."""

import io
import pickle
import random
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import cloudpickle  # type: ignore[import-untyped]
import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.utils import EzPickle
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

#: What a layer keeps of its own: the layers below it, what follows from its class, Monitor's open file
LIVE_ATTRIBUTES = {"env", "envs", "venv", "class_attributes", "results_writer"}
#: All that is restored of the innermost VecEnv: the rest is overwritten by every step, or belongs to its processes
BASE_ATTRIBUTES = {"_seeds", "_options", "reset_infos", "action_space", "observation_space"}


class RandomStates(NamedTuple):
    """
    The states of this process's random generators.

    :param python: of ``random``
    :param numpy: of numpy's global generator
    :param torch: of torch's generator on the CPU
    :param cuda: of torch's generator on each GPU; empty if no GPU has been used
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: th.Tensor
    cuda: list[th.Tensor]

    @classmethod
    def now(cls) -> "RandomStates":
        """:return: the states as they are."""
        cuda = th.cuda.get_rng_state_all() if th.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(), th.get_rng_state(), cuda)  # noqa: NPY002 (SB3's stream)

    def restore(self) -> None:
        """Set the generators back; those of GPUs as far as this machine has them."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 (SB3's stream)
        th.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda[: th.cuda.device_count()]):
            th.cuda.set_rng_state(state, device)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """
    Pickles what layers hold, and refers to the layers themselves by their place.

    :param file: written to
    :param layers: not pickled
    """

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._places = {id(layer): place for place, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        """
        :param obj: anything on the way
        :return: its place if it is a layer
        """
        return self._places.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        """
        :param obj: anything on the way
        :return: how to pickle it
        :raises PicklingError: for an EzPickle, which would come back as new
        """
        if isinstance(obj, EzPickle) and type(obj).__getstate__ is EzPickle.__getstate__:
            raise pickle.PicklingError(f"{type(obj).__name__} is an EzPickle: its pickle holds constructor arguments only")
        main = sys.modules.get("__main__")
        if isinstance(obj, type) and obj.__module__ == "__main__" and getattr(main, obj.__qualname__, None) is obj:
            # By name, where cloudpickle would make a copy: what a script's resumed environments hold must be of its classes
            return NotImplemented
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    """
    :param file: read from
    :param layers: those that take the places of the pickled ones
    """

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._layers = layers

    def persistent_load(self, pid: int) -> Any:
        """
        :param pid: a place
        :return: the layer there
        """
        return self._layers[pid]


def dumps(obj: Any, layers: Sequence[Any] = ()) -> bytes:
    """
    :param obj: to pickle
    :param layers: objects to refer to instead of pickling them
    :return: its pickle
    """
    file = io.BytesIO()
    _Pickler(file, layers).dump(obj)
    return file.getvalue()


def loads(content: bytes, layers: Sequence[Any] = ()) -> Any:
    """
    :param content: from :func:`dumps`; runs whatever it says
    :param layers: the objects to refer to, as many and in the order of those at the time
    :return: what was pickled
    """
    return _Unpickler(io.BytesIO(content), layers).load()


def _layers_of(env: Any, inner: str) -> list[Any]:
    """
    :param env: an environment or a VecEnv
    :param inner: name of the attribute that holds the next layer
    :return: its wrappers from the outermost, and the environment itself
    """
    layers = [env]
    while isinstance(layers[-1], (gym.Wrapper, VecEnvWrapper)):
        layers.append(getattr(layers[-1], inner))
    return layers


def _names(layers: Sequence[Any]) -> list[str]:
    """
    :param layers: of environments
    :return: the names of their classes
    """
    return [type(layer).__qualname__ for layer in layers]


def _pickles_itself(layer: Any) -> bool:
    """
    :param layer: of an environment
    :return: whether its class says how to pickle it
    """
    standard = {getattr(object, "__getstate__", None), EzPickle.__getstate__, None}
    return getattr(type(layer), "__getstate__", None) not in standard and hasattr(type(layer), "__setstate__")


def _state_of(layer: Any) -> Any:
    """
    :param layer: of an environment
    :return: what it says itself, or its attributes
    """
    if _pickles_itself(layer):
        return layer.__getstate__()
    return {name: value for name, value in vars(layer).items() if name not in LIVE_ATTRIBUTES}


def _set_attributes(layer: Any, attributes: dict[str, Any]) -> None:
    """
    :param layer: of an environment or a VecEnv
    :param attributes: from :func:`_state_of`
    """
    for name, value in attributes.items():
        live = vars(layer).get(name)
        if isinstance(value, spaces.Space) and type(live) is type(value):
            # In place, random state and all: environment, VecEnv and model share their spaces
            vars(live).update(vars(value))
        else:
            vars(layer)[name] = value


def _dumps_or_problem(obj: Any, layers: Sequence[Any]) -> bytes | str:
    """
    :param obj: to pickle
    :param layers: objects to refer to
    :return: its pickle, or why there is none
    """
    try:
        return dumps(obj, layers)
    except Exception as error:  # whatever a class's own pickling raises
        return str(error) or repr(error)


def _problems_with(states: Sequence[Any], layers: Sequence[Any]) -> dict[tuple[int, str], str]:
    """
    :param states: of the layers
    :param layers: of environments or of a VecEnv
    :return: layer's place and attribute's name -> why it cannot be pickled
    """
    found = {}
    for place, (state, layer) in enumerate(zip(states, layers, strict=True)):
        for name, value in (state if isinstance(state, dict) else {"__getstate__": state}).items():
            problem = _dumps_or_problem(value, layers)
            if isinstance(problem, str):
                found[place, name] = f"{type(layer).__qualname__}.{name}: {problem}"
    return found


def environments_state(envs: Sequence[gym.Env[Any, Any]]) -> bytes | str:
    """
    :param envs: environments of this process; what they share stays shared
    :return: their state, or why there is none
    """
    layers = [layer for env in envs for layer in _layers_of(env, "env")]
    states = [_state_of(layer) for layer in layers]
    content = _dumps_or_problem((_names(layers), states), layers)
    if isinstance(content, bytes):
        return content
    return f"cannot be pickled ({'; '.join(sorted(set(_problems_with(states, layers).values()))) or content})"


def restore_environments(envs: Sequence[gym.Env[Any, Any]], content: bytes) -> str:
    """
    :param envs: made as those were
    :param content: from :func:`environments_state`
    :return: how they have to be made instead, or nothing if all went well
    """
    layers = [layer for env in envs for layer in _layers_of(env, "env")]
    names, states = loads(content, layers)
    if names != _names(layers):
        return f"environments of {names}, not {_names(layers)}"
    for layer, state in zip(layers, states, strict=True):
        if _pickles_itself(layer):
            layer.__setstate__(state)
        else:
            _set_attributes(layer, state)
    return ""


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Lets the state of an environment be read and set from another process, which ``SubprocVecEnv`` itself does not.

    It has to be the outermost wrapper::

        env = make_vec_env("Pendulum-v1", n_envs=4, vec_env_cls=SubprocVecEnv, wrapper_class=ResumableEnv)

    :param env: any environment; see :class:`~.ResumableCheckpointCallback` for which of them can
        be saved
    """

    def checkpoint_state(self) -> tuple[bytes | str, RandomStates]:
        """:return: the environment's state, or why there is none, and the random generators of the process it lives in."""
        return environments_state([self]), RandomStates.now()

    def restore_checkpoint(self, content: bytes, random_states: RandomStates) -> str:
        """
        :param content: from :meth:`checkpoint_state` of an environment that was made as this one
        :param random_states: likewise
        :return: what is wrong, or nothing if all went well: an exception would end the process
        """
        problem = restore_environments([self], content)
        random_states.restore()
        return problem


class VecEnvState(NamedTuple):
    """
    The state of a VecEnv with all its wrappers.

    :param names: the classes of its wrappers, and its own
    :param num_envs: number of environments
    :param wrappers: pickle of their attributes
    :param environments: what the environments need to go on, all or each with its process; a string says why they cannot
    """

    names: list[str]
    num_envs: int
    wrappers: bytes
    environments: bytes | list[tuple[bytes, RandomStates]] | str

    @classmethod
    def of(cls, env: VecEnv) -> "VecEnvState":
        """
        :param env: between two steps
        :return: its state
        """
        layers = _layers_of(env, "venv")
        states = [_state_of_vec(layer) for layer in layers]
        wrappers = _dumps_or_problem(states, layers)
        if isinstance(wrappers, str):
            for (place, name), problem in _problems_with(states, layers).items():
                warnings.warn(f"the checkpoint goes without {problem}", stacklevel=2)
                del states[place][name]
            wrappers = dumps(states, layers)
        environments = _environments_of(layers[-1])
        if isinstance(environments, str):
            warnings.warn(f"the checkpoint goes without the environments: they {environments}", stacklevel=2)
        return cls(_names(layers), env.num_envs, wrappers, environments)

    def mismatch(self, env: VecEnv) -> str:
        """
        :param env: to be restored to this state
        :return: how it has to be made instead, or nothing if it is made as the other was
        """
        names = _names(_layers_of(env, "venv"))
        if (names, env.num_envs) == (self.names, self.num_envs):
            return ""
        return f"{self.num_envs} environments in {' of '.join(self.names)}, not {env.num_envs} in {' of '.join(names)}"

    def restore(self, env: VecEnv) -> str:
        """
        :param env: made as the other was
        :return: what is wrong with the environments, or nothing if all went well
        """
        layers = _layers_of(env, "venv")
        for layer, state in zip(layers, loads(self.wrappers, layers), strict=True):
            _set_attributes(layer, state)
        base, saved = layers[-1], self.environments
        if isinstance(saved, bytes):
            return restore_environments(base.envs, saved)
        if isinstance(saved, str):
            return ""
        answers = [base.env_method("restore_checkpoint", *state, indices=place)[0] for place, state in enumerate(saved)]
        return "; ".join(sorted(set(answers) - {""}))


def _state_of_vec(layer: VecEnv) -> dict[str, Any]:
    """
    :param layer: a VecEnv or its wrapper; what ``VecNormalize`` says of itself leaves out its running returns
    :return: its attributes
    """
    names = set(vars(layer)) - LIVE_ATTRIBUTES if isinstance(layer, VecEnvWrapper) else BASE_ATTRIBUTES & set(vars(layer))
    return {name: vars(layer)[name] for name in sorted(names)}


def _environments_of(base: VecEnv) -> bytes | list[tuple[bytes, RandomStates]] | str:
    """
    :param base: without wrappers
    :return: see :class:`VecEnvState`
    """
    if isinstance(base, DummyVecEnv):
        return environments_state(base.envs)
    if not isinstance(base, SubprocVecEnv):
        return f"live in a {type(base).__qualname__}, which is known neither as a DummyVecEnv nor as a SubprocVecEnv"
    # Nothing else may be asked of another process: what it cannot pickle, or does not have, ends it
    if not all(base.env_is_wrapped(ResumableEnv)):
        return "live where only `ResumableEnv` reaches them: wrap each in it"
    if set(base.env_method("class_name")) != {ResumableEnv.__name__}:
        return "are wrapped outside `ResumableEnv`, which has to be the outermost"
    states = base.env_method("checkpoint_state")
    return "; ".join(sorted({content for content, _ in states if isinstance(content, str)})) or states
