"""
Measure how fast training is beside stock PPO: steps per second, collection and update, compilation, peak memory.

    python examples/benchmark_speed.py                # the table of docs/guide/speed.md, about five minutes
    python examples/benchmark_speed.py --parts grid   # ... over environments, numbers of environments, batch sizes
    python examples/benchmark_speed.py --parts scale  # ... over the width of the networks and the number of actions
    python examples/benchmark_speed.py --parts field  # MuJoCo by the field's own protocol, in SB3's and in lean environments
    python examples/benchmark_speed.py --parts batched # 64 environments one by one, and as one batch
    python examples/benchmark_speed.py --parts images # a convolutional network
    python examples/benchmark_speed.py --parts memory # peak memory, also for a rollout of images; needs 4 GB
    python examples/benchmark_speed.py --parts recurrent # policies with a memory, beside sb3-contrib's RecurrentPPO

Every contender trains the same networks with SB3's default hyperparameters. They take turns, one rollout with its update at
a time in one process, or for images in one process each, which keeps their heaps apart. What is reported are medians of
ratios within a turn: whatever else the machine is doing, it does to all of them. Compilation is what the first turn took
longer than the later ones. SBX (`pip install sbx-rl`) takes part where it is installed; it has no GPU here either. So does
CleanRL's single file in `--parts field`, if `--cleanrl` says how to start it.
"""

import argparse
import csv
import importlib.util
import math
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.vec_envs import BatchedVecEnv, LeanVecEnv, LeanVecNormalize

#: Name of a contender -> its class and arguments
Contenders = dict[str, tuple[Callable[..., BaseAlgorithm], dict[str, Any]]]
CONTENDERS: Contenders = {
    "stock PPO": (PPO, {}),
    "PPOClip": (PPOClip, {}),
    "PPOPenalty": (PPOPenalty, {}),
    "PPOClip, compiled": (PPOClip, {"compile": True}),
    "PPOPenalty, compiled": (PPOPenalty, {"compile": True}),
}


class CheapEnv(gym.Env[Any, Any]):
    """
    An environment that takes hardly any time, with any number of action dimensions.

    :param action_dim: number of action dimensions
    """

    def __init__(self, action_dim: int) -> None:
        self.observation_space = spaces.Box(-1, 1, (16,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)
        self.steps = 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """
        Start a new episode.

        :return: an observation, and no info
        """
        super().reset(seed=options.get("seed"))
        self.steps = 0
        return self.np_random.uniform(-1, 1, 16).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        Return a random observation and how far the action is from zero.

        :return: observation, reward, terminated, truncated and info
        """
        self.steps += 1
        observation = self.np_random.uniform(-1, 1, 16).astype(np.float32)
        return observation, -float(np.square(action).mean()), False, self.steps == 200, {}


def contenders() -> Contenders:
    """
    List the contenders, with SBX where it is installed.

    :return: class and its arguments by name
    """
    if importlib.util.find_spec("sbx") is None:
        return CONTENDERS
    import sbx

    return {**CONTENDERS, "SBX PPO": (sbx.PPO, {})}


def recurrent_contenders() -> Contenders:
    """
    List the contenders with a memory: this package's algorithms with sb3-contrib's policy and with its own.

    :return: class and its arguments by name
    """
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    from sb3_ppo_penalty import RecurrentPPOClip, RecurrentPPOPenalty

    theirs = {"policy": RecurrentActorCriticPolicy}
    return {
        "RecurrentPPO": (RecurrentPPO, {}),
        "RecurrentPPOClip, sb3-contrib's policy": (RecurrentPPOClip, theirs),
        "RecurrentPPOPenalty, sb3-contrib's policy": (RecurrentPPOPenalty, theirs),
        "RecurrentPPOClip": (RecurrentPPOClip, {}),
        "RecurrentPPOPenalty": (RecurrentPPOPenalty, {}),
    }


class TimedTraining:
    """
    A contender whose collection and update are timed rollout by rollout.

    :param algorithm: class of the algorithm
    :param env: id of the environment, or a function that makes one, or a vectorised environment
    :param n_envs: number of environments
    :param options: arguments of the algorithm
    """

    def __init__(self, algorithm: Callable[..., BaseAlgorithm], env: Any, n_envs: int, **options: Any) -> None:
        vec_env = env if isinstance(env, VecEnv) else make_vec_env(env, n_envs, seed=0)
        self.model: Any = algorithm(**{"policy": "MlpPolicy", "env": vec_env, "seed": 0, **options})
        self.steps: int = self.model.n_steps * self.model.n_envs
        self.train, self.update_s = self.model.train, 0.0
        self.model.train = self._timed_train
        self.turns: list[tuple[float, float]] = []

    def _timed_train(self) -> None:
        start = time.perf_counter()
        self.train()
        self.update_s = time.perf_counter() - start

    def close(self) -> None:
        """Close the environments."""
        self.model.env.close()

    def __call__(self) -> None:
        """Collect one rollout and learn from it."""
        start = time.perf_counter()
        self.model.learn(self.steps, reset_num_timesteps=not self.turns)
        self.turns.append((time.perf_counter() - start - self.update_s, self.update_s))


def serve_turns(pipe: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """
    Train in a process of its own, a turn for each message.

    :param pipe: sends back how long the collection and the update took
    :param arguments: of :class:`TimedTraining`
    :param options: the same by name
    """
    run = TimedTraining(*arguments, **options)
    while pipe.recv():
        run()
        pipe.send((run.steps, run.turns[-1]))


class TimedProcess:
    """
    A contender in a process of its own.

    :param arguments: of :class:`TimedTraining`
    :param options: the same by name
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        context.Process(target=serve_turns, args=(theirs, arguments, options), daemon=True).start()
        self.turns: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Let it collect one rollout and learn from it."""
        self.pipe.send(True)
        self.steps, turn = self.pipe.recv()
        self.turns.append(turn)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(False)


class TimedScript:
    """
    One of CleanRL's single files, which trains in a process of its own and prints its steps per second after every update.

    :param command: starts the file, as ``/path/to/python /path/to/ppo_continuous_action.py``
    :param env: id of the environment
    :param steps: of a rollout, as the file has it
    """

    def __init__(self, command: str, env: str, steps: int = 2048) -> None:
        self.words = [*shlex.split(command), "--env-id", env, "--total-timesteps", str(3 * steps), "--no-cuda"]
        self.steps = steps
        self.turns: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Let it train, and take its third rollout with its update, which it does not time apart."""
        with tempfile.TemporaryDirectory() as folder:
            said = subprocess.run(self.words, cwd=folder, capture_output=True, text=True, check=True).stdout
        rates = [int(line.removeprefix("SPS: ")) for line in said.splitlines() if line.startswith("SPS: ")]
        self.turns.append((3 * self.steps / rates[2] - 2 * self.steps / rates[1], math.nan))

    def close(self) -> None:
        """Do nothing: its process has ended."""


def run_case(
    part: str,
    name: str,
    env: Any,
    repetitions: int,
    names: Sequence[str] = (),
    among: Contenders | None = None,
    timed: type[TimedTraining] | type[TimedProcess] = TimedTraining,
    beside: Mapping[str, TimedScript] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """
    Let the contenders take turns at one case; the first is what the others are compared with.

    :param part: name of the benchmark's part
    :param name: name of the case
    :param env: id of the environment, or a function that makes one; or one function that makes a vectorised environment for
        each contender
    :param repetitions: number of turns after the first
    :param names: names of the contenders; default: all
    :param among: the contenders; default: those without a memory
    :param timed: what trains a contender
    :param beside: what takes turns with them, by name
    :param options: ``n_envs`` and arguments of the algorithms
    :return: a row for each contender
    """
    n_envs = options.pop("n_envs", 4)
    known = among or contenders()
    envs = env if isinstance(env, dict) else dict.fromkeys(known, env)
    runs = {
        key: timed(algorithm, envs[key], n_envs, device="cpu", **{**options, **own})
        for key, (algorithm, own) in known.items()
        if key in (names or envs)
    }
    runs |= beside or {}
    for _ in range(repetitions + 1):
        for run in runs.values():
            run()
    rows = []
    stock = np.array(next(iter(runs.values())).turns[1:])
    for key, run in runs.items():
        turns = np.array(run.turns[1:])
        seconds = np.nansum(turns, axis=1)
        # Nothing is said of either part where they are not timed apart
        collect, update = (stock / turns + 0 * turns.sum(axis=1, keepdims=True)).T
        rows.append(
            {
                "part": part,
                "case": name,
                "contender": key,
                "steps_per_second": round(run.steps / statistics.median(seconds.tolist())),
                "ratio": round(statistics.median((stock.sum(axis=1) / seconds).tolist()), 2),
                "collect_ratio": round(statistics.median(collect.tolist()), 2),
                "update_ratio": round(statistics.median(update.tolist()), 2),
                # Acting is compiled in the first rollout, the step in the first update
                "compilation_s": round(max(float(np.nansum(run.turns[0])) - statistics.median(seconds.tolist()), 0.0), 1),
            }
        )
        print(rows[-1], flush=True)
        run.close()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """
    Write the rows of a part as a table.

    :param rows: rows of one part
    :return: Markdown table
    """
    lines = [
        "| case | contender | steps/s | steps/s, ratio | collection, ratio | update, ratio | compilation |",
        "|---|" + "---|" * 6,
    ]
    for row in rows:
        seconds = f"{row['compilation_s']:.0f} s" if "compiled" in row["contender"] or "SBX" in row["contender"] else ""
        ratios = " | ".join(f"{row[name]:.2f}".replace("nan", "") for name in ("ratio", "collect_ratio", "update_ratio"))
        lines.append(f"| {row['case']} | {row['contender']} | {row['steps_per_second']:,} | {ratios} | {seconds} |")
    return "\n".join(lines)


def main_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure Pendulum-v1 with SB3's defaults and four environments.

    :param repetitions: number of turns after the first
    :return: a row for each contender
    """
    return run_case("main", "Pendulum-v1, n_envs 4, batch 64", "Pendulum-v1", repetitions)


def grid_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure over environments, numbers of environments and batch sizes, in rollouts of 4,096 steps.

    :param repetitions: number of turns after the first
    :return: a row for each case and contender
    """
    rows = []
    for env in ("Pendulum-v1", "HalfCheetah-v5"):
        for n_envs in (1, 4, 16):
            for batch_size in (64, 256, 2048):
                name = f"{env}, n_envs {n_envs}, batch {batch_size}"
                options = {"n_envs": n_envs, "n_steps": 4096 // n_envs, "batch_size": batch_size}
                rows += run_case("grid", name, env, repetitions, **options)
    return rows


def scale_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure over the width of the networks and the number of actions, in rollouts of 1,024 steps.

    :param repetitions: number of turns after the first
    :return: a row for each case and contender
    """
    rows = []
    options: dict[str, Any] = {"n_envs": 4, "n_steps": 256, "batch_size": 64}
    names = [name for name in CONTENDERS if "Clip" not in name]
    for width in (64, 256, 1024):
        kwargs = {"net_arch": [width, width]}
        rows += run_case("scale", f"width {width}", lambda: CheapEnv(4), repetitions, names, policy_kwargs=kwargs, **options)
    for action_dim in (1, 8, 64):
        full = {"policy_kwargs": {"covariance": np.eye(action_dim).tolist()}}
        CONTENDERS["PPOPenalty, full covariance"] = PPOPenalty, full
        chosen, env = [*names, "PPOPenalty, full covariance"], lambda dim=action_dim: CheapEnv(dim)
        rows += run_case("scale", f"{action_dim} actions", env, repetitions, chosen, **options)
    return rows


def recurrent_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure policies with a memory of 64 units, as all of RL Zoo's entries for small tasks have.

    The learning rate is next to nothing, so that all contenders act alike: what a step takes goes with the length of the
    episodes, and a policy that learned faster would seem to be slower.

    :param repetitions: number of turns after the first
    :return: a row for each case and contender
    """
    common: dict[str, Any] = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 64, "net_arch": [64]}}
    common["learning_rate"] = 1e-9
    cases = {
        "Pendulum-v1": {"n_envs": 4, "n_steps": 128},
        "CartPole-v1": {"n_envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20},
    }
    rows = []
    for env, options in cases.items():
        name = f"{env}, n_envs {options['n_envs']}, n_steps {options['n_steps']}, batch {options.get('batch_size', 128)}"
        rows += run_case("recurrent", name, env, repetitions, among=recurrent_contenders(), **common, **options)
    return rows


def lean_environment(env: str, n_envs: int) -> VecEnv:
    """
    Make environments with normalised observations and rewards, without the copies of SB3's.

    :param env: id of the environment
    :param n_envs: number of environments
    """
    return LeanVecNormalize(make_vec_env(env, n_envs, seed=0, vec_env_cls=LeanVecEnv))


def field_part(repetitions: int, cleanrl: str = "") -> list[dict[str, Any]]:
    """
    Measure HalfCheetah-v5 by the protocol of the field: one environment, normalised, 2,048 steps, batches of 64, 10 epochs.

    :param repetitions: number of turns after the first
    :param cleanrl: starts CleanRL's file, on HalfCheetah-v4: its gymnasium has no v5; "" to leave it out
    :return: a row for each contender
    """
    options: dict[str, Any] = {"n_envs": 1, "n_steps": 2048, "batch_size": 64, "n_epochs": 10, "clip_range_vf": 0.2}
    learned = {"policy": ActorCriticPolicy}
    added = {
        "PPOPenalty, lean": (PPOPenalty, {}),
        "PPOPenalty, compiled, lean": (PPOPenalty, {"compile": True}),
        "PPOClip, SB3's policy, compiled": (PPOClip, {"compile": True, **learned}),
        "PPOClip, SB3's policy, compiled, lean": (PPOClip, {"compile": True, **learned}),
    }
    among: Contenders = {**contenders(), **added}
    # SBX has its own MlpPolicy, with a learned deviation
    names = [name for name in among if name not in ("PPOClip", "PPOClip, compiled")]
    envs = {
        name: lean_environment("HalfCheetah-v5", 1)
        if name.endswith("lean")
        else VecNormalize(make_vec_env("HalfCheetah-v5", 1, seed=0))
        for name in names
    }
    beside = {"CleanRL, HalfCheetah-v4": TimedScript(cleanrl, "HalfCheetah-v4")} if cleanrl else {}
    name = "HalfCheetah-v5, normalised, n_envs 1, batch 64"
    return run_case("field", name, envs, repetitions, names, among, beside=beside, **options)


def batched_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure 64 environments: one by one under stock PPO, and as one batch through the adapter.

    :param repetitions: number of turns after the first
    :return: a row for each case and contender
    """
    from batched_pendulum import BatchedPendulum

    rows = []
    among: Contenders = {**contenders(), "stock PPO, batched": (PPO, {})}
    names = ["stock PPO", "stock PPO, batched", "PPOPenalty", "PPOPenalty, compiled"]
    batches: dict[str, Callable[[], Any]] = {
        "Pendulum-v1": lambda: BatchedPendulum(64),
        "CartPole-v1": lambda: gym.make_vec("CartPole-v1", num_envs=64),
    }
    for env, batch in batches.items():
        for batch_size in (256, 2048):
            envs: dict[str, Any] = {name: BatchedVecEnv(batch()) for name in names[1:]}
            options = {"n_envs": 64, "n_steps": 64, "batch_size": batch_size}
            name = f"{env}, n_envs 64, batch {batch_size}"
            rows += run_case("batched", name, {"stock PPO": env, **envs}, repetitions, names, among, **options)
    return rows


def images_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure SB3's convolutional network on images of 4 x 84 x 84 bytes.

    :param repetitions: number of turns after the first
    :return: a row for each case and contender
    """
    rows = []
    for n_epochs in (1, 4, 10):
        options = {"policy": "CnnPolicy", "n_envs": 4, "n_steps": 64, "batch_size": 64, "n_epochs": n_epochs}
        env, names = lambda: FakeImageEnv(n_channels=4), ["stock PPO", "PPOClip", "PPOPenalty"]
        rows += run_case("images", f"4 x 84 x 84, {n_epochs} epochs", env, repetitions, names, timed=TimedProcess, **options)
    return rows


def peak_memory(contender: str, images: bool) -> float:
    """
    Measure the peak memory of this process while it collects one rollout and learns from it.

    :param contender: name of the contender
    :param images: take a rollout of 2,048 x 16 images of 4 x 84 x 84 bytes instead of Pendulum's
    :return: largest resident size in MB
    """
    algorithm, options = CONTENDERS[contender]
    if images:
        env = make_vec_env(lambda: FakeImageEnv(n_channels=4), 16, seed=0)
        # One epoch of large minibatches is enough: later epochs do not raise the peak
        model = algorithm("CnnPolicy", env, n_epochs=1, batch_size=512, device="cpu", **options)
    else:
        model = algorithm("MlpPolicy", make_vec_env("Pendulum-v1", 4), device="cpu", **options)
    model.learn(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_part(repetitions: int) -> list[dict[str, Any]]:
    """
    Measure the peak memory of each contender in a process of its own.

    :param repetitions: not used
    :return: a row for each rollout and contender
    """
    rows = []
    for images in (False, True):
        stock = 0.0
        for name in ("stock PPO", "PPOPenalty", "PPOPenalty, compiled"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_memory, (name, images))
            stock = stock or peak
            rows.append({"part": "memory", "case": "images" if images else "Pendulum-v1", "contender": name})
            rows[-1].update(peak_mb=round(peak), ratio=round(peak / stock, 3))
            print(rows[-1], flush=True)
    return rows


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "main": main_part,
    "grid": grid_part,
    "scale": scale_part,
    "field": field_part,
    "batched": batched_part,
    "images": images_part,
    "memory": memory_part,
    "recurrent": recurrent_part,
}


def report(part: str, rows: Sequence[dict[str, Any]], repetitions: int) -> str:
    """
    Write the report of a part.

    :param part: name of the part
    :param rows: rows of the part
    :param repetitions: number of turns
    :return: the report in Markdown
    """
    versions = f"torch {th.__version__}, stable-baselines3 {stable_baselines3.__version__}, Python {platform.python_version()}"
    head = f"# Speed: {part}\n\n`python examples/benchmark_speed.py --parts {part} --repetitions {repetitions}`, {versions}, "
    head += f"{os.cpu_count()} cores ({platform.machine()}), one thread.\n"
    if part != "memory":
        first = rows[0]["contender"]
        return f"{head}Medians of {repetitions} turns; ratios are to {first} in the same turn.\n\n{table(rows)}\n"
    lines = ["| rollout | contender | peak memory | to stock PPO |", "|---|---|---|---|"]
    lines += [f"| {r['case']} | {r['contender']} | {r['peak_mb']:,} MB | {r['ratio']:.3f} |" for r in rows]
    return f"{head}\n" + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure the chosen parts and write their reports and tables.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["main"], help="what to measure")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of every contender after the first")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for the tables")
    parser.add_argument("--cleanrl", default="", help='"PYTHON FILE", which start CleanRL\'s ppo_continuous_action.py')
    chosen = parser.parse_args(arguments)
    parts = {**PARTS, "field": partial(field_part, cleanrl=chosen.cleanrl)}
    th.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for part in chosen.parts:
        rows = parts[part](chosen.repetitions)
        text = report(part, rows, chosen.repetitions)
        (chosen.out / f"{part}.md").write_text(text)
        with (chosen.out / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{text}")


if __name__ == "__main__":
    main()
