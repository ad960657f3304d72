"""A model from a stranger's file: what the file describes is built from known parts, what it counts is checked."""

import copy
import io
import math
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sb3_ppo_penalty.arguments import require, require_integer
from sb3_ppo_penalty.objectives.kl_controllers import AdaptiveRule, DualAscent, FixedCoefficient, Proportional
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.policies.distributions import covariance_tensor
from sb3_ppo_penalty.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, covariance_mismatch
from sb3_ppo_penalty.rollouts.rollout import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.safe_archive import PickleDescription, SavedModel, check, read_model, refusing
from sb3_ppo_penalty.updates.guard import Guard

SelfOnPolicy = TypeVar("SelfOnPolicy", bound=OnPolicyAlgorithm)

#: 256 MiB: an Atari policy's weights with Adam's moments are 20 MB
DEFAULT_MAX_BYTES = 2**28
#: Entries that come from the environment or are made anew. A folder for logs is a path to write to: the caller's choice
IGNORED = {
    *("observation_space", "action_space", "n_envs", "_last_obs", "_last_episode_starts", "_last_original_obs"),
    *("lr_schedule", "ep_info_buffer", "ep_success_buffer", "action_noise", "tensorboard_log"),
}
#: Arguments that are no part of a file, and those that SB3 keeps under another name
NOT_SAVED = {"self", "env", "device", "_init_setup_model"}
ENTRIES = {"policy": "policy_class", "stats_window_size": "_stats_window_size"}
POLICIES = [ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy]
BUFFERS = [RolloutBuffer, DictRolloutBuffer, RewardToGoRolloutBuffer, RewardToGoDictRolloutBuffer]
#: Objects of plain fields that may be arguments
OBJECTS: dict[str, list[type]] = {
    "kl_controller": [AdaptiveRule, FixedCoefficient, Proportional, DualAscent],
    "kl_penalty": [KLPenalty],
    "guard": [Guard],
}
#: Names in files of before, of classes that have another one now
EARLIER_NAMES = {"DocumentRule": "AdaptiveRule"}
#: Classes that may stand in `policy_kwargs`, under the text that SB3 writes for each
KWARGS_CLASSES: dict[str, list[type]] = {
    "activation_fn": [nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.Softplus, nn.Sigmoid],
    "features_extractor_class": [FlattenExtractor, NatureCNN, CombinedExtractor],
    "optimizer_class": [th.optim.Adam, th.optim.AdamW, th.optim.RMSprop, th.optim.SGD, RMSpropTFLike],
}
#: Classes of this package in files of before they had a ``saved_as``: module and first words of the docstring -> name
EARLIER = {
    **{
        ("sb3_ppo_penalty.policies", f"SB3's ``{name}`` with a fixed covariance"): f"sb3_ppo_penalty.{name}"
        for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    },
    **{
        ("sb3_ppo_penalty.rollout", f"For ``rollout_buffer_class``, where observations are {kind}"): f"sb3_ppo_penalty.{name}"
        for kind, name in (("arrays", "RewardToGoRolloutBuffer"), ("dicts", "RewardToGoDictRolloutBuffer"))
    },
    # Those of masked actions, which were sb3-contrib's but for where they looked for the masks
    **{
        ("sb3_ppo_penalty.maskable", f"For {kind}."): f"sb3_contrib.common.maskable.policies.{name}"
        for kind, name in (
            ("array observations", "MaskableActorCriticPolicy"),
            ("images", "MaskableActorCriticCnnPolicy"),
            ("Dict observations", "MaskableMultiInputActorCriticPolicy"),
        )
    },
}
#: How Python prints an instance's class; the module between package and class may have moved since
OWN_CLASS = re.compile(r"<class 'sb3_ppo_penalty\.(?:\w+\.)*(\w+)'>")
KWARGS_FLAGS = {
    *("ortho_init", "full_std", "use_expln", "squash_output", "share_features_extractor", "normalize_images"),
    "learn_covariance",
}
#: Layers of a network
MOST_LAYERS = 100
#: Values that an optimizer takes the root of, or counts with
NEVER_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg"}
NUMBER = r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[-+]?[0-9]{1,3})?|inf)"
#: Schedules as SB3 prints them
CONSTANT = re.compile(rf"ConstantSchedule\(val={NUMBER}\)")
LINEAR = re.compile(rf"LinearSchedule\(start={NUMBER}, end={NUMBER}, end_fraction={NUMBER}\)")


def load_safe(
    cls: type[SelfOnPolicy],
    path: str | pathlib.Path | io.BufferedIOBase,
    env: GymEnv | str,
    device: th.device | str,
    max_bytes: int,
    given: dict[str, Any],
    own_entries: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> SelfOnPolicy:
    """
    Load a model without running anything that its file says.

    :param cls: the algorithm
    :param path: as for SB3's ``load``
    :param env: gives the spaces
    :param device: as for SB3's ``load``
    :param max_bytes: what the file may unpack to, and what the rollout buffer that it asks for may take
    :param given: arguments of the algorithm that replace what the file says
    :param own_entries: given the file's entries and those that ``given`` replaces, returns those that the algorithm has
    :return: the model
    :raises UnsafeFileError: naming the entry, for anything in the file that is not a checked value
    """
    require_integer("max_bytes", max_bytes, 1)
    require(env is not None, "env", env, "an environment: the spaces in the file are pickled")
    names = set(signature(cls).parameters) - NOT_SAVED
    unknown = sorted(given.keys() - names)
    if unknown:
        raise TypeError(f"{cls.__name__}.load_safe() has no argument {unknown}")
    saved = read_model(path, max_bytes)
    with refusing("data", Warning):
        entries = own_entries(saved.entries, {ENTRIES.get(name, name): value for name, value in given.items()})
        arguments = {**_arguments(cls, entries, names - IGNORED - given.keys()), **given}
    verbose = arguments.get("verbose", 0)
    env = cls._wrap_env(maybe_make_env(env, verbose), verbose)
    with refusing("data and the arguments passed" if given else "data", Warning):
        _check_rollout_size(env, arguments, max_bytes)
        # A policy class may build parts that it then replaces: not more than four times what it keeps
        with _policy_of_at_most(4 * saved.weight_bytes):
            model = cls(env=env, device=device, **arguments)
        argument_entries = {ENTRIES.get(name, name) for name in names}
        for name in sorted(entries.keys() - argument_entries - IGNORED):
            _restore_number(model, name, entries[name])
    _restore_tensors(model, saved)
    if model.use_sde:
        model.policy.reset_noise()
    return model


def _arguments(cls: type[OnPolicyAlgorithm], entries: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """
    :param cls: the algorithm, which knows policies and buffers besides those that are known here
    :param entries: of the file
    :param names: of the arguments that come from there
    :return: arguments of the types that the algorithm checks the ranges of
    """
    policies: list[type] = list(dict.fromkeys([*POLICIES, *cls.policy_aliases.values()]))
    buffers: list[type] = list(dict.fromkeys([*BUFFERS, *getattr(cls, "_rollout_buffer_classes", ())]))
    readers: dict[str, Callable[[str, Any], Any]] = {
        "policy": lambda entry, value: _class_among(policies, entry, value),
        "rollout_buffer_class": lambda entry, value: value and _class_among(buffers, entry, value),
        "rollout_buffer_kwargs": _nothing,
        "policy_kwargs": _policy_kwargs,
        **dict.fromkeys(("learning_rate", "clip_range", "clip_range_vf", "target_kl", "kl_min", "kl_max"), _schedule),
        **dict.fromkeys(OBJECTS, _object),
        **dict.fromkeys(("use_sde", "compile"), _flag),
        "verbose": lambda entry, value: _whole(entry, value, 2),
        "seed": lambda entry, value: value if value is None else _whole(entry, value, 2**32 - 1),
    }
    check("policy_class" in entries or "policy" not in names, "policy_class", None, "in the file, or passed as `policy`")
    found = {name: ENTRIES.get(name, name) for name in sorted(names) if ENTRIES.get(name, name) in entries}
    return {name: readers.get(name, _plain)(entry, entries[entry]) for name, entry in found.items()}


def _plain(entry: str, value: Any) -> Any:
    numbers = type(value) is list and len(value) <= 8 and all(type(each) in (int, float) for each in value)
    check(numbers or value is None or type(value) in (bool, int, float), entry, value, "a number, a few, or none")
    return value


def _flag(entry: str, value: Any) -> bool:
    check(type(value) is bool, entry, value, "true or false")
    return bool(value)


def _whole(entry: str, value: Any, highest: int) -> int:
    check(type(value) is int and 0 <= value <= highest, entry, value, f"an integer from 0 to {highest}")
    return int(value)


def _number(entry: str, value: Any) -> float:
    check(type(value) in (int, float) and math.isfinite(value), entry, value, "a finite number")
    return float(value)


def _nothing(entry: str, value: Any) -> None:
    check(value in ({}, None) and type(value) is not PickleDescription, entry, value, f"empty, or passed as `{entry}`")


def _schedule(entry: str, value: Any) -> Any:
    """
    :param entry: name
    :param value: a number, None, or what SB3 writes beside a pickled schedule
    :return: a number, None, or SB3's linear schedule
    """
    if type(value) is not PickleDescription:
        return _plain(entry, value)
    kind = value.get(":type:")
    text = str(value.get("value_schedule")) if kind == str(FloatSchedule) else ""
    if kind == str(ConstantSchedule):
        text = f"ConstantSchedule(val={value.get('val')})"
    if kind == str(LinearSchedule):
        text = "LinearSchedule(" + ", ".join(f"{name}={value.get(name)}" for name in ("start", "end", "end_fraction")) + ")"
    constant, linear = CONSTANT.fullmatch(text), LINEAR.fullmatch(text)
    check(bool(constant or linear), entry, text or kind, f"a number or one of SB3's schedules, or passed as `{entry}`")
    if constant:
        return _number(entry, float(constant[1])) if constant[1] != "inf" else math.inf
    assert linear is not None
    start, end, fraction = (_number(entry, float(number)) for number in linear.groups())
    check(min(start, end) >= 0 and 0 < fraction <= 1, entry, text, "a schedule of positive numbers over a part of training")
    return LinearSchedule(start, end, fraction)


def _object(entry: str, value: Any) -> Any:
    """
    Build an object again from its fields.

    :param entry: name
    :param value: its class and fields as text and numbers, as SB3 writes them beside the pickle
    :return: an object of one of the classes known for the entry
    """
    if value is None:
        return None
    found = OWN_CLASS.fullmatch(str(value.get(":type:"))) if type(value) is PickleDescription else None
    name = EARLIER_NAMES.get(found[1], found[1]) if found else None
    kind = next((each for each in OBJECTS[entry] if each.__name__ == name), None)
    names = ", ".join(each.__name__ for each in OBJECTS[entry])
    check(kind is not None, entry, value, f"one of {names}, or passed as `{entry}`")
    assert kind is not None
    own = {field.name: field for field in fields(kind)}
    unknown = sorted(value.keys() - own.keys() - {":type:"})
    check(not unknown, entry, unknown, f"a {kind.__name__} with no fields but {sorted(own)}")
    given = sorted(value.keys() & own.keys())
    for name in given:
        if type(value[name]) is not str:
            _plain(f"{entry}.{name}", value[name])
    made = kind(**{name: value[name] for name in given if own[name].init})
    for name in given:
        if not own[name].init:
            fresh = getattr(made, name)
            check(type(value[name]) is type(fresh), f"{entry}.{name}", value[name], f"of the type {type(fresh).__name__}")
            setattr(made, name, _number(f"{entry}.{name}", value[name]) if type(fresh) is float else value[name])
    return made


def _class_among(classes: Sequence[type], entry: str, value: Any) -> type:
    """
    Recognise a class by the texts that SB3 writes beside its pickle; nothing is imported.

    :param classes: the known ones
    :param entry: name
    :param value: its texts
    :return: one of the known ones
    """
    found = [known for known in classes if type(value) is PickleDescription and _describes(value, known)]
    argument = "policy" if entry == "policy_class" else entry
    names = ", ".join(known.__name__ for known in classes)
    shown = (":type:", "saved_as", "__module__", "__init__")
    texts = {key: value.get(key) for key in shown} if isinstance(value, dict) else value
    check(len(found) == 1, entry, texts, f"one of {names}, or passed as `{argument}`")
    return found[0]


def _describes(texts: PickleDescription, known: type) -> bool:
    """
    Tell whether texts from a file are those of a class, wherever its module is now.

    :param texts: a class's attributes as text, without its name
    :param known: a class
    :return: whether they hold its ``saved_as``, or, for the classes of others, its module and its constructor
    """
    earlier = EARLIER.get((str(texts.get("__module__")), str(texts.get("__doc__")).partition(":")[0]))
    own_name = vars(known).get("saved_as")
    if texts.get("saved_as", earlier) == (own_name or f"{known.__module__}.{known.__qualname__}"):
        return True
    constructor = str(texts.get("__init__")).startswith(f"<function {known.__qualname__}.__init__ at ")
    return own_name is None and texts.get("__module__") == known.__module__ and constructor


def _policy_kwargs(entry: str, value: Any) -> dict[str, Any] | None:
    """
    :param entry: name
    :param value: plain, or what SB3 writes beside the pickle where an item is a class
    :return: with classes in the place of their texts
    """
    if value is None:
        return None
    check(
        isinstance(value, dict) and value.get(":type:", str(dict)) == str(dict),
        entry,
        value,
        f"a dict, or passed as `{entry}`",
    )
    items = {f"{name}": item for name, item in value.items() if name != ":type:"}
    return {name: _policy_kwarg(f"{entry}[{name!r}]", name, item) for name, item in items.items()}


def _policy_kwarg(entry: str, name: str, value: Any) -> Any:
    if name in KWARGS_CLASSES:
        known = {str(each): each for each in KWARGS_CLASSES[name]}
        check(type(value) is str and value in known, entry, value, f"one of {', '.join(known)}, or `policy_kwargs` passed")
        return known[value]
    if name in KWARGS_FLAGS:
        return _flag(entry, value)
    if name == "log_std_init":
        return _number(entry, value)
    if name == "covariance":
        return _covariance(entry, value)
    if name == "net_arch":
        return _net_arch(entry, value)
    check(name in ("features_extractor_kwargs", "optimizer_kwargs"), entry, value, "left out, or `policy_kwargs` passed")
    check(value is None or type(value) is dict, entry, value, "a dict of numbers, or `policy_kwargs` passed")
    return value and {key: _plain(f"{entry}[{key!r}]", option) for key, option in value.items()}


def _covariance(entry: str, value: Any) -> Any:
    # Its values are checked where any covariance is
    if type(value) is list:
        return [_covariance(entry, each) for each in value]
    return value if value is None else _number(entry, value)


def _net_arch(entry: str, value: Any) -> Any:
    networks = value if type(value) is dict else {"pi": [] if value is None else value}
    for name, widths in networks.items():
        layers = type(widths) is list and len(widths) <= MOST_LAYERS and all(type(each) is int and each > 0 for each in widths)
        check(
            name in ("pi", "vf") and layers, entry, value, f"the widths of at most {MOST_LAYERS} layers, also as `pi` and `vf`"
        )
    return value


def _check_rollout_size(env: VecEnv, arguments: dict[str, Any], max_bytes: int) -> None:
    """
    :param env: gives the size of a transition
    :param arguments: give their number
    :param max_bytes: for all of them
    """
    if "n_steps" not in arguments:
        return
    require_integer("n_steps", arguments["n_steps"], 1)
    observation = env.observation_space
    parts: list[Any] = list(observation.spaces.values()) if isinstance(observation, spaces.Dict) else [observation]
    # Beside observation and action: reward, value, log-probability, start, advantage, return, each of 4 bytes
    transition = sum(math.prod(part.shape) * part.dtype.itemsize for part in [*parts, env.action_space]) + 24
    size = arguments["n_steps"] * env.num_envs * transition
    allowed = f"such that a rollout of {env.num_envs} environment(s) takes at most {max_bytes} bytes"
    check(size <= max_bytes, "n_steps", arguments["n_steps"], allowed)


@contextmanager
def _policy_of_at_most(limit: int) -> Iterator[None]:
    """
    Stop the building of a policy that is larger than the weights in the file, before its tensors are written to.

    :param limit: in bytes
    """
    thread, size = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal size
        if parameter is not None and threading.get_ident() == thread:
            size += parameter.nbytes
            check(
                size <= limit,
                "policy_kwargs",
                size,
                f"such that the policy is of the size of `policy.pth`, {limit // 4} bytes",
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _restore_number(model: OnPolicyAlgorithm, name: str, value: Any) -> None:
    """
    Put back a count or another number that changes during training.

    :param model: fresh, which tells what numbers there are
    :param name: of the entry
    :param value: from the file
    """
    fresh: Any = vars(model).get(name)
    known = type(fresh) in (bool, int, float) and name not in model._excluded_save_params()
    check(known, name, value, f"left out: it is none of the numbers of {type(model).__name__}")
    if type(fresh) is float:
        check(type(value) in (int, float) and math.isfinite(value), name, value, "a finite number")
    else:
        check(type(value) is type(fresh) and value >= 0, name, value, f"{type(fresh).__name__}, not negative")
    setattr(model, name, value)


def _restore_tensors(model: OnPolicyAlgorithm, saved: SavedModel) -> None:
    """
    :param model: fresh, which tells names, shapes and types
    :param saved: from the file
    """
    policy = model.policy
    with refusing("policy.pth"):
        mismatch = (
            covariance_mismatch(policy.state_dict().keys(), saved.policy.keys()) if isinstance(saved.policy, dict) else None
        )
        check(mismatch is None, "policy.pth", "another spread", f"of a policy like this one: {mismatch}")
        weights = _checked_values("policy.pth", saved.policy, policy.state_dict())
        if getattr(policy, "has_fixed_covariance", False):
            covariance_tensor(weights["covariance"], get_action_dim(model.action_space))
        policy.load_state_dict(weights)
    with refusing("policy.optimizer.pth"):
        policy.optimizer.load_state_dict(_checked_optimizer("policy.optimizer.pth", saved.optimizer, policy.optimizer))


def _checked_values(entry: str, found: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """
    :param entry: name
    :param found: in the file
    :param expected: tensors, and other values, of a fresh model
    :return: copies of the found ones, which have the names, shapes and types of the expected
    """
    check(isinstance(found, dict) and all(type(name) is str for name in found), entry, type(found), "tensors by name")
    for name in sorted(found.keys() ^ expected.keys()):
        check(name in found, f"{entry}: {name}", None, "in the file")
        check(name in expected, f"{entry}: {name}", "a value", "left out: the model has none")
    return {name: _checked_value(f"{entry}: {name}", name, found[name], expected[name]) for name in expected}


def _checked_value(entry: str, name: str, found: Any, expected: Any) -> Any:
    """
    :param entry: to name
    :param name: of the tensor, or of the number or None that some optimizers keep beside their tensors
    :param found: in the file
    :param expected: a fresh model's
    :return: a copy
    """
    kind = th.Tensor if isinstance(expected, th.Tensor) else type(expected)
    check(type(found) is kind, entry, type(found), f"a {kind.__name__}")
    if isinstance(expected, th.Tensor):
        found = found.detach()
        same = found.dtype == expected.dtype and found.shape == expected.shape and found.layout == th.strided
        wanted = f"{expected.dtype} of shape {tuple(expected.shape)}"
        check(same, entry, (found.dtype, tuple(found.shape)), wanted)
    values = th.as_tensor(0 if found is None else found)
    check(bool(th.isfinite(values).all()), entry, "a number that is not", "finite")
    check(name not in NEVER_NEGATIVE or bool((values >= 0).all()), entry, "a negative number", "positive or zero")
    return found.clone() if isinstance(found, th.Tensor) else found


def _checked_optimizer(entry: str, found: Any, optimizer: th.optim.Optimizer) -> dict[str, Any]:
    """
    :param entry: name
    :param found: in the file
    :param optimizer: fresh, of the policy
    :return: the found moments and learning rate; all else is what the optimizer was made with
    """
    check(isinstance(found, dict) and found.keys() == {"state", "param_groups"}, entry, type(found), "an optimizer's state")
    expected = _state_after_a_step(optimizer)
    groups, states = found["param_groups"], found["state"]
    alike = type(groups) is list and len(groups) == len(expected["param_groups"])
    check(alike, f"{entry}: param_groups", type(groups), f"a list of {len(expected['param_groups'])}")
    known = isinstance(states, dict) and all(type(key) is int and key in expected["state"] for key in states)
    check(known, f"{entry}: state", type(states), "the moments of the policy's parameters")
    return {
        "state": {key: _checked_values(f"{entry}: state {key}", states[key], expected["state"][key]) for key in states},
        "param_groups": [_checked_group(entry, *pair) for pair in zip(groups, expected["param_groups"], strict=True)],
    }


def _state_after_a_step(optimizer: th.optim.Optimizer) -> dict[str, Any]:
    """
    :param optimizer: not changed
    :return: its state as one step leaves it, taken on copies of the parameters; tensors without values
    """
    rehearsal = copy.deepcopy(optimizer)
    for group in rehearsal.param_groups:
        for parameter in group["params"]:
            parameter.grad = th.zeros_like(parameter)
    rehearsal.step()
    found = rehearsal.state_dict()
    states = {
        index: {name: value.to("meta") if isinstance(value, th.Tensor) else value for name, value in state.items()}
        for index, state in found["state"].items()
    }
    return {**found, "state": states}


def _checked_group(entry: str, found: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """
    :param entry: name
    :param found: a group of parameters in the file; other versions of torch have fewer settings
    :param expected: the fresh optimizer's
    :return: the expected one with the learning rate found
    """
    check(isinstance(found, dict) and {"lr", "params"} <= found.keys(), f"{entry}: param_groups", type(found), "parameters")
    for name, value in found.items():
        where = f"{entry}: {name}"
        check(name in expected, where, value, "left out: the optimizer has no such setting")
        if name == "lr":
            check(_number(where, value) >= 0, where, value, "positive or zero")
            continue
        if name in ("fused", "foreach"):  # which kernels the optimizer runs on: stock PPO's policies leave it to torch
            check(value is None or type(value) is bool, where, value, "true, false or none")
            continue
        wanted = tuple(expected[name]) if type(value) is tuple else expected[name]
        check(type(value) in (type(wanted), float, int) and value == wanted, where, value, f"{wanted}, as the policy has it")
    return {**expected, "lr": found["lr"]}
