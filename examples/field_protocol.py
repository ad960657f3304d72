"""
Penalty against clip on the protocol that the field publishes: one environment, a million steps, five seeds.

    python examples/field_protocol.py run Ant-v4 --seeds 11 12 13 14 15            # hours on two cores; goes on where it ended
    python examples/field_protocol.py run Ant-v4 --methods clip --seeds 11         # one row of one table
    python examples/field_protocol_report.py                                       # tables and pictures of all there is

The protocol is that of CleanRL's `ppo_continuous_action` and of KLip-PPO (https://arxiv.org/abs/2606.23932): observations
normalised and clipped at 10, rewards divided by the deviation of the discounted return and clipped at 10; separate 64-64 tanh
networks, a learned standard deviation that does not depend on the state; 2,048 steps, minibatches of 64, 10 epochs; discount
0.99, lambda 0.95; Adam with eps 1e-5, 3e-4 falling linearly to 0; value clip 0.2; gradient norm 0.5; no entropy bonus.
CartPole-v1 and LunarLander-v3 are not normalised and have several environments, as in KLip-PPO's published settings
(https://github.com/learning-mechanisms/KLip-PPO, configs/snapshots/presets). Atari's games have the PPO paper's settings as RL
Zoo has them, over 100,000 steps instead of ten million. The methods differ in nothing but the policy's objective. Every run is
one JSON file: settings, versions, learning curve, figures of its updates, and the returns of 20 episodes without noise.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_penalty import MUJOCO, PPOClip, PPOPenalty
from sb3_ppo_penalty.algorithms.proximal import ProximalAlgorithm
from sb3_ppo_penalty.vec_envs import LeanVecEnv, LeanVecNormalize

OUT = Path(__file__).parent / "results" / "field_protocol"
#: 488 rollouts of 2,048 steps, as CleanRL counts a million
STEPS = 488 * 2048
#: Of the learning curve: means over so many equal parts of training
PARTS = 100
EVAL_EPISODES = 20
#: Fewer steps gain less from compilation than it costs
COMPILED_FROM = 50_000
#: What is kept of every update
FIGURES = ("kl", "kl_coef", "std", "max_ratio", "effective_sample_size", "clip_fraction", "approx_kl", "explained_variance")
PROTOCOL: dict[str, Any] = {
    "learning_rate": LinearSchedule(3e-4, 0.0, 1.0),
    "n_steps": 2048,
    "batch_size": 64,
    "n_epochs": 10,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "clip_range_vf": 0.2,
    "ent_coef": 0.0,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
}


class NormalisedOverRollout(RolloutBuffer):
    """Advantages are shifted and scaled once for the whole rollout, not minibatch by minibatch."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray[Any, Any]) -> None:
        """Work out returns and advantages, and normalise the latter."""
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages = (self.advantages - self.advantages.mean()) / (self.advantages.std() + 1e-8)


class Task(NamedTuple):
    """
    What a task has of its own.

    :param steps: of training, whole rollouts
    :param n_envs: number of environments
    :param normalised: whether observations and rewards are
    :param own: in the place of the protocol's arguments
    :param images: whether observations are Atari's, four frames of 84 x 84
    """

    steps: int
    n_envs: int
    normalised: bool
    own: dict[str, Any]
    images: bool = False


MUJOCO_TASK = Task(STEPS, 1, True, {})
OVER_ROLLOUT: dict[str, Any] = {"normalize_advantage": False, "rollout_buffer_class": NormalisedOverRollout}
LANDER: dict[str, Any] = {"n_steps": 1024, "gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01}
ATARI: dict[str, Any] = {
    "learning_rate": LinearSchedule(2.5e-4, 0.0, 1.0),
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "clip_range": LinearSchedule(0.1, 0.0, 1.0),
    "clip_range_vf": None,
    "ent_coef": 0.01,
}
TASKS = {
    "CartPole-v1": Task(195 * 4 * 128, 4, False, {"n_steps": 128, **OVER_ROLLOUT}),
    "LunarLander-v3": Task(61 * 16 * 1024, 16, False, {**LANDER, **OVER_ROLLOUT}),
    "BreakoutNoFrameskip-v4": Task(98 * 8 * 128, 8, False, ATARI, images=True),
}

#: The target falls with the learning rate, as the divergence does that the clip leaves
FALLING = LinearSchedule(0.034, 0.004, 1.0)
ADAPTIVE: dict[str, Any] = {"kl_controller": "proportional", "kl_coef_factor": 1.5, "target_kl": FALLING}
#: The paper's rule with KLip-PPO's constants
PAPERS: dict[str, Any] = {"target_kl": 0.02, "kl_coef": 1.0, "kl_coef_factor": 2.0, "kl_coef_bounds": (1e-4, 1e4)}
#: Advantages as SB3 and CleanRL normalise them, which on MuJoCo's tasks they always are
MINIBATCH: dict[str, Any] = {"normalize_advantage": True, "rollout_buffer_class": None}
SAMPLED: dict[str, Any] = {"sampled": True, "advantage_weighted": True}
#: name -> class and what it is given beside the protocol; the penalties have no clip
METHODS: dict[str, tuple[type[ProximalAlgorithm], dict[str, Any]]] = {
    # Stock PPO, bit for bit but for the compiled step's rounding
    "clip": (PPOClip, {}),
    "clip-0.3": (PPOClip, {"clip_range": 0.3}),
    "clip-falling": (PPOClip, {"clip_range": LinearSchedule(0.2, 0.0, 1.0)}),
    "adaptive": (PPOPenalty, PAPERS),
    # No clip and no truncation of any kind
    "sampled-floor": (PPOPenalty, MUJOCO),
    # CartPole and LunarLander
    "clip-minibatch": (PPOClip, MINIBATCH),
    "adaptive-minibatch": (PPOPenalty, {**PAPERS, **MINIBATCH}),
    "sampled-floor-minibatch": (PPOPenalty, {**MUJOCO, **MINIBATCH}),
    # What it is that works
    "truncated": (PPOPenalty, {**ADAPTIVE, "max_ratio": 1.3}),
    "sampled": (PPOPenalty, {**ADAPTIVE, "kl_penalty": SAMPLED}),
    "adaptive-falling": (PPOPenalty, {"target_kl": FALLING, "kl_coef_bounds": (1e-4, 1e4)}),
    "proportional-falling": (PPOPenalty, ADAPTIVE),
    "truncation-alone": (PPOPenalty, {"kl_controller": "fixed", "kl_coef": 1e-3, "max_ratio": 1.3}),
    "truncated-adaptive": (PPOPenalty, {"target_kl": FALLING, "max_ratio": 1.3}),
    "truncated-constant": (PPOPenalty, {**ADAPTIVE, "target_kl": 0.02, "max_ratio": 1.3}),
    "truncated-to-zero": (PPOPenalty, {**ADAPTIVE, "target_kl": LinearSchedule(0.034, 0.0, 1.0), "max_ratio": 1.3}),
    # A coefficient that does not sink lets the divergence fall with the learning rate, as it does under the clip
    "truncated-floor": (
        PPOPenalty,
        {**ADAPTIVE, "target_kl": 0.028, "max_ratio": 1.3, "kl_coef": 0.7, "kl_coef_bounds": (0.7, 1e3)},
    ),
    "truncated-1.2": (PPOPenalty, {**ADAPTIVE, "max_ratio": 1.2}),
    "truncated-1.5": (PPOPenalty, {**ADAPTIVE, "max_ratio": 1.5}),
    "truncated-2": (PPOPenalty, {**ADAPTIVE, "max_ratio": 2.0}),
    "sampled-constant": (PPOPenalty, {**ADAPTIVE, "target_kl": 0.02, "kl_penalty": SAMPLED}),
    "sampled-unweighted": (PPOPenalty, {**ADAPTIVE, "kl_penalty": {"sampled": True}}),
    "sampled-fixed": (PPOPenalty, {"kl_controller": "fixed", "kl_coef": 5.0, "kl_penalty": SAMPLED}),
    # The floor of "sampled-floor" and nothing above it
    "sampled-fixed-2": (PPOPenalty, {"kl_controller": "fixed", "kl_coef": 2.0, "kl_penalty": SAMPLED}),
    "weighted": (PPOPenalty, {**ADAPTIVE, "kl_penalty": {"advantage_weighted": True}}),
}
TABLE = ("clip", "adaptive", "sampled-floor")


def settings_of(task: Task, method: str) -> dict[str, Any]:
    """Bring together what a method is given on a task."""
    algorithm, own = METHODS[method]
    unclipped = {"clip_range": None} if algorithm is PPOPenalty else {}
    return {**PROTOCOL, **task.own, **unclipped, **own}


class Recorder(BaseCallback):
    """Keep every episode's return with the step at which it ended, and every update's figures."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float]] = []
        self.updates: dict[str, list[float]] = {}

    def _on_step(self) -> bool:
        self.episodes += [(self.num_timesteps, info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_start(self) -> None:
        self._take()

    def _on_training_end(self) -> None:
        self._take()

    def _take(self) -> None:
        for name in FIGURES:
            if (value := self.logger.name_to_value.get(f"train/{name}")) is not None:
                self.updates.setdefault(name, []).append(float(value))


def in_parts(values: np.ndarray[Any, Any], steps: np.ndarray[Any, Any], total: int) -> list[float | None]:
    """
    Average what happened in each of :data:`PARTS` equal parts of training.

    :param values: in the order of their steps
    :param steps: at which each was taken
    :param total: steps of the training
    :return: a mean for each part; None where nothing happened
    """
    part = np.minimum((steps - 1) * PARTS // total, PARTS - 1)
    return [float(values[part == k].mean()) if (part == k).any() else None for k in range(PARTS)]


def course_of(recorder: Recorder, steps: int) -> dict[str, Any]:
    """
    Tell how a training went.

    :param recorder: that took part in it
    :param steps: of the training
    :return: mean return of the episodes that ended in its last tenth, learning curve, and the updates' figures
    """
    when, what = (np.array(column) for column in zip(*recorder.episodes, strict=True))
    return {
        "last_tenth": float(what[when > 0.9 * steps].mean()),
        "curve": in_parts(what, when, steps),
        "updates": {
            name: in_parts(np.array(values), np.linspace(1, steps, len(values)), steps)
            for name, values in recorder.updates.items()
        },
    }


def atari_env(env_id: str, n_envs: int, seed: int) -> VecEnv:
    """Make environments of one of Atari's games, as DeepMind preprocesses it; importing `ale_py` registers them."""
    return VecFrameStack(make_atari_env(f"ale_py:{env_id}", n_envs, seed), 4)


def training_env(env_id: str, task: Task, seed: int, gamma: float) -> VecEnv:
    """Make the environments that a policy is trained in."""
    if task.images:
        return atari_env(env_id, task.n_envs, seed)
    # `VecNormalize` over `DummyVecEnv` to the bit, in a quarter of the time
    lean: Any = (LeanVecNormalize, {"gamma": gamma}) if task.normalised else (LeanVecEnv, {})
    return make_vec_env(env_id, task.n_envs, seed, vec_env_cls=lean[0], vec_env_kwargs=lean[1])


def returns_without_noise(model: ProximalAlgorithm, env_id: str, task: Task, seed: int) -> list[float]:
    """Let the trained policy play, each action its most likely one."""
    env: Any = atari_env(env_id, 1, seed) if task.images else make_vec_env(env_id, seed=seed)
    if task.normalised:
        trained: Any = model.env
        env = VecNormalize(env, training=False, norm_reward=False)
        env.obs_rms = trained.obs_rms
    returns: Any = evaluate_policy(model, env, EVAL_EPISODES, deterministic=True, return_episode_rewards=True)[0]
    return [round(each, 2) for each in returns]


def perform(env_id: str, method: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """
    Train one policy and evaluate it.

    :param env_id: of a registered environment
    :param method: a key of :data:`METHODS`
    :param seed: of networks, actions and environment
    :param steps: of training; default: the task's
    :return: all that is worth keeping, for JSON
    """
    th.set_num_threads(1)
    algorithm = METHODS[method][0]
    task = TASKS.get(env_id, MUJOCO_TASK)
    steps = steps or task.steps
    settings = settings_of(task, method)
    policy = ActorCriticCnnPolicy if task.images else ActorCriticPolicy
    env = training_env(env_id, task, seed, settings["gamma"])
    compiled = steps >= COMPILED_FROM and not task.images
    model = algorithm(policy, env, **settings, seed=seed, compile=compiled, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))
    recorder = Recorder()
    started = time.process_time()
    model.learn(steps, callback=recorder)
    seconds = time.process_time() - started
    packages = ("stable-baselines3", "gymnasium", "ale-py" if task.images else "mujoco", "numpy", "torch")
    return {
        "env": env_id,
        "method": method,
        "seed": seed,
        "steps": steps,
        "settings": settings,
        "versions": {name: version(name) for name in packages},
        "processor_seconds": round(seconds),
        "without_noise": returns_without_noise(model, env_id, task, 10_000 + seed),
        **course_of(recorder, steps),
    }


def rounded(value: Any) -> Any:
    """Shorten the floats of a tree of lists and dicts to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def path_of(out: Path, env_id: str, method: str, seed: int) -> Path:
    """Name the file of a run."""
    return out / "runs" / env_id / f"{method}-{seed}.json"


def keep(run: dict[str, Any], out: Path) -> None:
    """Write the file of a run, which appears whole or not at all."""
    path = path_of(out, run["env"], run["method"], run["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rounded(run), default=repr))
    unfinished.replace(path)


def missing(chosen: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Go through the runs that have no file yet, seed by seed, so that an early end leaves as many of each method."""
    for env_id in chosen.envs:
        for seed in chosen.seeds:
            for method in chosen.methods:
                if not path_of(chosen.out, env_id, method, seed).exists():
                    yield env_id, method, seed


def run_all(chosen: argparse.Namespace) -> None:
    """Perform what is missing, each run in a process of its own."""

    def start(run: tuple[str, str, int]) -> None:
        env_id, method, seed = run
        words = [
            "one",
            env_id,
            "--methods",
            method,
            "--seeds",
            str(seed),
            "--out",
            str(chosen.out),
            *(("--steps", str(chosen.steps)) if chosen.steps else ()),
        ]
        finished = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        print(f"{env_id} {method} {seed}: {'done' if finished.returncode == 0 else finished.stderr[-2000:]}", flush=True)

    with ThreadPoolExecutor(chosen.n_jobs) as pool:
        list(pool.map(start, missing(chosen)))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "one"))
    parser.add_argument("envs", nargs="+")
    parser.add_argument("--methods", nargs="+", default=TABLE, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15])
    parser.add_argument("--steps", type=int, help="of training; default: the task's, a million for MuJoCo's")
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    if chosen.command == "one":
        keep(perform(chosen.envs[0], chosen.methods[0], chosen.seeds[0], chosen.steps), chosen.out)
    else:
        run_all(chosen)


if __name__ == "__main__":
    main()
