"""
Train PPO with the adaptive KL penalty on Pendulum-v1 and show what it learned.

    python examples/train_pendulum.py --seed 0

Writes into ``--out``: the model, an animation of the trained pendulum and the learning curve, and prints the mean return over
many episodes beside the best that any policy can reach.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks are faster on one thread
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # the frames go to a file, not to a screen

import gymnasium as gym
import matplotlib as mpl
import numpy as np
from PIL import Image
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_penalty import PENDULUM, PPOPenalty
from sb3_ppo_penalty.study.references import OPTIMA

mpl.use("Agg")
from matplotlib import pyplot as plt

ENV_ID = "Pendulum-v1"
N_ENVS = 4
OPTIMUM = OPTIMA[ENV_ID]


def train(seed: int, n_timesteps: int, out: Path) -> PPOPenalty:
    """
    Train on normalised rewards, with an evaluation every 5,000 steps.

    :param seed: seed of the environments, the networks and the actions
    :param n_timesteps: number of environment steps
    :param out: folder for the evaluations during training
    :return: the trained model
    """
    # The critic needs rewards of about size 1. Observations are not normalised, so that the model can act without statistics
    env = VecNormalize(make_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed), norm_obs=False, gamma=PENDULUM["gamma"])
    eval_env = VecNormalize(make_vec_env(ENV_ID, n_envs=20, seed=10_000), norm_obs=False, norm_reward=False, training=False)
    callback = EvalCallback(eval_env, n_eval_episodes=20, eval_freq=5_000 // N_ENVS, log_path=str(out), verbose=0)
    model = PPOPenalty("MlpPolicy", env, seed=seed, device="cpu", **PENDULUM)
    return model.learn(n_timesteps, callback=callback, progress_bar=True)


def animate(model: PPOPenalty, path: Path, seed: int = 3) -> None:
    """
    Save an episode of the trained model as an animated GIF.

    :param model: the trained model
    :param path: path of the GIF
    :param seed: seed of the episode's start
    """
    env = gym.make(ENV_ID, render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    frames, done = [], False
    while not done:
        frames.append(Image.fromarray(env.render()).resize((240, 240), Image.Resampling.LANCZOS))
        action, _ = model.predict(observation, deterministic=True)
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    env.close()
    shown = [frame.quantize(32) for frame in frames[:150:2]]  # a step is 0.05 s: every other frame for 0.1 s is real time
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=100, loop=0, optimize=True)


def plot_learning_curve(evaluations: Path, path: Path, seed: int) -> None:
    """
    Plot the evaluations during training.

    :param evaluations: the ``evaluations.npz`` of SB3's EvalCallback
    :param path: path of the picture
    :param seed: seed of the training, for the title
    """
    data = np.load(evaluations)
    steps, returns = data["timesteps"], data["results"]
    with plt.style.context("sb3_ppo_penalty.study.pictures"):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        low, high = np.quantile(returns, [0.25, 0.75], axis=1)
        axes.fill_between(steps, low, high, alpha=0.25, linewidth=0, label="middle half of 20 episodes")
        axes.plot(steps, returns.mean(axis=1), marker="o", markersize=3, label="mean of 20 episodes")
        axes.axhline(OPTIMUM, color="black", linestyle="--", linewidth=1, label=f"optimum {OPTIMUM}")
        axes.set(xlabel="environment steps", ylabel="return of an episode", title=f"PPOPenalty on {ENV_ID}, seed {seed}")
        axes.legend(loc="lower right")
        for ending in (".png", ".pdf"):
            figure.savefig(path.with_suffix(ending))
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train, evaluate and write the model, the animation and the learning curve.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run")
    parser.add_argument("--n-timesteps", type=int, default=100_000, help="environment steps of training")
    parser.add_argument("--n-eval-episodes", type=int, default=1_000, help="episodes of the final evaluation, at least 100")
    parser.add_argument("--out", type=Path, default=Path("runs/train_pendulum"), help="folder for all that is written")
    options = parser.parse_args(arguments)
    if options.n_eval_episodes < 100:
        parser.error("--n-eval-episodes must be at least 100: single episodes differ by 74 in standard deviation")
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    model = train(options.seed, options.n_timesteps, options.out)
    model.save(options.out / "ppo_penalty_pendulum")
    env = make_vec_env(ENV_ID, n_envs=50, seed=20_000)
    returns, _ = evaluate_policy(model, env, options.n_eval_episodes, return_episode_rewards=True)
    error = np.std(returns) / np.sqrt(len(returns))
    animate(model, options.out / "pendulum.gif")
    plot_learning_curve(options.out / "evaluations.npz", options.out / "learning_curve.png", options.seed)
    print(f"Mean return over {len(returns)} episodes: {np.mean(returns):.1f} +- {error:.1f} (optimum {OPTIMUM})")
    print(f"{options.n_timesteps} steps, evaluation and pictures took {time.perf_counter() - start:.0f} s")
    print("\n".join(f"wrote {options.out / name}" for name in sorted(os.listdir(options.out))))


if __name__ == "__main__":
    main()
