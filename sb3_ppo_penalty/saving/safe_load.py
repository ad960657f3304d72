"""Build a model from an untrusted file: parts are recognised by name among known classes, and every value is checked."""

import copy
import io
import math
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
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
from sb3_ppo_penalty.rollouts.reward_to_go import RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer
from sb3_ppo_penalty.saving.safe_archive import PickleDescription, SavedModel, check, read_model, refusing
from sb3_ppo_penalty.updates.guard import Guard

SelfOnPolicy = TypeVar("SelfOnPolicy", bound=OnPolicyAlgorithm)
#: Checks an entry's value, given the entry's name and the value, and returns what the constructor takes for it
Reader = Callable[[str, Any], Any]

#: Entries that come from the environment or are made anew. A folder for logs is a path to write to: the caller's choice
IGNORED = {
    *("observation_space", "action_space", "n_envs", "_last_obs", "_last_episode_starts", "_last_original_obs"),
    *("lr_schedule", "ep_info_buffer", "ep_success_buffer", "action_noise", "tensorboard_log"),
}
#: Arguments that are no part of a file
NOT_SAVED = {"self", "env", "device", "_init_setup_model"}
#: Arguments that SB3 keeps under another name
ENTRIES = {"policy": "policy_class", "stats_window_size": "_stats_window_size"}
POLICIES = [ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy]
BUFFERS = [RolloutBuffer, DictRolloutBuffer, RewardToGoRolloutBuffer, RewardToGoDictRolloutBuffer]
#: Arguments that are dataclasses of numbers and texts -> the classes that each may be of
OBJECTS: dict[str, list[type]] = {
    "kl_controller": [AdaptiveRule, FixedCoefficient, Proportional, DualAscent],
    "kl_penalty": [KLPenalty],
    "guard": [Guard],
}
#: Names in earlier files, of classes that have been renamed since -> their names now
EARLIER_NAMES = {"DocumentRule": "AdaptiveRule"}
#: Items of `policy_kwargs` that are classes -> the classes that each may be, recognised by the text that SB3 writes for it
KWARGS_CLASSES: dict[str, list[type]] = {
    "activation_fn": [nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.Softplus, nn.Sigmoid],
    "features_extractor_class": [FlattenExtractor, NatureCNN, CombinedExtractor],
    "optimizer_class": [th.optim.Adam, th.optim.AdamW, th.optim.RMSprop, th.optim.SGD, RMSpropTFLike],
}
#: Items of `policy_kwargs` that are True or False
KWARGS_FLAGS = {
    *("ortho_init", "full_std", "use_expln", "squash_output", "share_features_extractor", "normalize_images"),
    *("learn_covariance", "shared_lstm", "enable_critic_lstm"),
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

    :param cls: class of the model
    :param path: as for SB3's ``load``
    :param env: environment of the model, which gives the spaces
    :param device: as for SB3's ``load``
    :param max_bytes: what the file may unpack to, and what the rollout buffer that it asks for may take
    :param given: arguments of the constructor that replace what the file says
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
        entries = own_entries(
            _with_present_fields(saved.entries), {ENTRIES.get(name, name): value for name, value in given.items()}
        )
        arguments = {**_arguments(cls, entries, names - IGNORED - given.keys()), **given}
    verbose = arguments.get("verbose", 0)
    env = cls._wrap_env(maybe_make_env(env, verbose), verbose)
    with refusing("data and the arguments passed" if given else "data", Warning):
        memory = getattr(cls, "_memory_size", lambda policy_kwargs: 0)
        _check_rollout_size(env, arguments, memory(arguments.get("policy_kwargs") or {}), max_bytes)
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


def _with_present_fields(entries: dict[str, Any]) -> dict[str, Any]:
    """
    Move what was a field of the penalty in earlier files to where it is now.

    :param entries: of a file
    :return: the entries, with ``max_ratio`` as one of them
    """
    penalty = entries.get("kl_penalty")
    if type(penalty) is not PickleDescription or "max_ratio" not in penalty:
        return entries
    kept = PickleDescription({name: value for name, value in penalty.items() if name != "max_ratio"})
    return {**entries, "kl_penalty": kept, "max_ratio": penalty["max_ratio"]}


def _arguments(cls: type[OnPolicyAlgorithm], entries: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """
    Read the constructor's arguments from a file's entries; types are checked here, ranges by the constructor.

    :param cls: class of the model, which may know further policies and buffers
    :param entries: attributes in the file, by name
    :param names: arguments to read
    :return: those that the file has, by name
    """
    classes = {
        "policy": [*POLICIES, *cls.policy_aliases.values(), *getattr(cls, "_foreign_policies", ())],
        "rollout_buffer_class": [*BUFFERS, *getattr(cls, "_rollout_buffer_classes", ())],
    }
    readers = READERS | {name: partial(_class_among, list(dict.fromkeys(known))) for name, known in classes.items()}
    check("policy_class" in entries or "policy" not in names, "policy_class", None, "in the file, or passed as `policy`")
    found = {name: ENTRIES.get(name, name) for name in sorted(names) if ENTRIES.get(name, name) in entries}
    return {
        name: None if entries[entry] is None and name in OPTIONAL else readers.get(name, _plain)(entry, entries[entry])
        for name, entry in found.items()
    }


def _plain(entry: str, value: Any) -> Any:
    """Check that a value is None, a boolean, a number, or a list of at most eight numbers."""
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
    """Check that a dict of further arguments is empty."""
    check(value in ({}, None) and type(value) is not PickleDescription, entry, value, f"empty, or passed as `{entry}`")


def _schedule(entry: str, value: Any) -> Any:
    """Read a number, None, or a schedule of SB3 from its description; a constant schedule becomes its number."""
    if type(value) is not PickleDescription:
        return _plain(entry, value)
    limits = ", ".join(f"{name}={value.get(name)}" for name in ("start", "end", "end_fraction"))
    texts = {
        str(FloatSchedule): f"{value.get('value_schedule')}",
        str(ConstantSchedule): f"ConstantSchedule(val={value.get('val')})",
        str(LinearSchedule): f"LinearSchedule({limits})",
    }
    kind = value.get(":type:")
    text = texts.get(str(kind), "")
    constant, linear = CONSTANT.fullmatch(text), LINEAR.fullmatch(text)
    check(bool(constant or linear), entry, text or kind, f"a number or one of SB3's schedules, or passed as `{entry}`")
    if constant:
        return _number(entry, float(constant[1])) if constant[1] != "inf" else math.inf
    assert linear is not None
    start, end, fraction = (_number(entry, float(number)) for number in linear.groups())
    check(min(start, end) >= 0 and 0 < fraction <= 1, entry, text, "a schedule of positive numbers over a part of training")
    return LinearSchedule(start, end, fraction)


def _object(entry: str, value: Any) -> Any:
    """Build a dataclass again from the class and the fields that SB3 writes beside its pickle."""
    found = OWN_CLASS.fullmatch(str(value.get(":type:"))) if type(value) is PickleDescription else None
    kind_name = EARLIER_NAMES.get(found[1], found[1]) if found else ""
    kinds: dict[str, type] = {kind.__name__: kind for kind in OBJECTS[entry]}
    check(kind_name in kinds, entry, value, f"one of {', '.join(kinds)}, or passed as `{entry}`")
    own = {field.name: field for field in fields(kinds[kind_name])}
    unknown = sorted(value.keys() - own.keys() - {":type:"})
    check(not unknown, entry, unknown, f"a {kind_name} with no fields but {sorted(own)}")
    given = {
        name: value[name] if type(value[name]) is str else _plain(f"{entry}.{name}", value[name])
        for name in sorted(value.keys() & own.keys())
    }
    made = kinds[kind_name](**{name: item for name, item in given.items() if own[name].init})
    for name, item in given.items():
        if not own[name].init:
            fresh, where = getattr(made, name), f"{entry}.{name}"
            check(type(item) is type(fresh), where, item, f"of the type {type(fresh).__name__}")
            setattr(made, name, _number(where, item) if type(fresh) is float else item)
    return made


def _class_among(classes: Sequence[type], entry: str, value: Any) -> type:
    """
    Recognise a class by the texts that SB3 writes beside its pickle; nothing is imported.

    :param classes: the known classes
    :param entry: name of the entry
    :param value: the texts
    :return: one of the known classes
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
    Tell whether texts from a file are those of a class, even if its module has moved since.

    :param texts: a class's attributes as text, without its name
    :param known: the class
    :return: whether they hold its ``saved_as``, or, for a class of another package, its module and its constructor
    """
    earlier = EARLIER.get((str(texts.get("__module__")), str(texts.get("__doc__")).partition(":")[0]))
    own_name = vars(known).get("saved_as")
    if texts.get("saved_as", earlier) == (own_name or f"{known.__module__}.{known.__qualname__}"):
        return True
    constructor = str(texts.get("__init__")).startswith(f"<function {known.__qualname__}.__init__ at ")
    return own_name is None and texts.get("__module__") == known.__module__ and constructor


def _policy_kwargs(entry: str, value: Any) -> dict[str, Any]:
    """Read the policy's arguments from a dict, or from its description where an item is a class."""
    known = isinstance(value, dict) and value.get(":type:", str(dict)) == str(dict)
    check(known, entry, value, f"a dict, or passed as `{entry}`")
    read = {}
    for name in [name for name in value if name != ":type:"]:
        where = f"{entry}[{name!r}]"
        check(name in KWARG_READERS, where, value[name], "left out, or `policy_kwargs` passed")
        read[name] = KWARG_READERS[name](where, value[name])
    return read


def _class_by_text(classes: Sequence[type], entry: str, value: Any) -> type:
    """Recognise a class by its ``str``, which is how SB3 writes a class in a dict."""
    known = {str(each): each for each in classes}
    check(type(value) is str and value in known, entry, value, f"one of {', '.join(known)}, or `policy_kwargs` passed")
    return known[value]


def _plain_dict(entry: str, value: Any) -> Any:
    """Check that a value is None or a dict of plain values."""
    check(value is None or type(value) is dict, entry, value, "a dict of numbers, or `policy_kwargs` passed")
    return value and {key: _plain(f"{entry}[{key!r}]", option) for key, option in value.items()}


def _covariance(entry: str, value: Any) -> Any:
    """Check that a covariance consists of numbers, also in lists; the policy checks the numbers themselves."""
    if type(value) is list:
        return [_covariance(entry, each) for each in value]
    return value if value is None else _number(entry, value)


def _net_arch(entry: str, value: Any) -> Any:
    """Check the widths of the layers, of both networks together or of the actor's and the critic's."""
    networks = value if type(value) is dict else {"pi": [] if value is None else value}
    allowed = f"the widths of at most {MOST_LAYERS} layers, also as `pi` and `vf`"
    for name, widths in networks.items():
        layers = type(widths) is list and len(widths) <= MOST_LAYERS and all(type(each) is int and each > 0 for each in widths)
        check(name in ("pi", "vf") and layers, entry, value, allowed)
    return value


#: Constructor arguments -> their readers; of all others `_plain`
READERS: dict[str, Reader] = {
    **dict.fromkeys(("learning_rate", "clip_range", "clip_range_vf", "target_kl", "kl_min", "kl_max"), _schedule),
    **dict.fromkeys(OBJECTS, _object),
    **dict.fromkeys(("use_sde", "compile"), _flag),
    "rollout_buffer_kwargs": _nothing,
    "policy_kwargs": _policy_kwargs,
    "verbose": partial(_whole, highest=2),
    "seed": partial(_whole, highest=2**32 - 1),
}
#: Constructor arguments that may be None, whatever their reader
OPTIONAL = {"seed", "rollout_buffer_class", "policy_kwargs", *OBJECTS}
#: Items of `policy_kwargs` -> their readers
KWARG_READERS: dict[str, Reader] = {
    **{name: partial(_class_by_text, classes) for name, classes in KWARGS_CLASSES.items()},
    **dict.fromkeys(KWARGS_FLAGS, _flag),
    **dict.fromkeys(("features_extractor_kwargs", "optimizer_kwargs", "lstm_kwargs"), _plain_dict),
    "log_std_init": _number,
    "lstm_hidden_size": partial(_whole, highest=2**20),
    "n_lstm_layers": partial(_whole, highest=MOST_LAYERS),
    "covariance": _covariance,
    "net_arch": _net_arch,
}


def _check_rollout_size(env: VecEnv, arguments: dict[str, Any], memory_size: int, max_bytes: int) -> None:
    """Check that the rollout buffer that a file asks for, with so many numbers of memory a step, is not too large."""
    if "n_steps" not in arguments:
        return
    require_integer("n_steps", arguments["n_steps"], 1)
    observation = env.observation_space
    parts: list[Any] = list(observation.spaces.values()) if isinstance(observation, spaces.Dict) else [observation]
    # Beside observation and action: reward, value, log-probability, start, advantage, return, each of 4 bytes
    transition = sum(math.prod(part.shape) * part.dtype.itemsize for part in [*parts, env.action_space]) + 4 * (
        6 + memory_size
    )
    size = arguments["n_steps"] * env.num_envs * transition
    allowed = f"such that a rollout of {env.num_envs} environment(s) takes at most {max_bytes} bytes"
    check(size <= max_bytes, "n_steps", arguments["n_steps"], allowed)


@contextmanager
def _policy_of_at_most(limit: int) -> Iterator[None]:
    """
    Stop building a policy larger than the file's weights, before memory of its parameters is written to and thus taken.

    :param limit: size of all parameters, in bytes
    """
    thread, size = threading.get_ident(), 0
    allowed = f"such that the policy is of the size of `policy.pth`, {limit // 4} bytes"

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal size
        # torch calls the hook in every thread
        if parameter is not None and threading.get_ident() == thread:
            size += parameter.nbytes
            check(size <= limit, "policy_kwargs", size, allowed)

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _restore_number(model: OnPolicyAlgorithm, name: str, value: Any) -> None:
    """Set a number that changes during training, such as a count, on a new model, which tells what numbers there are."""
    fresh: Any = vars(model).get(name)
    known = type(fresh) in (bool, int, float) and name not in model._excluded_save_params()
    check(known, name, value, f"left out: it is none of the numbers of {type(model).__name__}")
    if type(fresh) is float:
        check(type(value) in (int, float) and math.isfinite(value), name, value, "a finite number")
    else:
        check(type(value) is type(fresh) and value >= 0, name, value, f"{type(fresh).__name__}, not negative")
    setattr(model, name, value)


def _restore_tensors(model: OnPolicyAlgorithm, saved: SavedModel) -> None:
    """Load weights and the optimizer's moments into a new model, which tells their names, shapes and types."""
    policy = model.policy
    with refusing("policy.pth"):
        own, found = policy.state_dict(), saved.policy if isinstance(saved.policy, dict) else {}
        mismatch = covariance_mismatch(own.keys(), found.keys())
        check(mismatch is None, "policy.pth", "another covariance", f"of a policy like this one: {mismatch}")
        weights = _checked_values("policy.pth", saved.policy, own)
        if getattr(policy, "has_fixed_covariance", False):
            covariance_tensor(weights["covariance"], get_action_dim(model.action_space))
        policy.load_state_dict(weights)
    with refusing("policy.optimizer.pth"):
        policy.optimizer.load_state_dict(_checked_optimizer("policy.optimizer.pth", saved.optimizer, policy.optimizer))


def _checked_values(entry: str, found: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """Copy tensors by name from a file if they have the names, shapes and types of those that are expected."""
    check(isinstance(found, dict) and all(type(name) is str for name in found), entry, type(found), "tensors by name")
    for name in sorted(found.keys() ^ expected.keys()):
        check(name in found, f"{entry}: {name}", None, "in the file")
        check(name in expected, f"{entry}: {name}", "a value", "left out: the model has none")
    return {name: _checked_value(f"{entry}: {name}", name, found[name], expected[name]) for name in expected}


def _checked_value(entry: str, name: str, found: Any, expected: Any) -> Any:
    """Copy a tensor from a file, or a number or None, which some optimizers keep beside their tensors."""
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
    Check an optimizer's state from a file.

    :param entry: name for messages
    :param found: state in the file
    :param optimizer: of the new policy
    :return: the file's moments and learning rates; all other settings are the new optimizer's
    """
    check(isinstance(found, dict) and found.keys() == {"state", "param_groups"}, entry, type(found), "an optimizer's state")
    expected = _state_after_a_step(optimizer)
    groups, states = found["param_groups"], found["state"]
    same_number = type(groups) is list and len(groups) == len(expected["param_groups"])
    check(same_number, f"{entry}: param_groups", type(groups), f"a list of {len(expected['param_groups'])}")
    known = isinstance(states, dict) and all(type(key) is int and key in expected["state"] for key in states)
    check(known, f"{entry}: state", type(states), "the moments of the policy's parameters")
    return {
        "state": {key: _checked_values(f"{entry}: state {key}", states[key], expected["state"][key]) for key in states},
        "param_groups": [_checked_group(entry, *pair) for pair in zip(groups, expected["param_groups"], strict=True)],
    }


def _state_after_a_step(optimizer: th.optim.Optimizer) -> dict[str, Any]:
    """
    Return the state that an optimizer has after one step, with tensors that hold no values.

    :param optimizer: not changed; the step is made on copies of its parameters
    :return: its ``state_dict``, which tells names, shapes and types of the moments
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
    Check the settings of a group of parameters; all but the learning rate have to be the new optimizer's.

    :param entry: name for messages
    :param found: the group in the file; other versions of torch have fewer settings
    :param expected: the new optimizer's
    :return: the new optimizer's settings with the file's learning rate
    """
    check(isinstance(found, dict) and {"lr", "params"} <= found.keys(), f"{entry}: param_groups", type(found), "parameters")
    for name, value in found.items():
        where = f"{entry}: {name}"
        check(name in expected, where, value, "left out: the optimizer has no such setting")
        if name == "lr":
            check(_number(where, value) >= 0, where, value, "positive or zero")
        elif name in ("fused", "foreach"):  # the kernels to run on: they do not change what an optimizer does
            check(value is None or type(value) is bool, where, value, "true, false or none")
        else:
            wanted = tuple(expected[name]) if type(value) is tuple else expected[name]
            same = type(value) in (type(wanted), float, int) and value == wanted
            check(same, where, value, f"{wanted}, as the policy has it")
    return {**expected, "lr": found["lr"]}
