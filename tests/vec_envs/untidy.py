"""Environments that use their memory again, and a comparison to the last bit."""

from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd


class Untidy(gym.Env):
    """Writes each observation and info into the same memory; every kind of observation and of info."""

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Dict(
            {
                "far": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
                "image": spaces.Box(0, 255, (4, 4, 1), np.uint8),
                "near": spaces.Box(-1, 1, (3,), np.float32),
                "which": spaces.Discrete(5),
            }
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.render_mode = render_mode
        self.gravity = 9.8
        self.steps = self.resets = 0
        self.observation = {"far": np.zeros((2, 3)), "image": np.zeros((4, 4, 1), np.uint8), "near": np.zeros(3), "which": 0}
        self.info: dict[str, Any] = {"far": self.observation["far"], "name": "x", "nested": {"steps": 0}, "visits": []}

    def _look(self) -> dict[str, Any]:
        self.observation["far"][:] = self.np_random.normal(scale=1e3, size=(2, 3))
        self.observation["image"][:] = self.np_random.integers(0, 256, (4, 4, 1))
        self.observation["near"][:] = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.observation["which"] = int(self.np_random.integers(5))
        return self.observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = (options or {}).get("steps", 0)
        self.resets += 1
        return self._look(), {"resets": self.resets}

    def step(self, action):
        self.steps += 1
        self.info["nested"]["steps"] = self.steps
        self.info["visits"][:] = [self.steps]
        self.info["reward"] = np.float64(action.sum())
        over = self.np_random.random() < 0.1
        return self._look(), float(action.sum()), over, self.steps % 7 == 0, self.info

    def render(self):
        return np.full((2, 2, 3), 7, np.uint8)


class FlatUntidy(gym.ObservationWrapper):
    """The first observation of the above, alone."""

    def __init__(self) -> None:
        super().__init__(Untidy())
        self.observation_space = self.env.observation_space["far"]

    def observation(self, observation):
        return observation["far"]


class Tidy(gym.Wrapper):
    """Returns copies, where SB3 itself mistakes the first observation of an episode for the last one of the one before."""

    def reset(self, **options):
        return deepcopy(self.env.reset(**options))

    def step(self, action):
        return deepcopy(self.env.step(action))


def bits(value: Any) -> Any:
    """Type and content, down to the last bit, of whatever an environment returns."""
    if isinstance(value, dict):
        return type(value), [(key, bits(each)) for key, each in value.items() if key != "t"]  # the time of day, by Monitor
    if isinstance(value, (list, tuple)):
        return type(value), [bits(each) for each in value]
    if isinstance(value, RunningMeanStd):
        return bits(vars(value))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    return type(value), np.asarray(value).tobytes() if isinstance(value, float) else value
