"""The rollout on the device: the same minibatches as SB3's buffer, the frozen distributions beside them, bounded passes."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_penalty import PPOClip, PPOPenalty, rollout
from sb3_ppo_penalty.rollout import IgnoreTimeLimits, RewardToGoRolloutBuffer, Rollout


def collected(env, policy: str = "MlpPolicy", n_steps: int = 48) -> PPOClip:
    """A model whose buffer holds a rollout that nothing has consumed."""
    model = PPOClip(policy, env, n_steps=n_steps, batch_size=8, n_epochs=1, seed=0)
    _, callback = model._setup_learn(n_steps)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
    return model


ENVIRONMENTS = {
    "Box": ("Pendulum-v1", "MlpPolicy"),
    "Discrete": ("CartPole-v1", "MlpPolicy"),
    "float64 (MuJoCo)": ("InvertedPendulum-v5", "MlpPolicy"),
    "Dict": (SimpleMultiObsEnv, "MultiInputPolicy"),
    "two environments": (lambda: DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), "MlpPolicy"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_minibatches_are_those_of_sb3(name: str) -> None:
    env, policy = ENVIRONMENTS[name]
    model = collected(env if isinstance(env, str) else env(), policy)
    ours = Rollout.of(model.rollout_buffer)
    np.random.seed(3)
    mine = list(ours.minibatches(20))
    np.random.seed(3)
    stock = list(model.rollout_buffer.get(20))
    assert [len(batch.actions) for batch in mine] == [len(batch.actions) for batch in stock]
    for batch, expected in zip(mine, stock, strict=True):
        if isinstance(batch.observations, dict):
            for key, tensor in batch.observations.items():
                assert th.equal(tensor, expected.observations[key])
        else:
            assert th.equal(batch.observations, expected.observations)
            assert batch.observations.dtype == expected.observations.dtype
        assert th.equal(batch.actions.flatten().float(), expected.actions.flatten())
        for field in ("old_values", "old_log_prob", "advantages", "returns"):
            assert th.equal(getattr(batch, field), getattr(expected, field)), field


def test_discrete_actions_are_whole_numbers_in_one_column() -> None:
    actions = Rollout.of(collected("CartPole-v1").rollout_buffer).actions
    assert (actions.dtype, actions.shape) == (th.int64, (48,))


def test_tensors_share_the_buffers_memory_on_the_cpu() -> None:
    model = collected("Pendulum-v1")
    ours = Rollout.of(model.rollout_buffer)
    assert ours.observations.data_ptr() == model.rollout_buffer.observations.ctypes.data


def test_chunks_cover_the_rollout_in_order_and_are_bounded(monkeypatch) -> None:
    model = collected("Pendulum-v1")
    ours = Rollout.of(model.rollout_buffer)
    monkeypatch.setattr(rollout, "CHUNK_BYTES", 3 * 4 * 7)  # seven observations of three floats
    chunks = list(ours.chunks())
    assert [len(chunk.actions) for chunk in chunks] == [7] * 6 + [6]
    assert th.equal(th.cat([chunk.observations for chunk in chunks]), ours.observations)
    monkeypatch.setattr(rollout, "CHUNK_ROWS", 5)
    assert max(len(chunk.actions) for chunk in ours.chunks()) == 5


def test_large_observations_come_one_by_one() -> None:
    big = th.zeros(3, 4, 1024, 1024, dtype=th.uint8)  # 16 MiB each as float32
    column = th.zeros(3)
    chunks = list(Rollout(big, column, column, column, column, column).chunks())
    assert [len(chunk.actions) for chunk in chunks] == [1, 1, 1]
    assert chunks[0].observations.dtype == th.uint8


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_old_distribution_does_not_depend_on_the_chunks(rows: int, monkeypatch) -> None:
    """A rollout of 48 in chunks of 1, of 7 (the last one ragged) and in one piece, with a full covariance."""
    env = gym.make("Reacher-v5")
    model = PPOPenalty("MlpPolicy", env, n_steps=48, batch_size=8, policy_kwargs={"covariance": [[0.5, 0.1], [0.1, 0.3]]})
    _, callback = model._setup_learn(48)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 48)
    monkeypatch.setattr(rollout, "CHUNK_ROWS", rows)
    frozen = model._freeze_rollout()
    with th.no_grad():
        means = model.policy.get_distribution(frozen.observations).mode()
    th.testing.assert_close(frozen.old.per_state[0], means, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(frozen.old.shared[0] @ frozen.old.shared[0].T, th.tensor([[0.5, 0.1], [0.1, 0.3]]))
    batch = next(iter(frozen.minibatches(8)))
    with th.no_grad():
        again = model.policy.get_distribution(batch.observations).mode()
    th.testing.assert_close(batch.old.per_state[0], again, rtol=1e-5, atol=1e-6)


def test_hidden_time_limits_change_nothing_else() -> None:
    made = [DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=1)]) for _ in range(2)]
    for env in made:
        env.seed(3)
    plain, hidden = made[0], IgnoreTimeLimits(made[1])
    np.testing.assert_array_equal(plain.reset(), hidden.reset())
    action = np.zeros((1, 1), dtype=np.float32)
    *expected, (info,) = plain.step(action)
    *seen, (other,) = hidden.step(action)
    for left, right in zip(expected, seen, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (info["TimeLimit.truncated"], other["TimeLimit.truncated"]) == (True, False)


def test_one_reward_to_go_is_not_normalised() -> None:
    box = spaces.Box(-1, 1, (1,))
    buffer = RewardToGoRolloutBuffer(1, box, box, device="cpu")
    buffer.add(np.zeros(1), np.zeros(1), np.array([3.0]), np.array([1.0]), th.tensor([0.5]), th.zeros(1))
    buffer.compute_returns_and_advantage(th.zeros(1), np.array([False]))
    assert (buffer.returns.item(), buffer.advantages.item()) == (3.0, 2.5)


def test_train_without_a_rollout_says_so() -> None:
    model = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=8)
    model._setup_learn(16)
    with pytest.raises(RuntimeError, match="no full rollout"):
        model.train()


def test_buffer_with_samples_of_its_own_is_refused() -> None:
    class Augmented(RolloutBuffer):
        def _get_samples(self, batch_inds, env=None):
            return super()._get_samples(batch_inds, env)

    with pytest.raises(ValueError, match="rollout_buffer_class"):
        PPOClip("MlpPolicy", "Pendulum-v1", rollout_buffer_class=Augmented)
