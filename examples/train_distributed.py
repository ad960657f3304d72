"""
Train one policy on several processes, each with environments of its own.

    torchrun --nproc-per-node 2 examples/train_distributed.py  # two processes on this machine
    python examples/train_distributed.py                       # one, without torchrun

Over several machines start it on each of them, with the same arguments:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE examples/train_distributed.py

The first process evaluates, logs and saves into ``--out``; every process writes the checkpoints from which a training that
was killed goes on when it is started again as it was. ``--out`` has to be a folder that all machines share.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks are faster on one thread

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_penalty import PPOPenalty, ResumableCheckpointCallback, latest_checkpoint, resume
from sb3_ppo_penalty.distributed import Ranks, session


def train(ranks: Ranks, options: argparse.Namespace) -> PPOPenalty:
    """
    Train a new model, or continue from the latest checkpoint that all processes have.

    :param ranks: the processes that train together
    :param options: parsed arguments of the command line
    :return: the trained model, the same in every process
    """
    env = make_vec_env(options.env, options.n_envs)
    checkpoints = ResumableCheckpointCallback(options.save_freq, options.out / "checkpoints", ranks.name_prefix)
    callback: list[BaseCallback] = [checkpoints]
    if ranks.is_main_process:
        eval_env = make_vec_env(options.env, 1, seed=1_000)
        callback.append(EvalCallback(eval_env, eval_freq=options.eval_freq, log_path=str(options.out), verbose=0))
    path = latest_checkpoint(options.out / "checkpoints", ranks=ranks)
    if path is None:
        # The same seed in every process: each derives its own seed from it
        model = PPOPenalty(
            "MlpPolicy",
            env,
            n_steps=options.n_steps,
            batch_size=options.batch_size,
            gamma=0.95,
            gae_lambda=0.9,
            learning_rate=1e-3,
            compile=options.compile,
            seed=options.seed,
            device=options.device,
            verbose=1,
        )
        return model.learn(options.n_timesteps, callback)
    resumed, remaining_timesteps = resume(path, env, checkpoints, device=options.device)
    assert isinstance(resumed, PPOPenalty)
    return resumed.learn(remaining_timesteps, callback, reset_num_timesteps=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train, and let the main process evaluate and save the model.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="Gymnasium's name of the environment")
    parser.add_argument("--n-timesteps", type=int, default=100_000, help="steps of all processes together")
    parser.add_argument("--n-envs", type=int, default=4, help="environments of each process")
    parser.add_argument("--n-steps", type=int, default=256, help="steps of each environment between two updates")
    parser.add_argument("--batch-size", type=int, default=64, help="minibatch of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the networks, the loss and its gradient")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU per process")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the other processes before giving up")
    parser.add_argument("--save-freq", type=int, default=2_500, help="steps of each environment between two checkpoints")
    parser.add_argument("--eval-freq", type=int, default=2_500, help="steps of each environment between two evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"), help="folder for all that is written")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    with session(timeout=options.timeout) as ranks:
        model = train(ranks, options)
        if ranks.is_main_process:
            model.save(options.out / "model")
            mean, _ = evaluate_policy(model, Monitor(make_vec_env(options.env, 1, seed=2_000).envs[0]), n_eval_episodes=20)
            print(f"{ranks.size} process(es), {model.num_timesteps:,} steps: mean return {mean:.1f} over 20 episodes")


if __name__ == "__main__":
    main()
