"""
What the modules of a policy hold besides weights and buffers.

A compiled graph keeps these values as they were when it was traced, so a change of any of them asks for another graph.
"""

import inspect
import io
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator
from types import CodeType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

#: Packages whose classes read nothing but their own attributes
KNOWN_PACKAGES = {"builtins", "torch", "stable_baselines3", "sb3_contrib", "sb3_ppo_penalty"}
#: Attributes that :func:`module_state` records in another way, or that no evaluation reads
SKIPPED_ATTRIBUTES = {"_parameters", "_buffers", "_modules", "optimizer", "lr_schedule"}
#: Types whose values :func:`repr` tells apart
PLAIN_TYPES = {type(None), bool, int, float, str}


class UntraceableError(Exception):
    """Raised for what a policy does while it is evaluated and no graph can repeat."""


class _StatePickler(pickle.Pickler):
    """
    Pickles a value such that two pickles tell whether it has changed.

    :param file: the file to write to
    :param registered: identities of the policy's own weights and buffers, whose values a graph is given at each call
    """

    def __init__(self, file: io.BytesIO, registered: set[int]) -> None:
        super().__init__(file)
        self.registered = registered

    def persistent_id(self, obj: Any) -> Any:
        """
        Return what to write in the place of an object, or None to pickle it as it is.

        :param obj: the object about to be pickled
        """
        if isinstance(obj, (nn.Module, spaces.Space, th.optim.Optimizer)):
            return type(obj).__qualname__
        if not isinstance(obj, th.Tensor):
            return None
        if id(obj) in self.registered:
            return id(obj)
        if type(obj) not in (th.Tensor, nn.Parameter):
            # A tensor without data that tracing has left there
            return type(obj).__qualname__
        values = obj.detach().cpu().reshape(-1)
        return str(obj.dtype), tuple(obj.shape), values.view(th.uint8).numpy().tobytes()


def _fingerprint(value: Any, registered: set[int]) -> bytes:
    """
    Return bytes that differ once a value has changed: its pickle, or its identity where it cannot be pickled.

    :param value: a value of any kind
    :param registered: see :class:`_StatePickler`
    """
    if type(value) in PLAIN_TYPES or (type(value) in (dict, OrderedDict) and not value):
        return repr(value).encode()
    file = io.BytesIO()
    try:
        _StatePickler(file, registered).dump(value)
    # Whatever a class's own pickling raises
    except Exception:
        return str(id(value)).encode()
    return file.getvalue()


def _names_used(code: CodeType) -> set[str]:
    """
    Return the names of globals and attributes that a function uses, with those of the functions inside it.

    :param code: code of the function
    """
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names_used, inner))


def _values_outside(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """
    Go over the values that a module's class, if it is a user's, reads from outside of the module.

    :param module: a module of any class
    :return: names and values of class attributes, and of the globals and closures that its methods use
    """
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] in KNOWN_PACKAGES:
            continue
        for name, value in vars(cls).items():
            method = inspect.unwrap(value) if inspect.isfunction(value) else None
            if inspect.isfunction(method):
                cells = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
                used = {key: method.__globals__[key] for key in _names_used(method.__code__) & set(method.__globals__)}
                used |= {key: cell.cell_contents for key, cell in cells if key != "__class__"}
                yield from ((f"{cls.__qualname__}.{name}: {key}", found) for key, found in used.items())
            elif not name.startswith("__"):
                yield f"{cls.__qualname__}.{name}", value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """
    Go over the values that a module holds itself.

    :param module: a module of any class
    :return: names and values of its attributes, and the names of its weights, buffers and submodules
    """
    yield "_names", [list(module._parameters), list(module._modules)]
    yield "_buffers", {name: buffer is None for name, buffer in module._buffers.items()}
    for name, value in vars(module).items():
        if name == "action_dist":
            # Every evaluation leaves its tensors there, so its plain values alone count
            yield name, {key: entry for key, entry in vars(value).items() if isinstance(entry, (bool, int, float, str))}
        elif name not in SKIPPED_ATTRIBUTES:
            yield name, value


def module_state(policy: nn.Module) -> dict[str, bytes]:
    """
    Record all that an evaluation of a policy may read or change besides weights, buffers and its arguments.

    :param policy: a policy with its submodules
    :return: a fingerprint for each attribute of each module, and for each global, closure and class attribute that their
        classes use, by name; nothing has changed if all fingerprints are equal
    """
    registered = {id(tensor) for tensor in (*policy.parameters(), *policy.buffers())}
    state = {}
    for path, module in policy.named_modules():
        own = ((f"{path}.{name}".lstrip("."), value) for name, value in _attributes(module))
        state.update({name: _fingerprint(value, registered) for name, value in (*own, *_values_outside(module))})
    return state


def evaluation_state(policy: nn.Module) -> dict[str, bytes]:
    """
    Record all that an evaluation of a policy may change and no graph would.

    Numbers that a module draws from Python's or numpy's global generator would be constants of a graph.

    :param policy: a policy with its submodules
    :return: :func:`module_state`, and fingerprints of the two generators
    """
    generators = {"random": random.getstate(), "numpy.random": np.random.get_state()}  # noqa: NPY002 (what a module would draw from)
    return {**module_state(policy), **{name: _fingerprint(state, set()) for name, state in generators.items()}}
