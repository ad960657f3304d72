"""The hyperparameter spaces that Optuna searches through RL Zoo."""

import math
from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params

#: PPOPenalty's default bounds; those of a hyperparameter file may be too narrow for the coefficient that a trial draws
KL_COEF_BOUNDS = (0.001, 1000.0)
#: (trial, number of action dimensions or 0, number of environments, RL Zoo's additional arguments) -> keyword arguments
Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]


def _sample_shared(trial: optuna.Trial, n_actions: int) -> dict[str, Any]:
    """
    Draw the hyperparameters that both algorithms have.

    The space is RL Zoo's for PPO without the clip range, under the same names, and the covariance of the Gaussian. It is wider
    where RL Zoo's own tuned entries lie outside (gamma 0.9, gae_lambda 0.8), and has no batches below 32, with which an update
    takes minutes.

    :param trial: the trial of Optuna that draws
    :param n_actions: number of action dimensions of a Box space, 0 for any other
    :return: drawn values by Optuna's name of the parameter, to be converted by :func:`convert`
    """
    params: dict[str, Any] = {
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "n_steps_pow": trial.suggest_int("n_steps_pow", 5, 12),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.1, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.2, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.003, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "n_epochs": trial.suggest_categorical("n_epochs", [1, 5, 10, 20]),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
    if n_actions:
        params["exploration"] = trial.suggest_categorical("exploration", ["fixed", "learned", "gsde"])
        params["covariance"] = trial.suggest_float("covariance", 0.01, 2, log=True)
    # The hyperparameters themselves, for readers of the Optuna study
    for name in ("batch_size", "n_steps"):
        trial.set_user_attr(name, 2 ** params[f"{name}_pow"])
    for name in ("gamma", "gae_lambda"):
        trial.set_user_attr(name, 1 - params[f"one_minus_{name}"])
    return params


def sample_ppo_clip(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw the hyperparameters of :class:`~sb3_ppo_penalty.PPOClip`.

    :param trial: the trial of Optuna that draws
    :param n_actions: number of action dimensions of a Box space, 0 for any other
    :param n_envs: not used; RL Zoo passes it
    :param additional_args: not used; RL Zoo passes it
    :return: keyword arguments of the algorithm
    """
    params = _sample_shared(trial, n_actions)
    params["clip_range"] = trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4])
    params["target_kl"] = trial.suggest_categorical("target_kl", [None, 0.01, 0.03, 0.1])
    return convert(params)


def sample_ppo_penalty(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw the hyperparameters of :class:`~sb3_ppo_penalty.PPOPenalty`.

    :param trial: the trial of Optuna that draws
    :param n_actions: number of action dimensions of a Box space, 0 for any other
    :param n_envs: not used; RL Zoo passes it
    :param additional_args: not used; RL Zoo passes it
    :return: keyword arguments of the algorithm
    """
    params = _sample_shared(trial, n_actions)
    params["clip_range"] = trial.suggest_categorical("clip_range", [None, 0.1, 0.2, 0.3, 0.4])
    params["target_kl"] = trial.suggest_float("target_kl", 0.002, 0.1, log=True)
    params["kl_coef"] = trial.suggest_float("kl_coef", 0.03, 30, log=True)
    params["kl_coef_factor"] = trial.suggest_categorical("kl_coef_factor", [1.5, 2.0])
    # None overrides the clip range that a hyperparameter file may have
    return {"clip_range": None, **convert(params)}


def convert(params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert the values that a trial drew to keyword arguments of the algorithm.

    :param params: drawn values, by Optuna's name of the parameter
    :return: keyword arguments of the algorithm
    """
    params = params.copy()
    if "kl_coef" in params:
        params.setdefault("kl_coef_bounds", KL_COEF_BOUNDS)
    exploration, covariance = params.pop("exploration", None), params.pop("covariance", None)
    # RL Zoo's conversion makes a schedule of the clip range, which fails for None
    if params["clip_range"] is None:
        del params["clip_range"]
    hyperparams: dict[str, Any] = convert_onpolicy_params(params)
    if exploration is None:
        return hyperparams
    hyperparams["use_sde"] = exploration == "gsde"
    spread = {
        "fixed": {"covariance": covariance},
        "learned": {"covariance": covariance, "learn_covariance": True},
        "gsde": {"log_std_init": 0.5 * math.log(covariance)} if covariance else {},
    }
    hyperparams["policy_kwargs"].update(spread[exploration])
    return hyperparams
