"""The lean buffers hold what SB3's hold, to the bit, and nobody else's buffer is touched."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_ppo_penalty import PPOClip, RewardToGoRolloutBuffer
from sb3_ppo_penalty.rollouts.lean import LeanDictRolloutBuffer, LeanRolloutBuffer, make_lean

BOX = spaces.Box(-1, 1, (3,), np.float32)
SPACES = {
    "Box": (BOX, BOX),
    "Discrete": (spaces.Discrete(5), spaces.Discrete(4)),
    "images": (spaces.Box(0, 255, (4, 4, 1), np.uint8), spaces.MultiBinary(3)),
    "Dict": (spaces.Dict(a=BOX, b=spaces.Discrete(5)), BOX),
}


def filled(lean: bool, observation_space, action_space, n_envs: int):
    """Fill a buffer of 50 steps with random numbers, always the same ones."""
    generator = np.random.default_rng(0)
    several = isinstance(observation_space, spaces.Dict)
    buffer = (DictRolloutBuffer if several else RolloutBuffer)(
        50, observation_space, action_space, device="cpu", gae_lambda=0.93, gamma=0.987, n_envs=n_envs
    )
    if lean:
        make_lean(buffer)
    for space in (observation_space, action_space):
        space.seed(0)

    def sampled(space):
        return np.stack([space.sample() for _ in range(n_envs)])

    for _ in range(50):
        names = observation_space.spaces if several else ()
        observation = {key: sampled(observation_space[key]) for key in names} if several else sampled(observation_space)
        reward, value, log_prob = generator.standard_normal((3, n_envs), dtype=np.float32) * 100
        begun = generator.random(n_envs) < 0.2
        values = th.from_numpy(value).reshape(-1, 1)
        buffer.add(observation, sampled(action_space), reward, begun, values, th.from_numpy(log_prob))
    last = th.from_numpy(generator.standard_normal((n_envs, 1), dtype=np.float32))
    buffer.compute_returns_and_advantage(last, generator.random(n_envs) < 0.5)
    return buffer


@pytest.mark.parametrize("case", SPACES)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_content_is_that_of_sb3_to_the_bit(case: str, n_envs: int) -> None:
    plain, lean = (filled(lean, *SPACES[case], n_envs) for lean in (False, True))
    assert type(lean) in (LeanRolloutBuffer, LeanDictRolloutBuffer)
    expected, found = ({**vars(buffer)} for buffer in (plain, lean))
    for name in {"observations", *(key for key, value in expected.items() if isinstance(value, np.ndarray))}:
        ours, theirs = found.pop(name), expected.pop(name)
        for key in ours if isinstance(ours, dict) else [...]:
            assert ours[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=name)
    assert found == expected
    assert found["full"]


def test_a_buffer_that_was_asked_for_stays() -> None:
    class Own(RolloutBuffer):
        pass

    for asked_for in (Own, RewardToGoRolloutBuffer):
        model = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=64, rollout_buffer_class=asked_for)
        assert type(model.rollout_buffer) is asked_for
    model = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=64)
    assert (type(model.rollout_buffer), model.rollout_buffer_class) == (LeanRolloutBuffer, RolloutBuffer)
