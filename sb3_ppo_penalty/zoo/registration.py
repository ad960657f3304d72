"""Register the algorithms in RL Zoo's tables, and adapt its experiment manager to them."""

from argparse import Namespace
from typing import Any

import optuna
import rl_zoo3.exp_manager
import rl_zoo3.train
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_penalty import PPOClip, PPOPenalty, RecurrentPPOPenalty
from sb3_ppo_penalty.zoo import HYPERPARAMS, entries_file
from sb3_ppo_penalty.zoo.hyperparams_opt import Sampler, convert, sample_ppo_clip, sample_ppo_penalty

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "ppo_penalty": PPOPenalty,
    "ppo_clip": PPOClip,
    "ppo_penalty_lstm": RecurrentPPOPenalty,
}
#: Functions that draw an algorithm's hyperparameters for an Optuna trial
SAMPLERS: dict[str, Sampler] = {
    "ppo_penalty": sample_ppo_penalty,
    "ppo_clip": sample_ppo_clip,
    "ppo_penalty_lstm": sample_ppo_penalty,
}

#: Arguments of PPOPenalty that may be schedules, which RL Zoo does not know
PENALTY_SCHEDULES = ("target_kl", "kl_min", "kl_max")


class Manager(ExperimentManager):
    """
    RL Zoo's experiment manager, which reads this package's hyperparameter files for this package's algorithms.

    :param args: parsed arguments of RL Zoo's command line
    :param algo: name of the algorithm
    :param others: RL Zoo's further positional arguments
    :param kwargs: RL Zoo's further arguments; ``config`` names another hyperparameter file or module
    """

    def __init__(self, args: Namespace, algo: str, *others: Any, **kwargs: Any) -> None:
        if kwargs.get("config") is not None:
            kwargs["config"] = entries_file(kwargs["config"], algo)
        elif algo in ALGORITHMS:
            kwargs["config"] = str(HYPERPARAMS / f"{algo}.yml")
        super().__init__(args, algo, *others, **kwargs)

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        """
        Make schedules of strings, also for the penalty's arguments: there ``lin_0.03_0.004`` falls from 0.03 to 0.004.

        :param hyperparams: hyperparameters of the file and of the command line, changed in place
        :return: the same
        :raises ValueError: naming the argument, for a string of another form
        """
        for name in PENALTY_SCHEDULES:
            value = hyperparams.get(name)
            if isinstance(value, str):
                kind, *numbers = value.split("_")
                if kind != "lin" or len(numbers) not in (1, 2):
                    raise ValueError(f"`{name}` must be a number, lin_START or lin_START_END, got {value!r}")
                hyperparams[name] = LinearSchedule(float(numbers[0]), float(numbers[-1]) * (len(numbers) - 1), 1.0)
        schedules: dict[str, Any] = ExperimentManager._preprocess_schedules(hyperparams)
        return schedules

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        """
        Continue an agent with its own coefficient and controller, not with the first ones of the hyperparameter file.

        The command line may still name others.

        :param hyperparams: hyperparameters of the file and of the command line
        :param env: environments to train in
        :return: the loaded agent
        """
        for name in {"kl_coef", "kl_controller"} - set(self.custom_hyperparams or {}):
            hyperparams.pop(name, None)
        return super()._load_pretrained_agent(hyperparams, env)

    def objective(self, trial: optuna.Trial) -> float:
        """
        Train and evaluate a trial; prune it if an update is not finite, as RL Zoo prunes SB3's own errors of that kind.

        :param trial: the trial of Optuna
        :return: mean return of the evaluation
        """
        try:
            return super().objective(trial)
        except FloatingPointError as error:
            raise optuna.TrialPruned(str(error)) from error


def register() -> None:
    """Fill RL Zoo's tables; to be called through :func:`sb3_ppo_penalty.zoo.register`."""
    samplers: dict[str, Any] = HYPERPARAMS_SAMPLER  # mypy infers a type that only RL Zoo's own functions have
    converters: dict[str, Any] = HYPERPARAMS_CONVERTER
    ALGOS.update(ALGORITHMS)
    samplers.update(SAMPLERS)
    converters.update(dict.fromkeys(ALGORITHMS, convert))
    # `rl_zoo3.train` has imported the class already; later imports take it from `exp_manager`
    modules: list[Any] = [rl_zoo3.exp_manager, rl_zoo3.train]
    for module in modules:
        module.ExperimentManager = Manager
