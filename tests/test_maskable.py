"""Masked actions: never taken, without a part in the divergence, and nothing changes where every action is allowed."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_penalty import PPOPenalty
from sb3_ppo_penalty.maskable import MaskablePPOPenalty

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "seed": 0, "learning_rate": 3e-3, "policy_kwargs": {"net_arch": [16]}}


def env_with(invalid: int) -> gym.Env:
    np.random.seed(0)  # it draws its masks from numpy's global generator
    env = InvalidActionEnvDiscrete(dim=5, n_invalid_actions=invalid)
    env.action_space.seed(0)
    return env


def test_where_every_action_is_allowed_it_is_ppo_penalty() -> None:
    models = [
        algorithm(policy, env_with(0), **SMALL).learn(192)
        for algorithm, policy in ((PPOPenalty, ActorCriticPolicy), (MaskablePPOPenalty, "MlpPolicy"))
    ]
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    figures = [model.logger.name_to_value for model in models]
    assert figures[0]["train/kl"] == pytest.approx(figures[1]["train/kl"], rel=1e-3)
    assert figures[0]["train/kl"] > 1e-4


class Acted(BaseCallback):
    """Keeps what the policy that acted preferred, masks left aside, and what it was allowed and did."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.observations = th.as_tensor(buffer.observations[:, 0])
        self.masks, self.actions = buffer.action_masks[:, 0].astype(bool), buffer.actions[:, 0, 0].astype(int)
        self.logits = self.preferences()

    def preferences(self) -> np.ndarray:
        with th.no_grad():
            return self.model.policy.get_distribution(self.observations).distribution.logits.double().numpy()


def test_masked_actions_have_no_part_in_it() -> None:
    model = MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL)
    model.learn(128, callback=(acted := Acted()))
    assert (acted.masks.sum(axis=1) == 2).all()
    assert acted.masks[np.arange(64), acted.actions].all()
    divergences = []
    for old, new, mask in zip(acted.logits, acted.preferences(), acted.masks, strict=True):
        p, q = (np.exp(logits[mask]) / np.exp(logits[mask]).sum() for logits in (old, new))
        divergences.append((p * np.log(p / q)).sum())
    assert model.logger.name_to_value["train/kl"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert model.logger.name_to_value["train/kl_max_state"] == pytest.approx(max(divergences), rel=1e-3)
    assert np.mean(divergences) > 1e-4


@pytest.mark.parametrize("guard", [None, "rollback"])
@pytest.mark.parametrize("kind", [InvalidActionEnvMultiDiscrete, InvalidActionEnvMultiBinary])
def test_several_actions_at_once(kind, guard, tmp_path) -> None:
    env = (
        kind(dims=[3, 4], n_invalid_actions=2) if kind is InvalidActionEnvMultiDiscrete else kind(dims=4, n_invalid_actions=2)
    )
    model = MaskablePPOPenalty("MlpPolicy", env, **{**SMALL, "learning_rate": 0.1}, guard=guard, target_kl=0.003).learn(128)
    assert (model.logger.name_to_value["train/kl"] > 4 * 0.003) == (guard is None)
    model.save(tmp_path / "model")
    loaded = MaskablePPOPenalty.load(tmp_path / "model", env=env)
    observation, _ = env.reset(seed=0)
    both = [each.predict(observation, deterministic=True, action_masks=env.action_masks())[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*both)
    loaded.learn(64, reset_num_timesteps=False)


def test_learns_and_is_evaluated_with_masks() -> None:
    """The answer is what is observed, one of two allowed actions of five: chance is 50 of 100."""
    env = env_with(3)
    model = MaskablePPOPenalty("MlpPolicy", env, **{**SMALL, "n_steps": 256, "batch_size": 64}).learn(2048)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=3, warn=False)
    assert mean > 95


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(ValueError, match="action space` must be Discrete, MultiDiscrete or MultiBinary"):
        MaskablePPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL)
    with pytest.raises(ValueError, match="gSDE"):
        MaskablePPOPenalty("MlpPolicy", env_with(0), **SMALL, use_sde=True)
