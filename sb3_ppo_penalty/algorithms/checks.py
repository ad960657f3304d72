"""Checks of an algorithm's arguments, each with one error that names the argument."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer, require_number, schedule_at
from sb3_ppo_penalty.rollouts.rollout import draws_rows


def to_plain_python(attributes: dict[str, Any]) -> None:
    """
    Replace numpy's numbers by Python's: SB3's schedules and queues refuse them, and the saved file keeps Python's readable.

    :param attributes: of a model, changed in place
    """
    attributes.update({name: value.item() for name, value in attributes.items() if isinstance(value, np.generic)})


def check_action_space(space: spaces.Space[Any]) -> None:
    """
    Refuse an action space for which there is no policy.

    :param space: the environment's
    :raises ValueError: naming it
    """
    supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    require(isinstance(space, supported), "env's action space", space, "Box, Discrete, MultiDiscrete or MultiBinary")
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)) and len(space.shape) > 1:
        raise ArgumentError(f"`env`: Multi-dimensional {space} action space is not supported: flatten it")


def check_numbers(model: Any) -> None:
    """
    Check the numbers, flags and dicts that PPO takes, but for ``target_kl``.

    :param model: with its arguments as attributes
    :raises ValueError: naming the argument
    """
    require_number("learning_rate", model.learning_rate, 0, schedule=True)
    require_integer("n_steps", model.n_steps, 1)
    require_integer("batch_size", model.batch_size, 2 if model.normalize_advantage else 1)
    require_integer("n_epochs", model.n_epochs, 1)
    require_integer("sde_sample_freq", model.sde_sample_freq, -1)
    require_number("gamma", model.gamma, 0, 1)
    require_number("gae_lambda", model.gae_lambda, 0, 1)
    require_number("clip_range", model.clip_range, 0, open_below=True, infinite=True, optional=True, schedule=True)
    require_number("clip_range_vf", model.clip_range_vf, 0, open_below=True, optional=True, schedule=True)
    require_number("ent_coef", model.ent_coef, 0)
    require_number("vf_coef", model.vf_coef, 0)
    require_integer("stats_window_size", model._stats_window_size, 1)
    if model.seed is not None:
        require_integer("seed", model.seed, 0)
        require(model.seed < 2**32, "seed", model.seed, "below 2**32")
    for name in ("normalize_advantage", "compile", "use_sde"):
        require(isinstance(getattr(model, name), bool), name, getattr(model, name), "True or False")
    for name in ("policy_kwargs", "rollout_buffer_kwargs"):
        require(isinstance(getattr(model, name), Mapping), name, getattr(model, name), "a dict or None")


def checked_max_grad_norm(limits: Any) -> float | tuple[float, float]:
    """
    Check the largest length of the gradient, or the actor's and the critic's.

    :param limits: as the user gave them
    :return: the same, with a tuple also where JSON or YAML made a list of it
    :raises ValueError: if they are neither a length nor a pair of them
    """
    pair = isinstance(limits, (tuple, list))
    require(not pair or len(limits) == 2, "max_grad_norm", limits, "one number, or two: (actor, critic)")
    for limit in limits if pair else [limits]:
        require_number("max_grad_norm", limit, 0, open_below=True, infinite=True)
    return (float(limits[0]), float(limits[1])) if pair else limits


def check_schedules(model: Any) -> None:
    """
    Ask PPO's schedules for their values at both ends of training.

    :param model: with its arguments as attributes
    :raises ValueError: naming the schedule and the progress, for an answer that cannot be meant
    """
    for name, infinite in {"learning_rate": False, "clip_range": True, "clip_range_vf": False}.items():
        schedule = getattr(model, name)
        for progress in (1.0, 0.0) if callable(schedule) else ():
            schedule_at(name, schedule, progress, infinite=infinite)


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """
    Tell from its signature whether a function can be called with some arguments, others being added by name.

    :param function: not called
    :param args: by position
    :param kwargs: by name
    """
    parameters = inspect.signature(function)
    try:
        (parameters.bind if args else parameters.bind_partial)(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_policy(policy_class: Any) -> None:
    """
    Refuse a policy that wants more than observations and actions, as sb3-contrib's for masks and for memory do.

    :param policy_class: of the policy
    :raises ValueError: if it cannot be used
    """
    evaluate = getattr(policy_class, "evaluate_actions", None)
    suits = evaluate is not None and takes(evaluate, None, None, None) and takes(policy_class, use_sde=False)
    others = "sb3_ppo_penalty.MaskablePPOPenalty takes sb3-contrib's maskable ones, RecurrentPPOPenalty its recurrent ones"
    allowed = f"a policy for PPO ({others})"
    require(suits, "policy", policy_class, allowed)


def check_rollout(model: Any, plain: Sequence[type[RolloutBuffer]]) -> None:
    """
    Refuse a rollout that cannot be normalised, or a buffer that cannot be used.

    :param model: with its arguments as attributes
    :param plain: buffer classes that the algorithm knows
    :raises ValueError: naming the argument
    """
    buffer_class = plain[0] if model.rollout_buffer_class is None else model.rollout_buffer_class
    known = isinstance(buffer_class, type) and issubclass(buffer_class, tuple(plain))
    require(known, "rollout_buffer_class", buffer_class, f"a {' or '.join(each.__name__ for each in plain)}")
    check_sampling("rollout_buffer_class", buffer_class, plain, model._ranks.size)
    dicts = isinstance(model.observation_space, spaces.Dict)
    suits = model.rollout_buffer_class is None or issubclass(buffer_class, DictRolloutBuffer) == dicts
    require(suits, "rollout_buffer_class", buffer_class, f"for {'Dict' if dicts else 'array'} observations")
    size = model.n_steps * model.n_envs
    if model.normalize_advantage:
        require(size > 1, "n_steps", model.n_steps, f"more than 1 in total over {model.n_envs} environment(s)")
    if size % model.batch_size:
        warnings.warn(
            f"With `n_steps` = {model.n_steps} and {model.n_envs} environment(s) a rollout holds {size} transitions: "
            f"there will be a truncated mini-batch of size {size % model.batch_size} after the full ones of "
            f"`batch_size` = {model.batch_size}",
            stacklevel=3,
        )


def check_sampling(
    name: str, buffer: RolloutBuffer | type[RolloutBuffer], plain: Sequence[type[RolloutBuffer]], n_ranks: int
) -> None:
    """
    Refuse minibatches that a buffer draws by itself where all ranks have to make as many of the same transitions.

    :param name: under which the user gave the buffer
    :param buffer: to be used, or its class
    :param plain: classes whose minibatches are rows of their arrays
    :param n_ranks: number of processes that train the model
    :raises ValueError: naming the buffer
    """
    allowed = "one with SB3's own `get` and `_get_samples` on several ranks, which cut their minibatches together"
    require(n_ranks == 1 or draws_rows(buffer, plain), name, buffer, allowed)
