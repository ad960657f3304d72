"""
Measure how training scales from one to two processes, and plan for more from a model fitted to that.

    python examples/benchmark_scaling.py  # about eight minutes on a machine that does nothing else

Every process has its own environments and rollout ("weak scaling": twice as many processes collect twice as many steps per
update). Measured are collection and update of one and of two processes over numbers of environments, and torch.distributed's
all-reduce between two processes over sizes. The plan for 8, 64 and 512 processes is calculated from these figures under the
assumptions that the report states; it has not been run.
"""

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import stable_baselines3
import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_penalty import PPOPenalty
from sb3_ppo_penalty.distributed import Ranks, session

#: Sizes of the vectors whose all-reduce is timed, in bytes
SIZES = [2**exponent for exponent in range(10, 25, 2)]
PLANNED = (2, 8, 64, 512)
#: Name of a network -> assumed latency in seconds and seconds per byte; None for the values measured here
NETWORKS: dict[str, tuple[float, float] | None] = {
    "as between two processes here": None,
    "25 Gbit/s, 25 us (assumed)": (25e-6, 8 / 25e9),
}
ALGORITHMS = ("ring", "tree")


class TimedTraining:
    """
    A model whose collection and update are timed rollout by rollout.

    :param model: the model to train
    """

    def __init__(self, model: PPOPenalty) -> None:
        self.model = model
        self.update, self.update_s = model.train, 0.0
        model.train = self._timed  # type: ignore[method-assign]

    def _timed(self) -> None:
        start = time.perf_counter()
        self.update()
        self.update_s = time.perf_counter() - start

    def __call__(self, steps: int) -> tuple[float, float]:
        """
        Collect one rollout and learn from it.

        :param steps: environment steps of one rollout of all processes
        :return: seconds of the collection and of the update
        """
        start = time.perf_counter()
        self.model.learn(steps, reset_num_timesteps=False)
        return time.perf_counter() - start - self.update_s, self.update_s


def measure_trainings(ranks: Ranks, options: argparse.Namespace) -> list[dict[str, float]]:
    """
    Time trainings over numbers of environments.

    :param ranks: the processes that train together
    :param options: parsed arguments of the command line
    :return: a row for each number of environments
    """
    rows = []
    for n_envs in options.n_envs:
        env = make_vec_env(options.env, n_envs)
        sizes = {"n_steps": max(options.rollout // n_envs, 1), "batch_size": options.batch_size}
        model = PPOPenalty("MlpPolicy", env, seed=0, device="cpu", compile=options.compile, **sizes)
        turn = TimedTraining(model)
        steps = ranks.size * n_envs * model.n_steps
        turns = np.array([turn(steps) for _ in range(options.repetitions + 1)])[1:]
        collect, update = np.median(turns, axis=0)
        row = {"ranks": ranks.size, "n_envs": n_envs, "n_steps": model.n_steps, "collect_s": collect, "update_s": update}
        row["collect_std_s"] = float(turns[:, 0].std(ddof=1)) if len(turns) > 1 else 0.0
        row["minibatches"] = model.n_epochs * math.ceil(n_envs * model.n_steps / model.batch_size)
        row["gradient_bytes"] = 4 * sum(weight.numel() for weight in model.policy.parameters())
        row["steps_per_second"] = steps / float(collect + update)
        rows.append({name: float(value) for name, value in row.items()})
        env.close()
    return rows


def measure_all_reduce(repetitions: int, sizes: Sequence[int]) -> list[dict[str, float]]:
    """
    Time torch.distributed's all-reduce over sizes of the vector.

    :param repetitions: number of repetitions of each size
    :param sizes: sizes of the vector in bytes
    :return: a row for each size
    """
    rows = []
    for size in sizes:
        vector, seconds = th.zeros(size // 4), []
        for _ in range(repetitions):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(vector)
            seconds.append(time.perf_counter() - start)
        rows.append({"bytes": float(size), "seconds": statistics.median(seconds)})
    return rows


def measure_in_worker(options: argparse.Namespace) -> None:
    """
    Measure in one of the processes; the main one writes the results.

    :param options: parsed arguments of the command line
    """
    th.set_num_threads(1)
    with session() as ranks:
        found = {"trainings": measure_trainings(ranks, options), "all_reduce": []}
        if ranks.size > 1:
            found["all_reduce"] = measure_all_reduce(options.all_reduce_repetitions, SIZES)
        if ranks.is_main_process:
            options.worker.write_text(json.dumps(found))


def measure(size: int, arguments: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """
    Start processes that measure, and read their results.

    :param size: number of processes
    :param arguments: words of the command line
    :return: rows by kind of measurement: ``"trainings"`` and ``"all_reduce"``
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        subprocess.run([sys.executable, *launcher, __file__, *arguments, "--worker", str(file)], check=True)
        found: dict[str, list[dict[str, float]]] = json.loads(file.read_text())
    return found


@dataclass(frozen=True)
class TimeModel:
    """
    A model of the time that training takes, in seconds, fitted by least squares.

    :param step_s: a step of all environments, whatever their number: the policy's forward pass, and Python
    :param env_s: each environment in such a step
    :param spread: standard deviation of a collection's time, as a share of it
    :param minibatch_s: a minibatch of one process alone
    :param shared_s: extra time of a minibatch where there are two processes, besides the all-reduce itself
    :param latency_s: time until a message has arrived
    :param byte_s: time per byte of a message
    """

    step_s: float
    env_s: float
    spread: float
    minibatch_s: float
    shared_s: float
    latency_s: float
    byte_s: float

    def all_reduce_s(self, ranks: int, size: float, algorithm: str) -> float:
        """
        Predict the time of one all-reduce.

        :param ranks: number of processes
        :param size: size of the vector in bytes
        :param algorithm: ``"ring"``: 2 (R - 1) messages one after the other, of 1/R of the vector each; ``"tree"``: up and
            down a binary tree, 2 log2 R messages one after the other, of which the long ones are cut in pieces that follow
            each other, so that every byte is paid for twice
        :return: seconds
        """
        if ranks == 1:
            return 0.0
        if algorithm == "ring":
            return 2 * (ranks - 1) * (self.latency_s + size / ranks * self.byte_s)
        return 2 * math.ceil(math.log2(ranks)) * self.latency_s + 2 * size * self.byte_s

    def iteration_s(self, row: dict[str, float], ranks: int, algorithm: str) -> float:
        """
        Predict the time of one rollout, for which all wait until the slowest has collected, and of its update.

        :param row: a measured training, for its sizes
        :param ranks: number of processes
        :param algorithm: algorithm of the all-reduce
        :return: seconds
        """
        collect = row["n_steps"] * (self.step_s + self.env_s * row["n_envs"])
        slowest = collect * (1 + self.spread * math.sqrt(2 * math.log(ranks)))
        shared = self.shared_s if ranks > 1 else 0.0
        minibatch = self.minibatch_s + shared + self.all_reduce_s(ranks, row["gradient_bytes"], algorithm)
        return slowest + row["minibatches"] * minibatch

    def efficiency(self, row: dict[str, float], ranks: int, algorithm: str) -> float:
        """
        Predict the steps per second and process, relative to one process alone.

        :param row: a measured training, for its sizes
        :param ranks: number of processes
        :param algorithm: algorithm of the all-reduce
        :return: 1 if nothing is lost
        """
        return self.iteration_s(row, 1, algorithm) / self.iteration_s(row, ranks, algorithm)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """
    Fit a line by least squares on the relative error, so that small and large values count the same.

    :param x: positions
    :param y: measured values, above 0
    :return: intercept and slope, neither below 0
    """
    xs, ys = np.array(x), np.array(y)
    columns = np.stack([np.ones_like(xs), xs], axis=1) / ys[:, None]
    intercept, slope = np.linalg.lstsq(columns, np.ones_like(ys), rcond=None)[0]
    if intercept < 0:
        return 0.0, float((xs / ys).sum() / np.square(xs / ys).sum())
    if slope < 0:
        return float((1 / ys).sum() / np.square(1 / ys).sum()), 0.0
    return float(intercept), float(slope)


def fit_model(one: list[dict[str, float]], two: list[dict[str, float]], all_reduce: list[dict[str, float]]) -> TimeModel:
    """
    Fit the model of the time to the measurements.

    :param one: trainings of one process
    :param two: trainings of two processes
    :param all_reduce: all-reduces between two processes
    :return: the model
    """
    step_s, env_s = fit_line([row["n_envs"] for row in one], [row["collect_s"] / row["n_steps"] for row in one])
    # Between two processes a ring sends two messages one after the other, each with half of the vector
    intercept, slope = fit_line([row["bytes"] for row in all_reduce], [row["seconds"] for row in all_reduce])
    spread = statistics.median(row["collect_std_s"] / row["collect_s"] for row in one)
    alone = statistics.median(row["update_s"] / row["minibatches"] for row in one)
    together = statistics.median(row["update_s"] / row["minibatches"] for row in two)
    model = TimeModel(step_s, env_s, spread, alone, 0.0, intercept / 2, slope)
    shared = max(together - alone - model.all_reduce_s(2, one[0]["gradient_bytes"], "ring"), 0.0)
    return TimeModel(step_s, env_s, spread, alone, shared, intercept / 2, slope)


def measured_table(one: list[dict[str, float]], two: list[dict[str, float]], model: TimeModel) -> list[str]:
    """
    Write the table of the measured trainings.

    :param one: trainings of one process
    :param two: trainings of two processes
    :param model: the fitted model
    :return: lines of Markdown
    """
    lines = [
        "| n_envs per process | steps/s, 1 | steps/s, 2 | efficiency | by the model | collection s, 1 / 2 | update s, 1 / 2 |",
        "|---|" + "---|" * 6,
    ]
    for a, b in zip(one, two, strict=True):
        times = [f"{a[name]:.2f} / {b[name]:.2f}" for name in ("collect_s", "update_s")]
        ratio = b["steps_per_second"] / a["steps_per_second"] / 2
        cells = [f"{a['n_envs']:.0f}", f"{a['steps_per_second']:,.0f}", f"{b['steps_per_second']:,.0f}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{model.efficiency(a, 2, 'ring'):.2f}", *times]) + " |")
    return lines


def plan_table(row: dict[str, float], model: TimeModel) -> list[str]:
    """
    Write the table of the planned efficiencies.

    :param row: a measured training, for its sizes
    :param model: the fitted model
    :return: lines of Markdown
    """
    lines = ["| network | all-reduce | " + " | ".join(f"{ranks} ranks" for ranks in PLANNED) + " |"]
    lines.append("|---|---|" + "---|" * len(PLANNED))
    for name, network in NETWORKS.items():
        latency_s, byte_s = network or (model.latency_s, model.byte_s)
        there = TimeModel(**{**vars(model), "latency_s": latency_s, "byte_s": byte_s})
        for algorithm in ALGORITHMS:
            cells = [f"{there.efficiency(row, ranks, algorithm):.2f}" for ranks in PLANNED]
            lines.append("| " + " | ".join([name, algorithm, *cells]) + " |")
    return lines


ASSUMPTIONS = """
Assumptions of the plan, which is a plan and not a measurement:

- Every process has cores of its own, as fast as here, and the same environments, rollout and minibatch; the minibatch of all
  grows with their number. What a larger batch does to learning is not part of it.
- An all-reduce costs what its messages cost one after the other: in a ring (gloo's) 2 (R - 1), in a tree (nccl's for short
  vectors) 2 log2 R. All links are alike and nobody else uses them.
- What a minibatch takes longer between two processes here, beside the all-reduce, it takes at any number: packing the
  gradient, and waiting for a process that the system has put aside.
- All wait for the slowest collection: its time is that of the mean plus sqrt(2 ln R) standard deviations.
- The sums that travel once per epoch and once per update, evaluation and checkpoints are left out.
""".strip()


def report(found: dict[int, dict[str, list[dict[str, float]]]], command: str) -> str:
    """
    Write the report.

    :param found: what one process and what two processes measured
    :param command: the command that measured
    :return: in Markdown
    """
    one, two, all_reduce = found[1]["trainings"], found[2]["trainings"], found[2]["all_reduce"]
    model = fit_model(one, two, all_reduce)
    versions = f"torch {th.__version__}, stable-baselines3 {stable_baselines3.__version__}, Python {platform.python_version()}"
    largest = one[-1]
    bytes_ = f"{largest['gradient_bytes']:,.0f}"
    sums = [f"| {row['bytes']:,.0f} | {row['seconds'] * 1e6:,.0f} |" for row in all_reduce]
    constants = [
        f"| a step of all environments | {model.step_s * 1e6:,.0f} us + {model.env_s * 1e6:,.1f} us per environment |",
        f"| spread of a collection | {model.spread:.1%} |",
        f"| a minibatch, one process | {model.minibatch_s * 1e6:,.0f} us |",
        f"| ... more between two, beside the all-reduce | {model.shared_s * 1e6:,.0f} us |",
        f"| a message | {model.latency_s * 1e6:,.0f} us + {model.byte_s * 1e9:,.3f} ns per byte |",
    ]
    parts = [
        f"# Scaling\n\n`{command}`, {versions}, {os.cpu_count()} cores ({platform.machine()}), one thread per process.",
        "## Measured\n\nMedians; efficiency is steps per second and process, to those of one process.",
        "\n".join(measured_table(one, two, model)),
        "All-reduce between two processes:\n\n| bytes | us |\n|---|---|\n" + "\n".join(sums),
        "## Fitted\n\n| what | how long |\n|---|---|\n" + "\n".join(constants),
        f"## Planned\n\nEfficiency with {largest['n_envs']:.0f} environments per process and a gradient of {bytes_} bytes:",
        "\n".join(plan_table(largest, model)),
        ASSUMPTIONS,
    ]
    return "\n\n".join(parts) + "\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """
    Write rows as a CSV file.

    :param path: path of the file
    :param rows: rows with the same columns
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write the report and its tables.

    :param arguments: words of the command line; default: this process's
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="Gymnasium's name of the environment")
    parser.add_argument("--n-envs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="environments of each process")
    parser.add_argument("--rollout", type=int, default=2048, help="steps of each process between two updates")
    parser.add_argument("--batch-size", type=int, default=64, help="minibatch of each process")
    parser.add_argument("--repetitions", type=int, default=7, help="rollouts after the first, of every training")
    parser.add_argument("--all-reduce-repetitions", type=int, default=200, help="repetitions of every size")
    parser.add_argument("--compile", action="store_true", help="compile the update; compilation is not counted")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for the tables")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.worker:
        measure_in_worker(options)
        return
    found = {size: measure(size, given) for size in (1, 2)}
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "trainings.csv", [row for size in (1, 2) for row in found[size]["trainings"]])
    write_rows(options.out / "all_reduce.csv", found[2]["all_reduce"])
    text = report(found, " ".join(["python examples/benchmark_scaling.py", *given]))
    (options.out / "scaling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
