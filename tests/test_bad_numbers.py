"""A loss or a gradient that is not finite stops training before the optimizer steps, and the policy can still be saved."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_ppo_penalty import PPOClip, PPOPenalty

SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}


class Rewards(gym.RewardWrapper):
    """Pendulum that goes wrong after its first 40 steps."""

    def __init__(self, value: float) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.value, self.steps = value, 0

    def reward(self, reward):
        self.steps += 1
        return self.value if self.steps > 40 else float(reward)


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite(algorithm, value: float, tmp_path) -> None:
    model = algorithm("MlpPolicy", Rewards(value), **SMALL)
    model.learn(32)
    good = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match=r"rollout \['rewards'.*The update was undone"),
    ):
        model.learn(32, reset_num_timesteps=False)
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, good[name]), name
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    observation = np.array([1.0, 0.0, 0.0], dtype=np.float32)
    actions = [each.predict(observation, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*actions)
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_gradient_that_is_not_finite_names_the_weights(algorithm) -> None:
    """The loss is finite, one gradient is not: as a layer with an unstable derivative gives it."""

    class Unstable(th.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * th.nan

    model = algorithm("MlpPolicy", "Pendulum-v1", **SMALL)
    model.learn(32)
    good = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.policy.value_net.register_forward_hook(lambda module, inputs, output: Unstable.apply(output))
    with pytest.raises(FloatingPointError, match=r"loss all finite, gradients \['mlp_extractor.value_net"):
        model.learn(32, reset_num_timesteps=False)
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, good[name]), name


def test_weights_that_are_not_finite_do_not_act() -> None:
    """SB3's Gaussian refuses a mean that is not finite; so does the one with the fixed covariance."""
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL)
    with th.no_grad():
        model.policy.action_net.bias.fill_(th.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(32)


def test_the_coefficient_is_untouched_by_a_failed_update() -> None:
    model = PPOPenalty("MlpPolicy", Rewards(np.nan), **SMALL)
    model.learn(32)
    kl_coef = model.kl_coef
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError):
        model.learn(32, reset_num_timesteps=False)
    assert model.kl_coef == kl_coef
