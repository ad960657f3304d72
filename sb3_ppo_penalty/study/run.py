"""Perform one run: build what RL Zoo would build, train it, and evaluate it on the same starts as every other run."""

import json
import os
from argparse import Namespace
from collections import OrderedDict
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_ppo_penalty.study.algorithms import ALGORITHMS, base_algorithm
from sb3_ppo_penalty.study.grid import EVALUATION_ENVS, EVALUATION_SEED, Run, prepare, source_digest
from sb3_ppo_penalty.zoo.registration import Manager

#: Names of the files in a run's folder
SETTINGS, RESULT, STEPS = "settings.json", "result.json", "steps"
PROGRESS, EVALUATIONS, FINAL_EVALUATION = "progress.csv", "evaluations.npz", "final_evaluation.npz"
#: Mean return of the episodes that ended in a rollout, which is the article's measure, and their number
BATCH_RETURN, BATCH_EPISODES = "rollout/batch_return", "rollout/batch_episodes"
TOTAL_STEPS = "time/total_timesteps"


class OrphanedError(RuntimeError):
    """Raised in a run when the process that asked for it has ended."""


class Experiment(Manager):
    """
    RL Zoo's experiment manager, with hyperparameters that are given instead of looked up.

    :param run: the run to perform
    :param folder: folder for all that is written
    :param opened: closes the environments that are created
    """

    def __init__(self, run: Run, folder: Path, opened: ExitStack) -> None:
        zoo_name = ALGORITHMS[base_algorithm(run.algo)].zoo_name
        super().__init__(
            Namespace(),
            zoo_name,
            run.task.env,
            log_folder=str(folder),
            n_timesteps=run.task.n_timesteps,
            eval_freq=-1,
            seed=run.seed,
            verbose=0,
            device=run.task.device,
        )
        self.save_path = self.params_path = str(folder)
        self.given = run.hyperparams
        self.opened = opened
        # RL Zoo does not pass an entry's `env_kwargs` to the evaluation environments
        self.eval_env_kwargs = run.hyperparams.get("env_kwargs", {})

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Return the given hyperparameters instead of those of a file.

        :return: a copy that RL Zoo changes, and one that it saves
        """
        return deepcopy(self.given), OrderedDict(sorted(self.given.items()))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Create environments as RL Zoo does, and note that they are to be closed.

        :param n_envs: number of environments
        :param eval_env: whether they are for evaluation
        :param no_log: whether no monitor file is written
        :return: the environments
        """
        env: VecEnv = super().create_envs(n_envs, eval_env=eval_env, no_log=no_log)
        self.opened.callback(env.close)
        return env

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """
        Write nothing: the run's settings are saved already, and RL Zoo's command line was not used.

        :param saved_hyperparams: not used
        """


class FixedStartsEvalCallback(EvalCallback):
    """
    Evaluate like SB3's ``EvalCallback``, but at fixed environment steps from 0 on and from the same starts each time.

    :param eval_env: environments of the evaluation, one for each episode
    :param every: number of environment steps between two evaluations
    :param until: environment steps of the last evaluation
    :param folder: folder for ``evaluations.npz``
    """

    def __init__(self, eval_env: VecEnv, every: int, until: int, folder: Path) -> None:
        super().__init__(eval_env, n_eval_episodes=eval_env.num_envs, eval_freq=1, log_path=str(folder), verbose=0)
        self.every = every
        self.until = until
        self.seconds = 0.0
        self._due = 0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._on_step()

    def _on_step(self) -> bool:
        if self.num_timesteps < self._due or self._due > self.until:
            return True
        while self._due <= self.num_timesteps:
            self._due += self.every
        started = perf_counter()
        self.eval_env.seed(EVALUATION_SEED)
        continues = super()._on_step()
        self.seconds += perf_counter() - started
        return continues


class UpdateLog(BaseCallback):
    """
    Log each update at the environment step at which it was made, with the mean return of the batch.

    SB3 logs an update only after the next rollout, and never the last one.

    :param folder: the run's folder; a file in it keeps the number of steps made, for the progress bar
    :param parent_pid: id of the process that waits for the run, None if that is this process
    """

    def __init__(self, folder: Path, parent_pid: int | None) -> None:
        super().__init__()
        self.folder = folder
        self.parent_pid = parent_pid
        self._returns: list[float] = []

    def _on_rollout_start(self) -> None:
        if self.parent_pid is not None and os.getppid() != self.parent_pid:
            raise OrphanedError("the comparison that started this run has ended")
        if self.model.num_timesteps > 0:
            self._write()
        self._returns = []

    def _on_step(self) -> bool:
        self._returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record(BATCH_EPISODES, len(self._returns))
        if self._returns:
            self.logger.record(BATCH_RETURN, float(np.mean(self._returns)))

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        """Write what ``train`` has just recorded, and the number of steps."""
        self.logger.record(TOTAL_STEPS, self.model.num_timesteps)
        self.logger.dump(self.model.num_timesteps)
        written = self.folder / f"{STEPS}.new"
        written.write_text(str(self.model.num_timesteps))
        os.replace(written, self.folder / STEPS)


def evaluate(model: BaseAlgorithm, env: VecEnv, n_episodes: int) -> tuple[list[float], list[int]]:
    """
    Evaluate a model without noise; each episode starts from a seed of its own, whatever happened before it.

    :param model: the trained model
    :param env: evaluation environments, wrapped as in training
    :param n_episodes: number of episodes
    :return: returns and lengths of the episodes
    """
    if model.get_vec_normalize_env() is not None:
        sync_envs_normalization(cast(VecEnv, model.get_env()), env)
    returns: list[float] = []
    lengths: list[int] = []
    for first in range(0, n_episodes, env.num_envs):
        env.seed(EVALUATION_SEED + first)
        count = min(env.num_envs, n_episodes - first)
        some = evaluate_policy(model, env, count, deterministic=True, return_episode_rewards=True)
        more_returns, more_lengths = cast(tuple[list[float], list[int]], some)
        returns += more_returns
        lengths += more_lengths
    return returns, lengths


def perform(run: Run, folder: Path, parent_pid: int | None = None) -> None:
    """
    Train and evaluate one run.

    :param run: the run to perform
    :param folder: the run's folder, which must not exist; complete when this returns
    :param parent_pid: id of the process that waits for the run, whose end ends the run; None if that is this process
    """
    th.set_num_threads(1)
    prepare(run.task.gym_packages)
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text(run.settings)
    with ExitStack() as opened:
        experiment = Experiment(run, folder, opened)
        model, _ = cast(tuple[BaseAlgorithm, Any], experiment.setup_experiment())
        eval_env = experiment.create_envs(min(EVALUATION_ENVS, run.task.n_eval_episodes), eval_env=True)
        evaluation = FixedStartsEvalCallback(eval_env, run.task.eval_freq, run.task.n_timesteps, folder)
        model.set_logger(configure(str(folder), ["csv"]))
        opened.callback(model.logger.close)
        started = perf_counter()
        model.learn(run.task.n_timesteps, [*experiment.callbacks, UpdateLog(folder, parent_pid), evaluation], log_interval=1)
        seconds = perf_counter() - started - evaluation.seconds
        returns, lengths = evaluate(model, eval_env, run.task.n_eval_episodes)
        np.savez(folder / FINAL_EVALUATION, results=returns, ep_lengths=lengths)
        experiment.save_trained_model(model)
        figures = {"steps": model.num_timesteps, "training_seconds": seconds, "final_return": float(np.mean(returns))}
        (folder / RESULT).write_text(json.dumps({**figures, "source": source_digest()}, indent=1))
