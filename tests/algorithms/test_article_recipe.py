"""One whole update of the article's recipe against its equations, written here in plain torch and numpy."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_ppo_penalty import ARTICLE_RECIPE, PPOClip, RewardToGoDictRolloutBuffer, RewardToGoRolloutBuffer

GAMMA, CLIP, LEARNING_RATE, UPDATES = 0.99, 0.2, 3e-4, 10


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def copy_weights(target: nn.Sequential, body: nn.Module, head: nn.Module) -> None:
    sources = [layer for layer in body if isinstance(layer, nn.Linear)] + [head]
    for layer, source in zip([layer for layer in target if isinstance(layer, nn.Linear)], sources, strict=True):
        layer.load_state_dict(source.state_dict())


def article_update(actor, critic, episodes) -> None:
    """Section 5: rewards-to-go, normalised advantages, ten full-batch steps of two Adams, clipped surrogate and MSE."""
    covariance = 0.5 * th.eye(1)
    observations = th.tensor(np.concatenate([episode["obs"] for episode in episodes]), dtype=th.float)
    actions = th.tensor(np.concatenate([episode["actions"] for episode in episodes]), dtype=th.float)
    to_go = []
    for episode in episodes:
        total, backwards = 0.0, []
        for reward in reversed(episode["rewards"]):
            total = reward + GAMMA * total
            backwards.append(total)
        to_go.extend(reversed(backwards))
    returns = th.tensor(to_go, dtype=th.float)

    def log_probabilities() -> th.Tensor:
        return th.distributions.MultivariateNormal(actor(observations), covariance).log_prob(actions)

    with th.no_grad():
        old = log_probabilities()
        advantages = returns - critic(observations).squeeze()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-10)
    actor_optimizer = th.optim.Adam(actor.parameters(), lr=LEARNING_RATE)
    critic_optimizer = th.optim.Adam(critic.parameters(), lr=LEARNING_RATE)
    for _ in range(UPDATES):
        ratios = (log_probabilities() - old).exp()
        actor_loss = -th.minimum(ratios * advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        critic_loss = ((critic(observations).squeeze() - returns) ** 2).mean()
        for optimizer, loss in ((actor_optimizer, actor_loss), (critic_optimizer, critic_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Recorder(gym.Wrapper):
    """Keeps what the environment itself saw and gave, episode by episode, in float64."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.episodes: list[dict[str, list]] = []

    def reset(self, **kwargs):
        self.last, info = self.env.reset(**kwargs)
        self.episodes.append({"obs": [], "actions": [], "rewards": []})
        return self.last, info

    def step(self, action):
        self.episodes[-1]["obs"].append(self.last)
        self.last, reward, terminated, truncated, info = self.env.step(action)
        self.episodes[-1]["rewards"].append(float(reward))
        return self.last, reward, terminated, truncated, info


def test_one_update_is_the_articles() -> None:
    env = Recorder()
    model = PPOClip("MlpPolicy", env, seed=5, **ARTICLE_RECIPE)
    actor, critic = network(1), network(1)
    copy_weights(actor, model.policy.mlp_extractor.policy_net, model.policy.action_net)
    copy_weights(critic, model.policy.mlp_extractor.value_net, model.policy.value_net)
    before = th.cat([parameter.flatten().clone() for parameter in actor.parameters()])
    model.learn(2200)
    episodes = env.episodes[:11]
    assert [len(episode["rewards"]) for episode in episodes] == [200] * 11
    # Actions before SB3 clips them to the environment's bounds: only the buffer has them
    for number, episode in enumerate(episodes):
        episode["actions"] = model.rollout_buffer.actions[200 * number : 200 * (number + 1)]
    article_update(actor, critic, episodes)
    after = th.cat([parameter.flatten() for parameter in actor.parameters()])
    assert (after - before).abs().max() > 1e-4  # the update moved the weights by far more than the tolerance
    for ours, layers in ((actor, "policy_net"), (critic, "value_net")):
        expected = network(1)
        head = model.policy.action_net if layers == "policy_net" else model.policy.value_net
        copy_weights(expected, getattr(model.policy.mlp_extractor, layers), head)
        for theirs, own in zip(expected.parameters(), ours.parameters(), strict=True):
            th.testing.assert_close(theirs, own, rtol=1e-6, atol=1e-6)


def filled_buffer(rewards, starts, values, gamma: float, n_envs: int = 1) -> RewardToGoRolloutBuffer:
    steps = len(rewards)
    space = gym.spaces.Box(-1, 1, (2,))
    buffer = RewardToGoRolloutBuffer(steps, space, space, device="cpu", gamma=gamma, n_envs=n_envs)
    for step in range(steps):
        shape = (n_envs, 2)
        buffer.add(
            np.zeros(shape),
            np.zeros(shape),
            np.asarray(rewards[step]).reshape(n_envs),
            np.asarray(starts[step]).reshape(n_envs),
            th.as_tensor(values[step], dtype=th.float).reshape(n_envs, 1),
            th.zeros(n_envs),
        )
    return buffer


def test_rewards_to_go_by_hand() -> None:
    """Two episodes of 2 and 3 steps, gamma 1/2; the second is cut by the batch, and the last value (100) is not used."""
    buffer = filled_buffer([1, 2, 4, 8, 16], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], gamma=0.5)
    buffer.compute_returns_and_advantage(th.full((1, 1), 100.0), np.array([False]))
    # 1 + 2/2, 2 | 4 + 8/2 + 16/4, 8 + 16/2, 16
    np.testing.assert_array_equal(buffer.returns[:, 0], [2, 2, 12, 16, 16])


def test_rewards_to_go_of_several_environments_do_not_mix() -> None:
    rewards, starts = [[1, 10], [1, 10], [1, 10]], [[1, 1], [0, 1], [0, 0]]
    buffer = filled_buffer(rewards, starts, [[0, 0]] * 3, gamma=1.0, n_envs=2)
    buffer.compute_returns_and_advantage(th.zeros(2, 1), np.array([False, False]))
    np.testing.assert_array_equal(buffer.returns, [[3, 10], [2, 20], [1, 10]])


def test_advantages_are_normalised_once_over_the_whole_batch() -> None:
    """Returns 3, 2, 1 minus values 0, 0, 2: 3, 2, -1, mean 4/3, sample variance 13/3."""
    buffer = filled_buffer([1, 1, 1], [1, 0, 0], [0, 0, 2], gamma=1.0)
    buffer.compute_returns_and_advantage(th.zeros(1, 1), np.array([True]))
    expected = (np.array([3, 2, -1]) - 4 / 3) / np.sqrt(13 / 3)
    np.testing.assert_allclose(buffer.advantages[:, 0], expected, rtol=1e-6)


def test_time_limits_are_not_bootstrapped() -> None:
    """Rewards in the buffer are the environment's own, also at step 200, where SB3 would add gamma * V."""
    env = Recorder()
    model = PPOClip("MlpPolicy", env, seed=0, **{**ARTICLE_RECIPE, "n_steps": 400, "batch_size": 400, "n_epochs": 1})
    with th.no_grad():
        model.policy.value_net.bias.fill_(1000.0)  # so that a bootstrapped reward could not be missed
    model.learn(400)
    rewards = np.concatenate([episode["rewards"] for episode in env.episodes[:2]])
    np.testing.assert_allclose(model.rollout_buffer.rewards[:, 0], rewards, rtol=1e-6)
    stock = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=200, batch_size=200, n_epochs=1)
    with th.no_grad():
        stock.policy.value_net.bias.fill_(1000.0)
    stock.learn(200)
    assert stock.rollout_buffer.rewards[-1, 0] > 900  # what is left out above is there without the recipe


def test_dict_observations_have_the_buffer_too() -> None:
    from stable_baselines3.common.envs import SimpleMultiObsEnv

    model = PPOClip(
        "MultiInputPolicy",
        SimpleMultiObsEnv(),
        n_steps=32,
        batch_size=32,
        n_epochs=1,
        gamma=0.9,
        normalize_advantage=False,
        rollout_buffer_class=RewardToGoDictRolloutBuffer,
    )
    model.learn(32)
    buffer = model.rollout_buffer
    last = buffer.returns.reshape(-1)[-1]
    assert last == pytest.approx(buffer.rewards[-1, 0])
    assert buffer.advantages.mean() == pytest.approx(0, abs=1e-6)
    assert buffer.advantages.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_recipe_can_be_printed_and_passed() -> None:
    assert "RewardToGoRolloutBuffer" in repr(ARTICLE_RECIPE)
    model = PPOClip("MlpPolicy", "Pendulum-v1", **ARTICLE_RECIPE)
    assert model.policy.covariance.tolist() == [0.5]
    assert model.max_grad_norm == float("inf")
