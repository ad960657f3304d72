"""An environment in which nothing goes wrong, for tests in which something shall."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

BOX = spaces.Box(-1, 1, (2,), np.float32)


class Sound(gym.Env):
    """Three random numbers to see; the sum of the action to earn; over after ten steps."""

    length = 10

    def __init__(self, action_space: spaces.Space = BOX) -> None:
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = action_space
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        observation = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return observation, float(np.sum(action)), self.steps % self.length == 0, False, {}
