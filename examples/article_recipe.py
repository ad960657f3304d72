"""
Run the article's section 5: PPO-clip on Pendulum-v1 with batches of whole episodes.

    python examples/article_recipe.py --n-timesteps 220000

What the article (https://www.cnblogs.com/xingzheai/p/15931681.html) logs, saves and renders in its own loop is done here by
SB3's logger and callbacks:

    average episodic length, return of the batch   rollout/ep_len_mean, rollout/ep_rew_mean (Monitor's episodes)
    average actor loss, value loss                 train/policy_gradient_loss, train/value_loss
    iteration, steps so far                        time/iterations, time/total_timesteps
    every ``save_freq`` iterations: save           CheckpointCallback
    every ``render_every_i`` iterations: render    a callback that writes the batch's first episode as a GIF

Writes into ``--out``: progress.csv, checkpoints/, episodes/, model.zip.

The recipe is slow: an iteration of 2,200 steps makes ten gradient steps. After 220,000 steps (a minute or two) seed 0 still
returns about -1,350; the article shows iteration 10,000, which is 22 million steps.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EventCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import safe_mean

from sb3_ppo_penalty import ARTICLE_RECIPE, PPOClip
from sb3_ppo_penalty.study.references import ARTICLE_ITERATIONS, ARTICLE_RETURN, OPTIMA

ENV_ID, EPISODE_LENGTH = "Pendulum-v1", 200


class AfterUpdate(EventCallback):
    """
    Call another callback once per iteration, after the policy's update.

    SB3 logs before the update and calls its callbacks during the rollout: a log would then show the losses of the iteration
    before, and a checkpoint would miss the last update.

    :param callback: called after every update; its steps are iterations
    """

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > 0:
            self._on_event()

    def _on_training_end(self) -> None:
        self._on_event()


class LogIteration(BaseCallback):
    """Write one line of the log per call, with everything that the iteration recorded."""

    def _on_step(self) -> bool:
        self.model.dump_logs(self.n_calls)
        return True


class RenderEpisode(BaseCallback):
    """
    Write the first episode of a batch as an animated GIF.

    :param every: number of iterations from one GIF to the next; the first GIF shows the untrained policy
    :param folder: folder for the GIFs, each named after its iteration, counted from 1
    """

    def __init__(self, every: int, folder: Path):
        super().__init__()
        self.every = every
        self.folder = folder
        self.iteration = 0
        self.recording = False
        self.frames: list[np.ndarray] = []

    def _on_training_start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def _on_rollout_start(self) -> None:
        self.recording = self.iteration % self.every == 0
        self.iteration += 1

    def _on_step(self) -> bool:
        if not self.recording:
            return True
        if self.locals["dones"][0]:
            self._write()
        else:
            # Half of the frames and half of the pixels in each direction keep the GIF small: 25 frames a second of 250 x 250
            if self.n_calls % 2:
                self.frames.append(self.training_env.render()[::2, ::2])
        return True

    def _write(self) -> None:
        iio.imwrite(self.folder / f"iteration_{self.iteration:05d}.gif", self.frames, duration=40, loop=0)
        self.frames, self.recording = [], False


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Parse the command line.

    :param arguments: words of the command line; default: this process's
    :return: the parsed arguments
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-timesteps", type=int, default=220_000, help="rounded up to whole batches of 2200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-freq", type=int, default=10, help="iterations between two checkpoints")
    parser.add_argument("--render-every", type=int, default=10, help="iterations between two GIFs")
    parser.add_argument("--out", type=Path, default=Path("runs/article_recipe"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train with the recipe and compare its return with the article's.

    :param arguments: words of the command line; default: this process's
    """
    options = parse(arguments)
    # SB3's averages are then over the episodes of one batch, as in the article
    n_episodes = ARTICLE_RECIPE["n_steps"] // EPISODE_LENGTH
    model = PPOClip("MlpPolicy", ENV_ID, seed=options.seed, stats_window_size=n_episodes, **ARTICLE_RECIPE)
    model.set_logger(configure(str(options.out), ["stdout", "csv"]))
    checkpoint = CheckpointCallback(options.save_freq, str(options.out / "checkpoints"), name_prefix="ppo_article")
    callbacks = [
        RenderEpisode(options.render_every, options.out / "episodes"),
        AfterUpdate(CallbackList([LogIteration(), checkpoint])),
    ]
    # No log_interval, because LogIteration logs
    model.learn(options.n_timesteps, callback=callbacks, log_interval=None)
    model.logger.close()
    model.save(options.out / "model")

    last_batch = safe_mean([episode["r"] for episode in model.ep_info_buffer])
    n_iterations = model.num_timesteps // model.n_steps
    print(f"average episodic return of the last batch: {last_batch:.2f}, {n_episodes} episodes, iteration {n_iterations}")
    print(f"the article's closing figure: {ARTICLE_RETURN}, iteration {ARTICLE_ITERATIONS}")
    print(f"best possible mean over random starts: {OPTIMA[ENV_ID]}")
    print(
        "The article's figure is the mean of one batch of about ten episodes and lies above the optimum: a batch of lucky\n"
        "starts. Under the optimal policy one batch in 250 to 500 is as good. Judge a policy by 1,000 episodes or more."
    )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
