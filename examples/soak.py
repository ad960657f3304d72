"""
Train, save, load and resume for an hour, and check that memory does not grow and no figure leaves its bounds.

    python examples/soak.py --minutes 60

20 calls of ``learn`` share the time; every second one continues a model that was resumed from a checkpoint
(``reset_num_timesteps=False``). After each call come 5 of 100 cycles of ``save`` and ``load``, whose models must be equal. The
first quarter warms up; from there to the end the resident memory may not grow by 1 % nor the number of open files by one.
Throughout, ``kl_coef`` must lie within its bounds and the measured KL between 0 and ``KL_LIMIT``.

Writes ``soak.csv`` and ``soak.md`` into ``--out`` and exits with status 1 if anything was violated. For Linux: reads /proc.
"""

import argparse
import csv
import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks are faster on one thread

import gymnasium as gym
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_ppo_penalty import PPOPenalty, ResumableCheckpointCallback, latest_checkpoint, resume

N_ENVS = 4
KL_COEF_BOUNDS = (1e-3, 1e3)
#: Largest KL allowed, in nats: a hundred times the target
KL_LIMIT = 1.0
HYPERPARAMETERS = {"n_steps": 256, "learning_rate": 1e-3, "gamma": 0.95, "kl_coef_bounds": KL_COEF_BOUNDS}


@dataclass
class Row:
    """
    The figures of a call of ``learn`` and of the cycles after it.

    :param call: number of the call, from 1
    :param reset: whether the call counted its steps from 0
    :param steps: number of environment steps of the call
    :param updates: number of updates of the policy
    :param kl_min: smallest measured KL(old || new), in nats
    :param kl_max: largest measured KL(old || new), in nats
    :param kl_coef_min: smallest coefficient
    :param kl_coef_max: largest coefficient
    :param cycles: number of cycles of ``save`` and ``load`` so far
    :param rss_mib: resident memory afterwards, in MiB
    :param files: number of open files afterwards
    """

    call: int
    reset: bool
    steps: int
    updates: int
    kl_min: float
    kl_max: float
    kl_coef_min: float
    kl_coef_max: float
    cycles: int
    rss_mib: float
    files: int


class KLRecorder(BaseCallback):
    """
    Record the KL and the coefficient after every update, and end training when the time is over.

    :param seconds: duration of the training; there is one update at least
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self.kls: list[float] = []
        self.kl_coefs: list[float] = []

    def _on_training_start(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.begun = self.num_timesteps

    def _on_rollout_start(self) -> None:
        # In the first rollout of a resumed model the logger still has the update before the checkpoint
        if self.num_timesteps > self.begun:
            self.kls.append(self.logger.name_to_value["train/kl"])
            self.kl_coefs.append(self.model.kl_coef)

    def _on_step(self) -> bool:
        return not self.kls or time.monotonic() < self.end


def make_env() -> VecEnv:
    """
    Make normalised pendulums, with VecMonitor because Monitor keeps the return of every episode, which would be growth.

    :return: four environments
    """
    return VecNormalize(VecMonitor(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * N_ENVS)))


def equal_models(one: PPOPenalty, other: PPOPenalty) -> bool:
    """
    Say whether two models have equal parameters, optimizer states, coefficients and step counts.

    :param one: a model
    :param other: another model
    :return: whether they are equal
    """
    states = [(model.policy.state_dict(), model.policy.optimizer.state_dict()["state"]) for model in (one, other)]
    tensors = [
        [*parameters.values(), *(tensor for moments in optimizer.values() for tensor in moments.values())]
        for parameters, optimizer in states
    ]
    equal = all(th.equal(left, right) for left, right in zip(*tensors, strict=True))
    return equal and one.kl_coef == other.kl_coef and one.num_timesteps == other.num_timesteps


def resident_mib() -> float:
    """
    Read the resident memory of this process.

    :return: resident memory in MiB
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(options: argparse.Namespace) -> list[Row]:
    """
    Train, resume, save and load until the time is over.

    :param options: parsed arguments of the command line
    :return: a row for each call of ``learn``
    :raises RuntimeError: if a loaded model differs from the saved one
    """
    silent = configure(None, [])
    checkpoints = ResumableCheckpointCallback(HYPERPARAMETERS["n_steps"], options.out / "checkpoints", keep=2)
    model = PPOPenalty("MlpPolicy", make_env(), seed=options.seed, **HYPERPARAMETERS)
    rows: list[Row] = []
    cycles = 0
    for call in range(1, options.learn_calls + 1):
        reset = call % 2 == 1
        if not reset:
            model, _ = resume(latest_checkpoint(options.out / "checkpoints"), make_env(), checkpoints)
        model.set_logger(silent)
        recorder = KLRecorder(60 * options.minutes / options.learn_calls)
        before, updates = 0 if reset else model.num_timesteps, model._n_updates
        model.learn(10**9, [recorder, checkpoints], reset_num_timesteps=reset)
        while cycles < options.cycles * call // options.learn_calls:
            cycles += 1
            model.save(options.out / "model")
            loaded = PPOPenalty.load(options.out / "model", env=model.get_env())
            if not equal_models(model, loaded):
                raise RuntimeError(
                    f"after {model.num_timesteps} steps of call {call} the loaded model differs from the saved one"
                )
            model = loaded
        gc.collect()
        figures = [min(recorder.kls), max(recorder.kls), min(recorder.kl_coefs), max(recorder.kl_coefs)]
        done = model.num_timesteps - before, (model._n_updates - updates) // model.n_epochs
        rows.append(Row(call, reset, *done, *figures, cycles, round(resident_mib(), 2), len(os.listdir("/proc/self/fd"))))
    return rows


def growth(rows: Sequence[Row]) -> float:
    """
    Compare the median memory of the last quarter of the calls with that of the second quarter.

    :param rows: rows of the whole soak
    :return: growth in percent
    """
    quarter = max(len(rows) // 4, 1)
    early = statistics.median(row.rss_mib for row in rows[quarter : 2 * quarter])
    return 100 * (statistics.median(row.rss_mib for row in rows[-quarter:]) / early - 1)


def violations(rows: Sequence[Row], bounds: tuple[float, float], max_growth: float) -> list[str]:
    """
    List what left its bounds.

    :param rows: rows of the whole soak
    :param bounds: lower and upper bound of the coefficient
    :param max_growth: allowed growth of the memory, in percent
    :return: a sentence for each violation
    """
    found = []
    for row in rows:
        if not all(math.isfinite(figure) for figure in (row.kl_min, row.kl_max, row.kl_coef_min, row.kl_coef_max)):
            found.append(f"call {row.call}: a figure is not finite")
        if row.kl_min < 0 or row.kl_max > KL_LIMIT:
            found.append(f"call {row.call}: KL from {row.kl_min:g} to {row.kl_max:g}, allowed is 0 to {KL_LIMIT:g}")
        if row.kl_coef_min < bounds[0] or row.kl_coef_max > bounds[1]:
            found.append(f"call {row.call}: kl_coef from {row.kl_coef_min:g} to {row.kl_coef_max:g}, allowed is {bounds}")
    warm = rows[len(rows) // 4].files
    found += [f"call {row.call}: {row.files} open files, {warm} after the warm-up" for row in rows if row.files > warm]
    if growth(rows) >= max_growth:
        found.append(f"resident memory grew by {growth(rows):.2f} %, allowed is less than {max_growth:g} %")
    return found


def report(rows: Sequence[Row], found: Sequence[str], options: argparse.Namespace) -> str:
    """
    Write the report.

    :param rows: rows of the whole soak
    :param found: the violations
    :param options: parsed arguments of the command line
    :return: the report in Markdown
    """
    names = list(asdict(rows[0]))
    table = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = (
            f"{cell:.4g}" if isinstance(cell, float) and name != "rss_mib" else cell for name, cell in asdict(row).items()
        )
        table.append(f"| {' | '.join(map(str, cells))} |")
    head = (
        f"{options.minutes:g} minutes of training, {len(rows)} calls of `learn`, {rows[-1].cycles} cycles of save and load, "
        f"{sum(row.steps for row in rows):,} steps; memory {growth(rows):+.2f} %; Python {platform.python_version()}, "
        f"PyTorch {th.__version__}, Stable-Baselines3 {stable_baselines3.__version__}, {platform.machine()}"
    )
    verdict = ["Violations:", "", *(f"- {each}" for each in found)] if found else ["Nothing was violated."]
    return "\n".join(["# Soak", "", head, "", *table, "", *verdict, ""])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Parse the command line.

    :param arguments: words of the command line; default: this process's
    :return: the parsed arguments
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="minutes of training")
    parser.add_argument("--learn-calls", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=100, help="cycles of save and load")
    parser.add_argument("--max-growth", type=float, default=1, help="allowed growth of the memory after the warm-up, percent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args(arguments)
    if options.learn_calls < 4:
        parser.error("--learn-calls: at least 4, to have quarters")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the soak test and write its report.

    :param arguments: words of the command line; default: this process's
    :return: exit code: 1 if something was violated, else 0
    """
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = soak(options)
    found = violations(rows, KL_COEF_BOUNDS, options.max_growth)
    with (options.out / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = report(rows, found, options)
    (options.out / "soak.md").write_text(text)
    print(text)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
