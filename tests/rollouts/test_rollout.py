"""The rollout on the device: the same minibatches as SB3's buffer, the frozen distributions beside them, bounded passes."""

import io
import itertools
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.rollouts import rollout
from sb3_ppo_penalty.rollouts.reward_to_go import IgnoreTimeLimits, RewardToGoRolloutBuffer
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.ranks import ALONE


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
    ours = Transitions.of(model.rollout_buffer)
    np.random.seed(3)
    mine = list(ALONE.minibatches(ours, 20, normalize=False))
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
    actions = Transitions.of(collected("CartPole-v1").rollout_buffer).actions
    assert (actions.dtype, actions.shape) == (th.int64, (48,))


def test_tensors_share_the_buffers_memory_on_the_cpu() -> None:
    model = collected("Pendulum-v1")
    ours = Transitions.of(model.rollout_buffer)
    assert ours.observations.data_ptr() == model.rollout_buffer.observations.ctypes.data


def test_chunks_cover_the_rollout_in_order_and_are_bounded(monkeypatch) -> None:
    model = collected("Pendulum-v1")
    ours = Transitions.of(model.rollout_buffer)
    monkeypatch.setattr(rollout, "CHUNK_BYTES", 3 * 4 * 7)  # seven observations of three floats
    chunks = list(ours.chunks())
    assert [len(chunk.actions) for chunk in chunks] == [7] * 6 + [6]
    assert th.equal(th.cat([chunk.observations for chunk in chunks]), ours.observations)
    monkeypatch.setattr(rollout, "CHUNK_ROWS", 5)
    assert max(len(chunk.actions) for chunk in ours.chunks()) == 5


#: In a process of its own: others' large tensors have the same effect
COUNTS_FAULTS = """
import resource
from stable_baselines3.common.envs import FakeImageEnv
from sb3_ppo_penalty import PPOClip

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

model = PPOClip("CnnPolicy", FakeImageEnv(n_channels=4), n_steps=128, n_epochs=1, device="cpu").learn(1)
for _ in range(3):
    before = faults()
    model.train()
print(faults() - before)
"""


@pytest.mark.slow
def test_the_memory_of_a_minibatch_of_images_is_kept_for_the_next() -> None:
    """The two minibatches of 7 MB, with the activations that follow, would otherwise be 10,000 fresh pages."""
    run = subprocess.run([sys.executable, "-c", COUNTS_FAULTS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 4_000


def test_large_observations_come_one_by_one() -> None:
    big = th.zeros(3, 4, 1024, 1024, dtype=th.uint8)  # 16 MiB each as float32
    column = th.zeros(3)
    chunks = list(Transitions(big, column, column, column, column, column).chunks())
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
    frozen = model._new_update().rollout
    with th.no_grad():
        means = model.policy.get_distribution(frozen.observations).mode()
    th.testing.assert_close(frozen.old.per_state[0], means, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(frozen.old.shared[0] @ frozen.old.shared[0].T, th.tensor([[0.5, 0.1], [0.1, 0.3]]))
    batch = next(ALONE.minibatches(frozen, 8, normalize=False))
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


# Buffers whose minibatches are their own, as SB3 lets them be


class Mirrored(RolloutBuffer):
    """Every minibatch twice, the second time seen in a mirror, and on every second epoch only half of the rollout."""

    epochs = 0

    def get(self, batch_size=None):
        self.epochs += 1
        for number, batch in enumerate(super().get(batch_size)):
            if self.epochs % 2 or number < 2:
                yield batch
                yield batch._replace(observations=-batch.observations)


class Halved(RolloutBuffer):
    """Smaller advantages, from an array of its own that only its ``get`` flattens."""

    def compute_returns_and_advantage(self, last_values, dones) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        self.factors = np.full_like(self.advantages, 0.5)

    def get(self, batch_size=None):
        if not self.generator_ready:
            self.factors = self.swap_and_flatten(self.factors)
        yield from super().get(batch_size)

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=samples.advantages * self.to_torch(self.factors[batch_inds].flatten()))


class Rounded(RolloutBuffer):
    """Numbers of fewer digits on the device."""

    def to_torch(self, array, copy=True):
        return super().to_torch(array, copy).half().float()


class HalvedDicts(Halved, DictRolloutBuffer):
    """The same for observations in dicts."""


class TwoBoxes(gym.Env):
    """Dict observations, continuous actions, an end by a time limit."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Box(-1, 1, (2,))})
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        self.random, self.steps = np.random.default_rng(0 if seed is None else seed), 0
        return self.seen(), {}

    def seen(self):
        return {"a": self.random.random(3, dtype=np.float32), "b": self.random.random(2, dtype=np.float32)}

    def step(self, action):
        self.steps += 1
        return self.seen(), float(self.random.normal()), False, self.steps % 5 == 0, {}


OWN = {
    "get": (Mirrored, "Pendulum-v1"),
    "samples": (Halved, "Pendulum-v1"),
    "tensors": (Rounded, "Pendulum-v1"),
    "Discrete": (Halved, "CartPole-v1"),
    "Dict": (HalvedDicts, TwoBoxes),
    "several environments": (Halved, lambda: DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)),
}


def trained(algorithm, name: str, assigned: bool = False, policy=None, callback=None, **arguments):
    buffer, env = OWN[name]
    policy = policy or (MultiInputActorCriticPolicy if name == "Dict" else ActorCriticPolicy)
    given = {} if assigned else {"rollout_buffer_class": buffer}
    env = env if isinstance(env, str) else env()
    model = algorithm(policy, env, n_steps=48, batch_size=16, n_epochs=3, seed=0, **given, **arguments)
    if assigned:
        known = model.rollout_buffer
        model.rollout_buffer = buffer(
            *(48, model.observation_space, model.action_space, known.device),
            gae_lambda=known.gae_lambda,
            gamma=known.gamma,
            n_envs=known.n_envs,
        )
    return model.learn(96 * model.n_envs, callback=callback)


def assert_same(one, other) -> None:
    for name, tensor in one.policy.state_dict().items():
        assert th.equal(tensor, other.policy.state_dict()[name]), name


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_buffer_with_minibatches_of_its_own_is_asked_for_them_as_by_sb3(name: str, assigned: bool) -> None:
    assert_same(trained(PPO, name, assigned), trained(PPOClip, name, assigned))


def test_method_of_one_buffer_is_asked_too() -> None:
    models = []
    for algorithm in (PPO, PPOClip):
        model = algorithm(ActorCriticPolicy, "Pendulum-v1", n_steps=48, batch_size=16, n_epochs=2, seed=0)
        usual = model.rollout_buffer.get
        model.rollout_buffer.get = lambda batch_size, usual=usual: itertools.islice(usual(batch_size), 2)
        models.append(model.learn(96))
    assert_same(*models)


class Passed(RolloutBuffer):
    """Another ``get`` that gives the same."""

    def get(self, batch_size=None):
        yield from super().get(batch_size)


class PassedDicts(Passed, DictRolloutBuffer):
    """The same for observations in dicts."""


@pytest.mark.parametrize("guard", [None, {"action": "fixup", "max_kl_factor": 0.2}])
@pytest.mark.parametrize(
    ("policy", "env", "arguments"),
    [
        ("MlpPolicy", "Pendulum-v1", {"policy_kwargs": {"covariance": [0.3]}}),
        ("MlpPolicy", "Pendulum-v1", {"policy_kwargs": {"learn_covariance": True}}),
        (ActorCriticPolicy, "Pendulum-v1", {"use_sde": True}),
        ("MlpPolicy", "CartPole-v1", {}),
        (
            "MultiInputPolicy",
            TwoBoxes,
            {"policy_kwargs": {"share_features_extractor": False, "covariance": np.eye(2).tolist()}},
        ),
        ("MultiInputPolicy", TwoBoxes, {"kl_penalty": "new_old"}),
    ],
)
def test_penalty_is_on_the_policy_that_acted(policy, env, arguments, guard) -> None:
    """The old distributions are worked out minibatch by minibatch instead of beforehand, and are the same."""
    models = []
    for own in (False, True):
        buffer = {True: PassedDicts if policy == "MultiInputPolicy" else Passed, False: None}[own]
        made = env if isinstance(env, str) else env()
        common = {"n_steps": 48, "batch_size": 16, "n_epochs": 3, "seed": 0, "kl_coef": 50.0, "learning_rate": 1e-3}
        model = PPOPenalty(policy, made, **common, rollout_buffer_class=buffer, guard=guard, **arguments)
        models.append(model.learn(96))
    for name, tensor in models[0].policy.state_dict().items():
        th.testing.assert_close(models[1].policy.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    figures = [model.logger.name_to_value for model in models]
    for name in ("train/kl", "train/kl_max_state", "train/loss", "train/explained_variance"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-3, abs=1e-6), name


class Normed(nn.Module):
    """Dropout and a batch norm, which acting leaves alone and training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.5)

    def forward(self, values):
        return self.drop(self.norm(values).tanh())


def test_old_distribution_is_the_acting_one_with_dropout_and_batch_norm() -> None:
    model = trained(PPOPenalty, "get", policy="MlpPolicy", policy_kwargs={"activation_fn": Normed}, learning_rate=1e-3)
    assert model.logger.name_to_value["train/kl"] > 0
    update = model._new_update()
    np.random.seed(0)
    sample = next(model.rollout_buffer.get(model.batch_size))
    model.policy.set_training_mode(False)
    with th.no_grad():
        before = model.policy.get_distribution(sample.observations).mode()
        for tensor in (*model.policy.parameters(), *model.policy.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1)
    np.random.seed(0)
    th.testing.assert_close(next(update.sampled()).old.per_state[0], before, rtol=1e-5, atol=1e-6)


def test_without_any_minibatch_it_says_so() -> None:
    class Empty(RolloutBuffer):
        def get(self, batch_size=None):
            return iter(())

    model = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=8, rollout_buffer_class=Empty)
    with pytest.raises(RuntimeError, match="`get` of the rollout buffer gave no minibatch"):
        model.learn(16)


def test_compiled_training_goes_on_eagerly_and_says_why() -> None:
    with pytest.warns(RuntimeWarning, match="`compile=True` has no effect.*the rollout buffer has a `get` of its own"):
        compiled = trained(PPOPenalty, "samples", compile=True)
    for name, tensor in trained(PPOPenalty, "samples").policy.state_dict().items():
        th.testing.assert_close(compiled.policy.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [24, 96])
def test_buffer_of_another_size_than_the_rollout(size: int) -> None:
    """More steps than the buffer holds are SB3's to refuse; fewer leave it without a rollout."""
    model = PPOClip("MlpPolicy", "Pendulum-v1", n_steps=48, batch_size=16)
    model.rollout_buffer = RolloutBuffer(size, model.observation_space, model.action_space, "cpu")
    with pytest.raises(IndexError if size < 48 else RuntimeError, match=r"out of bounds|\(48 of 96 steps\)"):
        model.learn(48)


# Callbacks that change what was collected


class Changing(BaseCallback):
    """Shapes rewards and advantages at the end of a rollout, as users do, in arrays of any kind."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        buffer.advantages = (buffer.advantages - buffer.rewards * 0.1)[::-1]  # strides below 0
        buffer.returns = np.broadcast_to(buffer.returns.mean(), buffer.returns.shape)  # not writable
        buffer.observations = np.asfortranarray(buffer.observations.astype(np.float64)).astype(np.float32)


class HalfWay(BaseCallback):
    """Draws some minibatches itself."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for batch in self.model.rollout_buffer.get(16):
            assert len(batch.actions) == 16
            break


@pytest.mark.parametrize("callback", [Changing, HalfWay])
@pytest.mark.parametrize("environments", [1, 2])
def test_what_a_callback_made_of_the_rollout_is_learned_from(callback: type, environments: int) -> None:
    models = []
    for algorithm in (PPO, PPOClip):
        env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * environments)
        model = algorithm(ActorCriticPolicy, env, n_steps=48, batch_size=16, n_epochs=2, seed=0)
        models.append(model.learn(96 * environments, callback=callback()))
    assert_same(*models)


def test_buffer_keeps_more_than_minibatches_need() -> None:
    """Intrinsic rewards, say: an array more, an argument more, and SB3's own minibatches."""

    class Curious(RolloutBuffer):
        def __init__(self, *args, weight: float, **kwargs) -> None:
            self.weight = weight
            super().__init__(*args, **kwargs)

        def reset(self) -> None:
            super().reset()
            self.intrinsic = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

        def compute_returns_and_advantage(self, last_values, dones) -> None:
            self.intrinsic[:] = np.abs(self.observations[..., 2])
            self.rewards += self.weight * self.intrinsic
            super().compute_returns_and_advantage(last_values, dones)

    given = {"rollout_buffer_class": Curious, "rollout_buffer_kwargs": {"weight": 0.5}}
    models = [
        algorithm(ActorCriticPolicy, "Pendulum-v1", n_steps=48, batch_size=16, n_epochs=2, seed=0, **given).learn(96)
        for algorithm in (PPO, PPOClip)
    ]
    assert_same(*models)
    file = io.BytesIO()
    models[1].save(file)
    loaded = PPOClip.load(file, env=gym.make("Pendulum-v1"))
    assert loaded.rollout_buffer.weight == 0.5
