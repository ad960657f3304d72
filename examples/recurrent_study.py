"""
Penalty against clip where memory is needed: velocities hidden, and a sign to remember to the end of a corridor.

    python examples/recurrent_study.py run                         # five seeds of each; goes on where it ended
    python examples/recurrent_study.py run --envs CartPoleNoVel-v1 --seeds 11
    python examples/recurrent_study.py report                      # results/recurrent/{summary.md,summary.csv,curves.png}

The clip is `RecurrentPPOClip`, which logs the exact divergence too; with sb3-contrib's policy it is `sb3_contrib.RecurrentPPO`
bit for bit, with this package's, which is taken here because it needs a fraction of the time, up to rounding. It has RL Zoo's
entries for `RecurrentPPO`, and so has the penalty but for what takes the clip's place. RL Zoo has no entry for the maze: its
settings are those with which both learned it on seeds 1 and 2. Nothing was tuned on the seeds of the study. Every run is one
JSON file, as of `field_protocol.py`.
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import rl_zoo3.import_envs  # noqa: F401 (registers the environments without velocities)
import torch as th
from field_protocol import METHODS, Recorder, course_of, keep, missing
from field_protocol_report import curve_of, last_tenth, legend_above, read, save
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_ppo_penalty import RecurrentPPOClip, RecurrentPPOPenalty
from sb3_ppo_penalty.study.report import NO_VALUE, format_interval, markdown
from sb3_ppo_penalty.study.statistics import improvement_interval, iqm, iqm_interval, probability_of_improvement

OUT = Path(__file__).parent / "results" / "recurrent"
EVAL_EPISODES, EVAL_ENVS = 100, 10
CLIP, PENALTY = "clip", "penalty"
POLICY_KWARGS: dict[str, Any] = {
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "lstm_hidden_size": 64,
    "enable_critic_lstm": True,
    "net_arch": {"pi": [64], "vf": [64]},
}

PENALTY_RULE: dict[str, Any] = {"kl_controller": "proportional", "kl_coef_factor": 1.5}
#: For a learning rate that falls to 0
FALLING = METHODS["truncated"][1]
#: For one that does not: a coefficient that sank while little was learned would be missing when much is
FLOOR = METHODS["truncated-floor"][1]


class PassiveTMaze(gym.Env[Any, Any]):
    """
    A corridor whose first place has the sign that says which way to turn at its end.

    Passive T-Maze of Ni et al. 2023 (https://arxiv.org/abs/2307.03864): an episode takes as many steps as the corridor is
    long, and one for the turn, which pays 1 if it is right. Every step that leaves one behind costs 1 / length, so that the
    way is learned easily and what is hard is to remember. The best return is 1; without memory it is 0.5.

    :param length: of the corridor
    """

    def __init__(self, length: int = 20) -> None:
        self.length = length
        #: The sign, where it can be seen, and whether this is the end of the corridor
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        #: Ahead, back, left, right
        self.action_space = spaces.Discrete(4)
        self.sign, self.place, self.time = 1, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Go to the start, where the sign can be seen."""
        super().reset(seed=seed)
        self.sign, self.place, self.time = 1 - 2 * int(self.np_random.integers(2)), 0, 0
        return np.array([self.sign, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Walk, or turn at the end of the corridor."""
        self.time += 1
        if self.time > self.length:
            right = self.place == self.length and action == (2 if self.sign > 0 else 3)
            return np.zeros(2, np.float32), float(right), True, False, {}
        self.place = min(max(self.place + {0: 1, 1: -1}.get(int(action), 0), 0), self.length)
        late = self.place < self.time
        return np.array([0, self.place == self.length], np.float32), -float(late) / self.length, False, False, {}


gym.register("PassiveTMaze-v0", PassiveTMaze)


class Task(NamedTuple):
    """
    What both methods are given.

    :param n_envs: number of environments
    :param steps: of training
    :param normalize: whether observations and rewards are normalised
    :param settings: of both
    :param penalty: what the penalty has in place of the clip
    """

    n_envs: int
    steps: int
    normalize: bool
    settings: dict[str, Any]
    penalty: dict[str, Any]


TASKS = {
    "PendulumNoVel-v1": Task(
        n_envs=4,
        steps=60_000,
        normalize=True,
        settings={
            "n_steps": 1024,
            "gae_lambda": 0.95,
            "gamma": 0.9,
            "n_epochs": 10,
            "ent_coef": 0.0,
            "learning_rate": 1e-3,
            "clip_range": 0.2,
            "use_sde": True,
            "sde_sample_freq": 4,
        },
        penalty={**PENALTY_RULE, "target_kl": 0.1},
    ),
    "CartPoleNoVel-v1": Task(
        n_envs=8,
        steps=40_000,
        normalize=True,
        settings={
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "ent_coef": 0.0,
            "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
        },
        penalty=FALLING,
    ),
    # RL Zoo has no entry for it: RecurrentPPO's defaults but for four episodes to a rollout and `ent_coef`
    "PassiveTMaze-v0": Task(
        n_envs=16,
        steps=120_000,
        normalize=False,
        settings={
            "n_steps": 84,
            "batch_size": 336,
            "n_epochs": 10,
            "ent_coef": 0.01,
            "learning_rate": 3e-4,
            "clip_range": 0.2,
        },
        penalty=FLOOR,
    ),
}


def settings_of(env_id: str, method: str) -> dict[str, Any]:
    """
    Say what an algorithm is given.

    :param env_id: a key of :data:`TASKS`
    :param method: the clip or the penalty
    """
    common = {**TASKS[env_id].settings, "policy_kwargs": POLICY_KWARGS}
    if method == CLIP:
        return common
    return {**{name: value for name, value in common.items() if name != "clip_range"}, **TASKS[env_id].penalty}


def perform(env_id: str, method: str, seed: int, share: float = 1.0) -> dict[str, Any]:
    """
    Train one policy and evaluate it without noise.

    :param env_id: a key of :data:`TASKS`
    :param method: the clip or the penalty
    :param seed: of networks, actions and environments
    :param share: of the task's steps
    :return: all that is worth keeping, for JSON
    """
    th.set_num_threads(1)
    task, settings = TASKS[env_id], settings_of(env_id, method)
    env: Any = make_vec_env(env_id, task.n_envs, seed=seed)
    test_env: Any = make_vec_env(env_id, EVAL_ENVS, seed=10_000 + seed)
    if task.normalize:
        env = VecNormalize(env, gamma=settings["gamma"])
        test_env = VecNormalize(test_env, training=False, norm_reward=False)
        test_env.obs_rms = env.obs_rms
    algorithm: Any = RecurrentPPOClip if method == CLIP else RecurrentPPOPenalty
    model = algorithm("MlpLstmPolicy", env, **settings, seed=seed, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))
    recorder = Recorder()
    started = time.process_time()
    model.learn(int(share * task.steps), callback=recorder)
    seconds = time.process_time() - started
    returns, _ = evaluate_policy(model, test_env, EVAL_EPISODES, deterministic=True, return_episode_rewards=True)
    steps = model.num_timesteps
    return {
        "env": env_id,
        "method": method,
        "seed": seed,
        "steps": steps,
        "settings": settings,
        "versions": {name: version(name) for name in ("stable-baselines3", "sb3-contrib", "gymnasium", "numpy", "torch")},
        "processor_seconds": round(seconds),
        "without_noise": [round(float(each), 2) for each in returns],
        **course_of(recorder, steps),
    }


def row_of(runs: list[dict[str, Any]], baseline: np.ndarray[Any, Any]) -> list[str]:
    """
    Write what a method came to on a task.

    :param runs: of all its seeds
    :param baseline: returns of the clip's runs
    :return: cells of the table
    """
    digits = 2 if runs[0]["env"].startswith("PassiveTMaze") else 0
    figures: dict[str, float] = {}
    columns = {"last_tenth": [run["last_tenth"] for run in runs], "quiet": [np.mean(run["without_noise"]) for run in runs]}
    for name, values in columns.items():
        figures[name] = iqm(values)
        figures[f"{name}_low"], figures[f"{name}_high"] = iqm_interval(values)
    own = np.array(columns["last_tenth"])
    figures["better"] = probability_of_improvement(own, baseline)
    figures["better_low"], figures["better_high"] = improvement_interval(own, baseline)
    kl = [np.array([value for value in run["updates"]["kl"] if value is not None]) for run in runs]
    return [
        runs[0]["method"],
        f"{len(runs)}",
        format_interval(figures, "last_tenth", digits),
        NO_VALUE if runs[0]["method"] == CLIP else format_interval(figures, "better", 2),
        format_interval(figures, "quiet", digits),
        f"{np.median([each.mean() for each in kl]):.3f}",
        f"{np.median([each.max() for each in kl]):.3f}",
        f"{np.median([last_tenth(run['updates']['kl']) for run in runs]):.3f}",
        f"{np.median([run['processor_seconds'] / run['steps'] * 1e6 for run in runs]):,.0f}",
    ]


HEADERS = ("", "seeds", "return, IQM [95 %]", "P(better than clip)", "without noise, IQM [95 %]")
HEADERS += ("KL, mean", "KL, highest", "KL, at the end", "processor µs a step")


CURVES: dict[str, Callable[[dict[str, Any]], list[float | None]]] = {
    "return": lambda run: run["curve"],
    "KL(old ‖ new), nats": lambda run: run["updates"]["kl"],
}


def of(runs: list[dict[str, Any]], env_id: str, method: str) -> list[dict[str, Any]]:
    """Pick the runs of a method on a task."""
    return [run for run in runs if (run["env"], run["method"]) == (env_id, method)]


@plt.style.context("sb3_ppo_penalty.study.pictures")
def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """
    Draw return and divergence of each task, a row for each.

    :param runs: of all tasks
    :param path: of the picture
    """
    envs = [env_id for env_id in TASKS if of(runs, env_id, CLIP)]
    figure, axes = plt.subplots(len(envs), 2, figsize=(9, 0.6 + 2.5 * len(envs)), squeeze=False, layout="constrained")
    for line, env_id in zip(axes, envs, strict=True):
        line[0].set_title(env_id, loc="left", fontsize=10)
        line[1].set_yscale("log")
        for axis, (label, pick) in zip(line, CURVES.items(), strict=True):
            axis.set_xlabel("thousand steps")
            axis.set_ylabel(label)
            for method in (CLIP, PENALTY):
                own = of(runs, env_id, method)
                mean, band = curve_of(own, pick)
                steps = np.arange(1, len(mean) + 1) / len(mean) * own[0]["steps"] / 1e3
                (drawn,) = axis.plot(steps, mean, label=method, linewidth=1.4)
                axis.fill_between(steps, *band, color=drawn.get_color(), alpha=0.15, linewidth=0)
    legend_above(figure, axes[0][0])
    save(figure, path)


def report(out: Path) -> None:
    """Write the tables and draw the picture."""
    runs = read(out)
    lines = ["Made by `python examples/recurrent_study.py report` from the files in `runs/`.", ""]
    for env_id, task in TASKS.items():
        methods = [own for method in (CLIP, PENALTY) if (own := of(runs, env_id, method))]
        if methods:
            baseline = np.array([run["last_tenth"] for run in of(runs, env_id, CLIP)])
            seeds = sorted({run["seed"] for own in methods for run in own})
            replaced = ", ".join(f"`{name}={value!r}`" for name, value in task.penalty.items())
            described = f"{task.steps:,} steps, seeds {', '.join(map(str, seeds))}; in place of the clip: {replaced}."
            lines += [f"## {env_id}", "", described, ""]
            lines += [markdown(HEADERS, [row_of(own, baseline) for own in methods])]
    lines += ["![Return and divergence over training: mean, lowest and highest of the seeds](curves.png)"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    draw(runs, out / "curves.png")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--envs", nargs="+", default=list(TASKS), choices=TASKS, metavar="ID")
    parser.add_argument("--methods", nargs="+", default=[CLIP, PENALTY], choices=(CLIP, PENALTY))
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15])
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to see how it looks")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    if chosen.command == "report":
        report(chosen.out)
        return
    for env_id, method, seed in missing(chosen):
        keep(perform(env_id, method, seed, chosen.share), chosen.out)
        print(f"{env_id} {method} {seed}: done", flush=True)


if __name__ == "__main__":
    main()
