"""
Use PPOPenalty with what Stable-Baselines3 offers around an algorithm, in about a minute.

    python examples/sb3_features.py                          # all of it
    python examples/sb3_features.py callbacks normalization  # some of it

- callbacks: EvalCallback, StopTrainingOnRewardThreshold, CheckpointCallback, ProgressBarCallback
- normalization: VecNormalize, saved and loaded with the model
- subprocesses: SubprocVecEnv, an environment per process
- loggers: TensorBoard and CSV, with the live coefficient and the divergence in them
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_ppo_penalty import PPOPenalty


def callbacks(out: Path) -> None:
    """
    Evaluate every 1,000 steps, keep the best model, save checkpoints, and stop when the return is good enough.

    :param out: folder for all that is written
    """
    enough = StopTrainingOnRewardThreshold(reward_threshold=200, verbose=1)
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", seed=1000),
        callback_on_new_best=enough,
        n_eval_episodes=10,
        eval_freq=1000,
        log_path=str(out),
        best_model_save_path=str(out),
        verbose=0,
    )
    checkpoints = CheckpointCallback(save_freq=1000, save_path=str(out / "checkpoints"), name_prefix="ppo_penalty")
    model = PPOPenalty("MlpPolicy", "CartPole-v1", n_steps=512, learning_rate=1e-3, seed=0)
    model.learn(30_000, callback=[evaluation, checkpoints, ProgressBarCallback()])
    print(f"stopped after {model.num_timesteps} of 30000 steps, best mean return {evaluation.best_mean_reward:g}")
    print_files(out)


def normalization(out: Path) -> None:
    """
    Normalise observations and rewards, and save and load the statistics with the model.

    :param out: folder for all that is written
    """
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    model = PPOPenalty("MlpPolicy", env, n_steps=512, seed=0)
    model.learn(2048)
    model.save(out / "model")
    env.save(str(out / "vecnormalize.pkl"))

    loaded_env = VecNormalize.load(str(out / "vecnormalize.pkl"), make_vec_env("Pendulum-v1", n_envs=2))
    loaded = PPOPenalty.load(out / "model", env=loaded_env)
    before, after = mean_return(model, env), mean_return(loaded, loaded_env)
    print(f"mean return {before:.3f}, after loading {after:.3f}; kl_coef {model.kl_coef:g}, after loading {loaded.kl_coef:g}")
    print_files(out)


def mean_return(model: PPOPenalty, env: VecNormalize) -> float:
    """
    Evaluate a model on ten episodes, the same ones at every call.

    :param model: the model
    :param env: environments, whose statistics are used and not changed; the returns are not normalised
    :return: mean return
    """
    env.training, env.norm_reward = False, False
    env.seed(1)
    return evaluate_policy(model, env, n_eval_episodes=10)[0]


def subprocesses(out: Path) -> None:
    """
    Run each environment in a process of its own, which needs the script's last lines, ``if __name__ == "__main__"``.

    :param out: folder for all that is written
    """
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv, monitor_dir=str(out))
    model = PPOPenalty("MlpPolicy", env, n_steps=512, seed=0)
    model.learn(2048)
    env.close()
    model.save(out / "model")
    print(f"{model.num_timesteps} steps from {env.num_envs} processes")
    print_files(out)


def loggers(out: Path) -> None:
    """
    Log to CSV and to TensorBoard at once; ``tensorboard --logdir`` on the folder shows the figures.

    :param out: folder for all that is written
    """
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", n_steps=512, seed=0)
    model.set_logger(configure(str(out), ["csv", "tensorboard"]))
    model.learn(3072)
    model.logger.close()
    with (out / "progress.csv").open(newline="") as file:
        # SB3 logs before the update, so that the first line has no update yet
        updates = list(csv.DictReader(file))[1:]
    print("steps   train/kl   train/kl_coef (for the update after)")
    for row in updates:
        print(f"{row['time/total_timesteps']:>5}   {float(row['train/kl']):8.5f}   {float(row['train/kl_coef']):g}")
    print_files(out)


def print_files(out: Path) -> None:
    """
    Print the name and the size of each file that was written.

    :param out: folder of the files
    """
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"  wrote {path} ({path.stat().st_size} bytes)")


FEATURES = {function.__name__: function for function in (callbacks, normalization, subprocesses, loggers)}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the chosen parts.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", metavar="feature", help=f"any of {', '.join(FEATURES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/sb3_features"), help="folder; gets one for each feature")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.features if name not in FEATURES]
    if unknown:
        parser.error(f"no such feature: {', '.join(unknown)}; there are {', '.join(FEATURES)}")
    for name in options.features or FEATURES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"== {name}")
        FEATURES[name](folder)


if __name__ == "__main__":
    main()
