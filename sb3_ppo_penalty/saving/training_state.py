"""
Capture and restore what a training needs to go on exactly, beside the model: random generators and environments.

A *layer* is an environment, a VecEnv or one of the wrappers around them. The state of each layer is its attributes without the
layers below. All states are pickled together, and references to layers are pickled as indices: what layers share stays shared.
"""

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

#: Attributes that are not restored: the layers below, what follows from a layer's class, Monitor's open file
LIVE_ATTRIBUTES = {"env", "envs", "venv", "class_attributes", "results_writer"}
#: The only attributes of the innermost VecEnv that are restored: each step overwrites the others, or processes own them
BASE_ATTRIBUTES = {"_seeds", "_options", "reset_infos", "action_space", "observation_space"}


class RandomStates(NamedTuple):
    """
    The states of this process's random generators.

    :param python: state of ``random``
    :param numpy: state of numpy's global generator
    :param torch: state of torch's generator on the CPU
    :param cuda: states of torch's generators, one per GPU; empty if no GPU has been used
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: th.Tensor
    cuda: list[th.Tensor]

    @classmethod
    def now(cls) -> "RandomStates":
        """Capture the current states."""
        cuda = th.cuda.get_rng_state_all() if th.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(), th.get_rng_state(), cuda)  # noqa: NPY002 (SB3's stream)

    def restore(self) -> None:
        """Set the generators to these states; those of GPUs that this machine lacks are left out."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 (SB3's stream)
        th.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda[: th.cuda.device_count()]):
            th.cuda.set_rng_state(state, device)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickle the contents of layers, and refer to the layers themselves by index."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._indices = {id(layer): index for index, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        """Return the index of a layer; None for any other object, which is then pickled."""
        return self._indices.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        """
        Choose how to pickle an object.

        :param obj: object to pickle
        :return: what :class:`pickle.Pickler` asks for
        :raises PicklingError: for an EzPickle, which would be restored in its initial state
        """
        if isinstance(obj, EzPickle) and type(obj).__getstate__ is EzPickle.__getstate__:
            raise pickle.PicklingError(f"{type(obj).__name__} is an EzPickle: its pickle holds constructor arguments only")
        main = sys.modules.get("__main__")
        if isinstance(obj, type) and obj.__module__ == "__main__" and getattr(main, obj.__qualname__, None) is obj:
            # By name, where cloudpickle would make a copy of the class: restored objects must be of the script's own classes
            return NotImplemented
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    """Unpickle what :class:`_Pickler` wrote, with other layers in the places of those referred to."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._layers = layers

    def persistent_load(self, pid: int) -> Any:
        """Return the layer of that index."""
        return self._layers[pid]


def dumps(obj: Any, layers: Sequence[Any] = ()) -> bytes:
    """
    Pickle an object, with references to layers in the place of the layers.

    :param obj: object to pickle
    :param layers: objects to refer to instead of pickling them
    :return: the pickle
    """
    file = io.BytesIO()
    _Pickler(file, layers).dump(obj)
    return file.getvalue()


def loads(content: bytes, layers: Sequence[Any] = ()) -> Any:
    """
    Unpickle what :func:`dumps` returned; this runs the code in it.

    :param content: the pickle
    :param layers: objects to refer to, in the order of those given to :func:`dumps`
    :return: the object
    """
    return _Unpickler(io.BytesIO(content), layers).load()


def _layers_of(env: Any, inner: str) -> list[Any]:
    """
    List an environment's layers from the outermost wrapper to the environment itself.

    :param env: an environment or a VecEnv
    :param inner: name of the attribute that holds the next layer
    :return: the layers
    """
    layers = [env]
    while isinstance(layers[-1], (gym.Wrapper, VecEnvWrapper)):
        layers.append(getattr(layers[-1], inner))
    return layers


def _names(layers: Sequence[Any]) -> list[str]:
    """Return the names of the layers' classes."""
    return [type(layer).__qualname__ for layer in layers]


def _pickles_itself(layer: Any) -> bool:
    """Tell whether a layer's class defines how to pickle it."""
    standard = {getattr(object, "__getstate__", None), EzPickle.__getstate__, None}
    return getattr(type(layer), "__getstate__", None) not in standard and hasattr(type(layer), "__setstate__")


def _state_of(layer: Any) -> Any:
    """Return the state that an environment's layer defines itself, or else its attributes by name."""
    if _pickles_itself(layer):
        return layer.__getstate__()
    return {name: value for name, value in vars(layer).items() if name not in LIVE_ATTRIBUTES}


def _set_attributes(layer: Any, attributes: dict[str, Any]) -> None:
    """Set a layer's attributes; its spaces are changed in place."""
    for name, value in attributes.items():
        live = vars(layer).get(name)
        if isinstance(value, spaces.Space) and type(live) is type(value):
            # In place, random state and all: environment, VecEnv and model share their spaces
            vars(live).update(vars(value))
        else:
            vars(layer)[name] = value


def _dumps_or_problem(obj: Any, layers: Sequence[Any]) -> bytes | str:
    """Return an object's pickle, or the reason why it cannot be pickled."""
    try:
        return dumps(obj, layers)
    except Exception as error:  # a class's own pickling may raise anything
        return str(error) or repr(error)


def _problems_with(states: Sequence[Any], layers: Sequence[Any]) -> dict[tuple[int, str], str]:
    """Return why attributes cannot be pickled, by their layer's index and their name."""
    found = {}
    for index, (state, layer) in enumerate(zip(states, layers, strict=True)):
        for name, value in (state if isinstance(state, dict) else {"__getstate__": state}).items():
            problem = _dumps_or_problem(value, layers)
            if isinstance(problem, str):
                found[index, name] = f"{type(layer).__qualname__}.{name}: {problem}"
    return found


def environments_state(envs: Sequence[gym.Env[Any, Any]]) -> bytes | str:
    """
    Capture the state of environments, with their wrappers.

    :param envs: environments of this process
    :return: their pickled state, or the reason why they cannot be pickled
    """
    layers = [layer for env in envs for layer in _layers_of(env, "env")]
    states = [_state_of(layer) for layer in layers]
    content = _dumps_or_problem((_names(layers), states), layers)
    if isinstance(content, bytes):
        return content
    return f"cannot be pickled ({'; '.join(sorted(set(_problems_with(states, layers).values()))) or content})"


def restore_environments(envs: Sequence[gym.Env[Any, Any]], content: bytes) -> str:
    """
    Restore the state of environments.

    :param envs: environments made and wrapped as those that were saved
    :param content: from :func:`environments_state`
    :return: empty, or how the environments have to be made instead
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
    Let the state of an environment be read and set from another process, which ``SubprocVecEnv`` itself does not.

    This wrapper has to be the outermost::

        env = make_vec_env("Pendulum-v1", n_envs=4, vec_env_cls=SubprocVecEnv, wrapper_class=ResumableEnv)

    :param env: environment to wrap; :class:`~.ResumableCheckpointCallback` says which environments can be saved
    """

    def checkpoint_state(self) -> tuple[bytes | str, RandomStates]:
        """
        Capture the state of the environment and of its process.

        :return: the environment's state, or why it cannot be pickled; the states of the process's random generators
        """
        return environments_state([self]), RandomStates.now()

    def restore_checkpoint(self, content: bytes, random_states: RandomStates) -> str:
        """
        Restore the state of the environment and of its process.

        :param content: the environment's state, from :meth:`checkpoint_state` of an environment made as this one
        :param random_states: states of the process's random generators
        :return: empty, or what is wrong: an exception would end the process
        """
        problem = restore_environments([self], content)
        random_states.restore()
        return problem


class VecEnvState(NamedTuple):
    """
    The state of a VecEnv with all its wrappers.

    :param names: names of the classes of its wrappers, from the outermost, and of its own
    :param num_envs: number of environments
    :param wrappers: pickled attributes of the wrappers and of the VecEnv itself
    :param environments: pickled state of all environments; or of each, with the random generators of its process; or the
        reason why they cannot be saved
    """

    names: list[str]
    num_envs: int
    wrappers: bytes
    environments: bytes | list[tuple[bytes, RandomStates]] | str

    @classmethod
    def of(cls, env: VecEnv) -> "VecEnvState":
        """
        Capture the state of a VecEnv; warn of what cannot be pickled.

        :param env: VecEnv between two steps
        :return: the state
        """
        layers = _layers_of(env, "venv")
        states = [_state_of_vec(layer) for layer in layers]
        wrappers = _dumps_or_problem(states, layers)
        if isinstance(wrappers, str):
            for (index, name), problem in _problems_with(states, layers).items():
                warnings.warn(f"the checkpoint goes without {problem}", stacklevel=2)
                del states[index][name]
            wrappers = dumps(states, layers)
        environments = _environments_of(layers[-1])
        if isinstance(environments, str):
            warnings.warn(f"the checkpoint goes without the environments: they {environments}", stacklevel=2)
        return cls(_names(layers), env.num_envs, wrappers, environments)

    def mismatch(self, env: VecEnv) -> str:
        """
        Compare the number of environments and the wrappers with those that were saved.

        :param env: VecEnv to restore this state to
        :return: empty, or how it has to be made instead
        """
        names = _names(_layers_of(env, "venv"))
        if (names, env.num_envs) == (self.names, self.num_envs):
            return ""
        return f"{self.num_envs} environments in {' of '.join(self.names)}, not {env.num_envs} in {' of '.join(names)}"

    def restore(self, env: VecEnv) -> str:
        """
        Restore a VecEnv to this state.

        :param env: VecEnv made as the one that was saved
        :return: empty, or what is wrong with its environments
        """
        layers = _layers_of(env, "venv")
        for layer, state in zip(layers, loads(self.wrappers, layers), strict=True):
            _set_attributes(layer, state)
        base, saved = layers[-1], self.environments
        if isinstance(saved, bytes):
            return restore_environments(base.envs, saved)
        if isinstance(saved, str):
            return ""
        answers = [base.env_method("restore_checkpoint", *state, indices=index)[0] for index, state in enumerate(saved)]
        return "; ".join(sorted(set(answers) - {""}))


def _state_of_vec(layer: VecEnv) -> dict[str, Any]:
    """Return the attributes of a VecEnv's layer; ``VecNormalize.__getstate__`` is not used: it drops the running returns."""
    names = set(vars(layer)) - LIVE_ATTRIBUTES if isinstance(layer, VecEnvWrapper) else BASE_ATTRIBUTES & set(vars(layer))
    return {name: vars(layer)[name] for name in sorted(names)}


def _environments_of(base: VecEnv) -> bytes | list[tuple[bytes, RandomStates]] | str:
    """Return the ``environments`` of a :class:`VecEnvState`, from a VecEnv without wrappers."""
    if isinstance(base, DummyVecEnv):
        return environments_state(base.envs)
    if not isinstance(base, SubprocVecEnv):
        return f"live in a {type(base).__qualname__}, which is known neither as a DummyVecEnv nor as a SubprocVecEnv"
    # Only these three requests are safe: a process ends if it cannot pickle an answer or does not have a method
    if not all(base.env_is_wrapped(ResumableEnv)):
        return "live where only `ResumableEnv` reaches them: wrap each in it"
    if set(base.env_method("class_name")) != {ResumableEnv.__name__}:
        return "are wrapped outside `ResumableEnv`, which has to be the outermost"
    states = base.env_method("checkpoint_state")
    return "; ".join(sorted({content for content, _ in states if isinstance(content, str)})) or states
