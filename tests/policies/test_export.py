"""Exported and compiled policies (torch.export, ONNX, `torch.compile`) make the same actions as `predict`."""

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv

from sb3_ppo_penalty import PPOClip


class TwoActions(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.array([0.3, -0.2, 0.9], np.float32), {}


class SeveralChoices(TwoActions):
    action_space = spaces.MultiDiscrete([3, 4])


class Images(FakeImageEnv):
    def __init__(self) -> None:
        super().__init__(screen_height=36, screen_width=36, n_channels=1, discrete=False)


CASES = {
    "one variance": ("MlpPolicy", TwoActions, {}),
    "variances": ("MlpPolicy", TwoActions, {"covariance": [0.5, 0.2]}),
    "matrix": ("MlpPolicy", TwoActions, {"covariance": [[0.5, 0.1], [0.1, 0.3]]}),
    "learned": ("MlpPolicy", TwoActions, {"learn_covariance": True}),
    "images": ("CnnPolicy", Images, {}),
    "Dict": ("MultiInputPolicy", lambda: SimpleMultiObsEnv(discrete_actions=False), {}),
    "Discrete": ("MlpPolicy", lambda: gym.make("CartPole-v1"), {}),
    "MultiDiscrete": ("MlpPolicy", SeveralChoices, {}),
}
#: Cases with a fixed covariance, which use none of torch's distributions with their checks of arguments
FIXED = ("one variance", "variances", "matrix", "images", "Dict")


class Actor(th.nn.Module):
    """Module to export: observation in, mean action out, before it is clipped to the bounds."""

    def __init__(self, policy: th.nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy(observation, deterministic=True)[0]


#: Each is a network, a covariance or a space of its own; the others differ from one of these in one of the three
FIRST = ("variances", "Dict", "Discrete", "MultiDiscrete")


@pytest.fixture(params=[each if each in FIRST else pytest.param(each, marks=pytest.mark.slow) for each in CASES])
def case(request, monkeypatch):
    name, env, options = request.param, *CASES[request.param][1:]
    # Restored after each test: torch.compile switches these checks off for the rest of the process
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", name in FIXED)
    model = PPOClip(CASES[name][0], env(), policy_kwargs=options, n_steps=16, batch_size=16, seed=0)
    with th.no_grad():
        # Larger means than a fresh policy's, some of them beyond the bounds
        model.policy.action_net.weight.mul_(100)
    observation = model.get_env().reset()
    th.compiler.reset()
    return model, observation, model.policy.obs_to_tensor(observation)[0]


def clipped(model: PPOClip, actions: np.ndarray) -> np.ndarray:
    space = model.action_space
    return np.clip(actions, space.low, space.high) if isinstance(space, spaces.Box) else actions


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch warns of its own code
def test_exported_policies_act_alike(case, tmp_path) -> None:
    model, observation, tensors = case
    expected, _ = model.predict(observation, deterministic=True)
    actor = Actor(model.policy).eval()
    exported = th.export.export(actor, (), {"observation": tensors})
    with th.no_grad():
        actions = exported.module()(observation=tensors).numpy()
    np.testing.assert_allclose(clipped(model, actions), expected, rtol=1e-5, atol=1e-6)

    program = th.onnx.export(exported, verbose=False)
    program.save(tmp_path / "actor.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "actor.onnx")
    arrays = [each.numpy() for each in (tensors.values() if isinstance(tensors, dict) else [tensors])]
    inputs = dict(zip([each.name for each in session.get_inputs()], arrays, strict=True))
    np.testing.assert_allclose(clipped(model, session.run(None, inputs)[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_policy_is_one_graph(case) -> None:
    """A policy compiles to one graph, except where SB3's preprocessing branches on the bounds of a possible image."""
    model, observation, tensors = case
    branches = isinstance(tensors, dict) or tensors.dim() == 4
    compiled = th.compile(model.policy, fullgraph=not branches, backend="eager")
    with th.no_grad():
        actions, _, log_prob = compiled(tensors, deterministic=True)
        th.manual_seed(0)
        drawn = compiled(tensors)
        th.manual_seed(0)
        expected = model.policy(tensors)
    np.testing.assert_allclose(
        clipped(model, actions.numpy()), model.predict(observation, deterministic=True)[0], rtol=1e-5, atol=1e-6
    )
    assert th.isfinite(log_prob).all()
    for ours, theirs in zip(drawn, expected, strict=True):
        th.testing.assert_close(ours, theirs)
