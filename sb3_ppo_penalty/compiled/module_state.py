"""What the modules of a policy hold besides weights and buffers: a compiled graph has it as it was when it was traced."""

import inspect
import io
import pickle
import random
from collections.abc import Iterator
from types import CodeType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

#: The packages whose classes read nothing but their own attributes
KNOWN = {"builtins", "torch", "stable_baselines3", "sb3_contrib", "sb3_ppo_penalty"}
#: What :func:`module_state` sees in another way, or what no evaluation reads
ELSEWHERE = {"_parameters", "_buffers", "_modules", "optimizer", "lr_schedule"}


class UnfollowedError(Exception):
    """What a policy does to itself while it is evaluated can be repeated by no graph."""


class _Marker(pickle.Pickler):
    """
    Pickles a value so that two pickles tell whether it has changed.

    :param file: written to
    :param registered: the policy's own weights and buffers, by identity: a graph is given them
    """

    def __init__(self, file: io.BytesIO, registered: set[int]) -> None:
        super().__init__(file)
        self.registered = registered

    def persistent_id(self, obj: Any) -> Any:
        """
        Stand in for what must not be pickled as it is.

        :param obj: about to be pickled
        :return: its stand-in, or None to pickle it
        """
        if isinstance(obj, (nn.Module, spaces.Space, th.optim.Optimizer)):
            return type(obj).__qualname__
        if not isinstance(obj, th.Tensor):
            return None
        if id(obj) in self.registered:
            return id(obj)
        if type(obj) not in (th.Tensor, nn.Parameter):
            # One without data, which a trace has left
            return type(obj).__qualname__
        values = obj.detach().cpu().reshape(-1)
        return str(obj.dtype), tuple(obj.shape), values.view(th.uint8).numpy().tobytes()


def _mark(value: Any, registered: set[int]) -> bytes:
    """
    Tell a value from what it may become.

    :param value: of any kind
    :param registered: see :class:`_Marker`
    :return: its pickle; where it has none, its identity
    """
    file = io.BytesIO()
    try:
        _Marker(file, registered).dump(value)
    # Whatever a class's own pickling raises
    except Exception:
        return str(id(value)).encode()
    return file.getvalue()


def _names(code: CodeType) -> set[str]:
    """
    Find the names that a function uses, and the functions inside it.

    :param code: of the function
    :return: of globals and attributes
    """
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _referred_to(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """
    Go over what a user's class of a module reads from outside of the module.

    :param module: of any class
    :return: values of class attributes, and of the globals and closures that its methods use, by class and name
    """
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] in KNOWN:
            continue
        for name, value in vars(cls).items():
            method = inspect.unwrap(value) if inspect.isfunction(value) else None
            if inspect.isfunction(method):
                cells = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
                seen = {each: method.__globals__[each] for each in _names(method.__code__) & set(method.__globals__)}
                seen |= {each: cell.cell_contents for each, cell in cells if each != "__class__"}
                yield from ((f"{cls.__qualname__}.{name}: {each}", found) for each, found in seen.items())
            elif not name.startswith("__"):
                yield f"{cls.__qualname__}.{name}", value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """
    Go over what a module holds itself.

    :param module: of any class
    :return: names and values of its attributes, and the names of its weights, buffers and modules
    """
    yield "_names", [list(module._parameters), list(module._modules)]
    yield "_buffers", {name: buffer is None for name, buffer in module._buffers.items()}
    for name, value in vars(module).items():
        if name == "action_dist":
            # Every evaluation leaves its tensors there
            plain = {key: each for key, each in vars(value).items() if isinstance(each, (bool, int, float, str))}
            yield name, plain
        elif name not in ELSEWHERE:
            yield name, value


def module_state(policy: nn.Module) -> dict[str, bytes]:
    """
    Mark all that an evaluation of a policy may read, or change, besides weights, buffers and what it is given.

    :param policy: with its modules
    :return: a mark for each attribute of each module, and for each global, closure and class attribute that their classes
        use, by name; equal marks: nothing has changed
    """
    registered = {id(tensor) for tensor in (*policy.parameters(), *policy.buffers())}
    found = {}
    for path, module in policy.named_modules():
        own = ((f"{path}.{name}".lstrip("."), value) for name, value in _attributes(module))
        found.update({name: _mark(value, registered) for name, value in (*own, *_referred_to(module))})
    return found


def evaluation_state(policy: nn.Module) -> dict[str, bytes]:
    """
    Mark all that an evaluation of a policy may change and no graph would: numbers drawn outside of torch are constants there.

    :param policy: with its modules
    :return: :func:`module_state`, and the states of Python's and numpy's global generators
    """
    drawn = {"random": random.getstate(), "numpy.random": np.random.get_state()}  # noqa: NPY002 (what a module would draw from)
    return {**module_state(policy), **{name: _mark(state, set()) for name, state in drawn.items()}}
