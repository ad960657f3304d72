"""
Train on 64 pendulums that are one batch of numpy arrays: how to write such an environment, and how fast it is.

    python examples/batched_pendulum.py                   # trains, and prints steps per second
    python examples/batched_pendulum.py --timesteps 4096  # shorter

Gymnasium's own batched environments (``gymnasium.make_vec("CartPole-v1", num_envs=64)``) and EnvPool's are used likewise.
"""

import argparse
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecMonitor

from sb3_ppo_penalty import PPOPenalty
from sb3_ppo_penalty.vec_envs import BatchedVecEnv

Array = npt.NDArray[Any]
LENGTH = 200
HIGH = np.array([1.0, 1.0, 8.0], dtype=np.float32)


class BatchedPendulum(VectorEnv[Array, Array, Array]):
    """
    Gymnasium's ``Pendulum-v1`` for many pendulums at a time, by the same equations on arrays.

    :param num_envs: number of pendulums
    """

    def __init__(self, num_envs: int) -> None:
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-HIGH, HIGH, dtype=np.float32)
        self.single_action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.angle = self.speed = np.zeros(num_envs)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """
        Start a new episode of all pendulums.

        :param seed: seed of all pendulums together
        :param options: not used
        :return: first observations, shape (num_envs, 3), and no infos
        """
        super().reset(seed=seed)
        self.angle, self.speed = self.np_random.uniform([[-np.pi], [-1.0]], [[np.pi], [1.0]], size=(2, self.num_envs))
        self.steps = 0
        return self._observations(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """
        Move all pendulums by one time step; their episodes end together.

        :param actions: torques, shape (num_envs, 1)
        :return: observations, rewards, terminations, truncations and infos
        """
        torque = np.clip(actions[:, 0], -2.0, 2.0)
        from_upright = (self.angle + np.pi) % (2 * np.pi) - np.pi
        rewards = -(from_upright**2 + 0.1 * self.speed**2 + 0.001 * torque**2)
        self.speed = np.clip(self.speed + (15.0 * np.sin(self.angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        self.angle = self.angle + self.speed * 0.05
        self.steps += 1
        observations, over = self._observations(), np.full(self.num_envs, self.steps == LENGTH)
        if self.steps < LENGTH:
            return observations, rewards, np.zeros_like(over), over, {}
        return self.reset()[0], rewards, np.zeros_like(over), over, {"final_obs": observations, "final_info": {}}

    def _observations(self) -> Array:
        """
        Observe all pendulums.

        :return: cosine and sine of the angle, and the speed, shape (num_envs, 3)
        """
        return np.stack([np.cos(self.angle), np.sin(self.angle), self.speed], axis=1).astype(np.float32)


def main() -> None:
    """Train, and print the number of steps per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=200_000, help="steps of all pendulums together")
    parser.add_argument("--n-envs", type=int, default=64, help="number of pendulums")
    options = parser.parse_args()
    env = VecMonitor(BatchedVecEnv(BatchedPendulum(options.n_envs)))
    model = PPOPenalty("MlpPolicy", env, n_steps=64, batch_size=256, gamma=0.9, learning_rate=1e-3, seed=0)
    start = time.perf_counter()
    model.learn(options.timesteps)
    returns = [episode["r"] for episode in model.ep_info_buffer or []]
    print(f"{model.num_timesteps / (time.perf_counter() - start):,.0f} steps/s, mean return {np.mean(returns):.0f}")


if __name__ == "__main__":
    main()
