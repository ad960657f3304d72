"""Masked actions: never taken, without a part in the divergence, and nothing changes where every action is allowed."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy, MaskableMultiInputActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_penalty import (
    PPOClip,
    PPOPenalty,
    ResumableCheckpointCallback,
    RewardToGoRolloutBuffer,
    latest_checkpoint,
    resume,
)
from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty
from sb3_ppo_penalty.rollouts.reward_to_go import RewardToGoMixin

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


class Doubled(MaskableActorCriticPolicy):
    """Somebody's own: other logits, and everything else inherited."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor):
        return self.action_dist.proba_distribution(action_logits=2 * self.action_net(latent_pi))


@pytest.mark.parametrize("policy", ["MlpPolicy", MaskableActorCriticPolicy, Doubled])
def test_masked_actions_have_no_part_in_it(policy) -> None:
    model = MaskablePPOPenalty(policy, env_with(3), **SMALL)
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


# In the place of sb3-contrib's MaskablePPO


class InDict(gym.ObservationWrapper):
    """The observation as one of two."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict({"seen": env.observation_space, "<nothing>": spaces.Box(-1, 1, (2,))})

    def observation(self, observation):
        return {"seen": observation, "<nothing>": np.zeros(2, np.float32)}

    def action_masks(self) -> list[bool]:
        return self.env.action_masks()


def test_names_and_arguments_are_those_of_sb3_contrib() -> None:
    assert MaskablePPOPenalty.policy_aliases == MaskablePPO.policy_aliases
    for name in ("learn", "predict", "collect_rollouts"):
        ours, theirs = (list(inspect.signature(getattr(each, name)).parameters) for each in (MaskablePPOPenalty, MaskablePPO))
        assert ours == theirs, name
    assert set(inspect.signature(MaskablePPO).parameters) <= set(inspect.signature(MaskablePPOPenalty).parameters)


@pytest.mark.parametrize("policy", [MaskableActorCriticPolicy, Doubled, MaskableMultiInputActorCriticPolicy])
def test_any_maskable_policy_is_trained_saved_and_loaded(policy: type, tmp_path) -> None:
    env = InDict(env_with(3)) if policy is MaskableMultiInputActorCriticPolicy else env_with(3)
    guard = {"action": "fixup", "max_kl_factor": 2.0}
    model = MaskablePPOPenalty(policy, env, **{**SMALL, "learning_rate": 0.1}, guard=guard, target_kl=0.01).learn(64)
    assert type(model.policy) is model.policy_class is policy
    assert model.logger.name_to_value["train/guard_acted"] == 1
    model.save(tmp_path / "model")
    loaded = MaskablePPOPenalty.load(tmp_path / "model", env=env)
    assert type(loaded.policy) is loaded.policy_class is policy
    passed = {"policy": policy} if policy is Doubled else {}
    safe = MaskablePPOPenalty.load_safe(tmp_path / "model", env, **passed)
    for each in (loaded, safe):
        assert all(th.equal(tensor, model.policy.state_dict()[name]) for name, tensor in each.policy.state_dict().items())
        each.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("loader", ["load", "load_safe"])
@pytest.mark.parametrize("batch_size", [32, None])
def test_file_of_maskable_ppo(loader: str, batch_size: int | None, tmp_path) -> None:
    env = env_with(3)
    stock = MaskablePPO("MlpPolicy", env, **{**SMALL, "batch_size": batch_size}).learn(64)
    stock.save(tmp_path / "stock")
    model = getattr(MaskablePPOPenalty, loader)(tmp_path / "stock", env=env, device="cpu", clip_range=None)
    for name, tensor in stock.policy.state_dict().items():
        assert th.equal(tensor, model.policy.state_dict()[name])
    assert (model.num_timesteps, model.batch_size) == (64, batch_size or 64)
    model.learn(64, reset_num_timesteps=False)
    # and back
    stock.set_parameters(model.get_parameters())
    mask = np.array([False, True, False, True, False])
    actions = [each.predict(2, action_masks=mask, deterministic=True)[0] for each in (stock, model)]
    assert actions[0] == actions[1] in (1, 3)


def test_without_masking_it_is_ppo_penalty_and_asks_for_no_masks() -> None:
    class Unmasked(gym.Wrapper):
        """Has no ``action_masks``."""

    models = []
    for algorithm, policy, told in (
        (PPOPenalty, ActorCriticPolicy, {}),
        (MaskablePPOPenalty, "MlpPolicy", {"use_masking": False}),
    ):
        env = env_with(0).unwrapped
        inner = gym.wrappers.TransformObservation(env, lambda seen: seen, env.observation_space)
        models.append(algorithm(policy, Unmasked(inner), **SMALL).learn(128, **told))
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_masking_any_action_is_taken_until_learn_is_told_otherwise() -> None:
    class Forbidden(BaseCallback):
        def _on_training_start(self) -> None:
            self.count = 0

        def _on_step(self) -> bool:
            masks = np.stack(self.training_env.env_method("action_masks")) if self.n_calls > 1 else None
            self.count += masks is not None and not self.before[self.locals["actions"].item()]
            self.before = masks[0] if masks is not None else np.ones(5, bool)
            return True

    model = MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL)
    model.learn(64, callback=(free := Forbidden()), use_masking=False)
    assert free.count > 10
    assert (model.rollout_buffer.action_masks == 1).all()
    model.learn(64, callback=(bound := Forbidden()))
    assert bound.count == 0
    assert (model.rollout_buffer.action_masks.sum(axis=-1) == 2).all()


def test_evaluated_by_the_callback_of_sb3_contrib(tmp_path) -> None:
    callback = MaskableEvalCallback(env_with(3), n_eval_episodes=2, eval_freq=64, log_path=tmp_path, warn=False, verbose=0)
    MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL).learn(128, callback=callback)
    assert len(callback.evaluations_results) == 2


def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path) -> None:
    class OwnNoise(gym.Wrapper):
        """The environment draws from numpy's global generator, which checkpoints restore."""

        def action_masks(self):
            return self.env.action_masks()

    def training(callback):
        return MaskablePPOPenalty("MlpPolicy", OwnNoise(env_with(3)), **SMALL).learn(192, callback=callback)

    whole = training(ResumableCheckpointCallback(64, tmp_path, keep=None))
    path = tmp_path / "rl_model_128_steps.zip"
    assert latest_checkpoint(tmp_path) is not None
    callback = ResumableCheckpointCallback(64, tmp_path / "again")
    model, remaining = resume(path, OwnNoise(env_with(3)), callback)
    model.learn(remaining, callback=callback, reset_num_timesteps=False)
    for name, tensor in whole.policy.state_dict().items():
        assert th.equal(tensor, model.policy.state_dict()[name])
    assert MaskablePPOPenalty.load_safe(path, env_with(3)).num_timesteps == 128


class AsksBuffer(BaseCallback):
    """Looks at the rollout through the buffer's own ``get``, at its end and before the next."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = []

    def _on_step(self) -> bool:
        return True

    def look(self) -> None:
        state = np.random.get_state()
        self.samples.append(next(self.model.rollout_buffer.get(8)))
        np.random.set_state(state)

    def _on_rollout_end(self) -> None:
        self.look()

    def _on_training_end(self) -> None:
        self.look()


@pytest.mark.parametrize("wrapper", [lambda env: env, InDict])
def test_callback_that_asks_the_buffer_changes_nothing(wrapper) -> None:
    policy = "MultiInputPolicy" if wrapper is InDict else "MlpPolicy"
    plain, watched, after = (
        MaskablePPOPenalty(policy, wrapper(env_with(3)), **SMALL).learn(128, callback=callback)
        for callback in (None, AsksBuffer(), None)
    )
    for name, tensor in plain.policy.state_dict().items():
        assert th.equal(tensor, watched.policy.state_dict()[name])
    np.testing.assert_array_equal(plain.rollout_buffer.action_masks, watched.rollout_buffer.action_masks)
    masks = next(after.rollout_buffer.get(8)).action_masks  # after our own update
    assert (masks.shape, masks.sum(dim=1).tolist()) == ((8, 5), [2.0] * 8)


def test_rewards_to_go_without_bootstrapping_where_actions_are_masked() -> None:
    class RewardToGo(RewardToGoMixin, MaskableRolloutBuffer):
        """Somebody's own."""

    class Shortened(gym.wrappers.TimeLimit):
        def action_masks(self):
            return self.env.action_masks()

    model = MaskablePPOPenalty("MlpPolicy", Shortened(env_with(3), 4), **SMALL, rollout_buffer_class=RewardToGo).learn(64)
    assert set(np.unique(model.rollout_buffer.rewards)) <= {0.0, 1.0}  # a bootstrapped one would hold a prediction


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
@pytest.mark.parametrize("policy", [MaskableActorCriticPolicy, RecurrentActorCriticPolicy, RewardToGoRolloutBuffer])
def test_policies_that_want_more_than_observations_are_refused(algorithm, policy) -> None:
    with pytest.raises(ValueError, match=r"`policy` must be a policy for PPO .*MaskablePPOPenalty"):
        algorithm(policy, "CartPole-v1", n_steps=32, batch_size=16)


def test_policies_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="`policy` must be a MaskableActorCriticPolicy"):
        MaskablePPOPenalty(ActorCriticPolicy, env_with(0), **SMALL)


class Tempered(MaskableRolloutBuffer):
    """Somebody's own: half the advantages."""

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=0.5 * samples.advantages)


@pytest.mark.parametrize("assigned", [False, True])
def test_buffer_with_minibatches_of_its_own(assigned: bool) -> None:
    """Normalised advantages do not tell that they were halved: what is left is another way to the same minibatches."""
    models = []
    for own in (False, True):
        buffer = Tempered if own and not assigned else None
        model = MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL, kl_coef=20.0, rollout_buffer_class=buffer)
        if own and assigned:
            known = model.rollout_buffer
            shape = {"gae_lambda": known.gae_lambda, "gamma": known.gamma}
            model.rollout_buffer = Tempered(64, model.observation_space, model.action_space, known.device, **shape)
        models.append(model.learn(128))
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    figures = [model.logger.name_to_value["train/kl"] for model in models]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    halved = MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL, normalize_advantage=False, rollout_buffer_class=Tempered)
    whole = MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL, normalize_advantage=False)
    weights = [next(model.learn(64).policy.parameters()) for model in (halved, whole)]
    assert not th.allclose(*weights, rtol=1e-3)


def test_buffers_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="`rollout_buffer_class` must be a MaskableRolloutBuffer or MaskableDict"):
        MaskablePPOPenalty("MlpPolicy", env_with(3), **SMALL, rollout_buffer_class=RewardToGoRolloutBuffer)
