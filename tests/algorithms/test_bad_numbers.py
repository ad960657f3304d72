"""Numbers that are not finite, too large or too small: one clear error and the last good policy, or what stock PPO does."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, Sound
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_penalty import PPOClip, PPOPenalty

SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}
BOTH = pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
#: Every action distribution: the fixed Gaussian, SB3's learned one, gSDE, and the three that are not continuous
KINDS = {
    "fixed": ("MlpPolicy", BOX, {}),
    "learned": (ActorCriticPolicy, BOX, {}),
    "gSDE": ("MlpPolicy", BOX, {"use_sde": True}),
    "Discrete": ("MlpPolicy", spaces.Discrete(3), {}),
    "MultiDiscrete": ("MlpPolicy", spaces.MultiDiscrete([2, 3]), {}),
    "MultiBinary": ("MlpPolicy", spaces.MultiBinary(2), {}),
}


class Faulty(gym.Wrapper):
    """An environment whose rewards or observations are no good from a step on."""

    def __init__(self, env: gym.Env, reward: float | None = None, sight: float | None = None, since: int = 41) -> None:
        super().__init__(env)
        self.replacement, self.sight, self.since, self.steps = reward, sight, since, 0

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.steps += 1
        if self.steps >= self.since:
            reward = reward if self.replacement is None else self.replacement
            if self.sight is not None:
                observation = np.array([*observation[:-1], self.sight], dtype=np.float32)
        return observation, reward, *rest


def state(model) -> dict:
    """The weights, and the moments of Adam, by name."""
    tensors = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    for index, moments in model.policy.optimizer.state_dict()["state"].items():
        tensors.update({f"{index} {name}": th.as_tensor(tensor).clone() for name, tensor in moments.items()})
    return {**tensors, "n_updates": th.tensor(model._n_updates)}


def assert_intact(model, good: dict, tmp_path) -> None:
    """The policy is the last good one, can be saved, and goes on learning where the numbers are sound."""
    now = state(model)
    assert now.keys() == good.keys()
    for name, tensor in now.items():
        assert th.equal(tensor, good[name]), name
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=Sound(model.action_space))
    observation = np.array([0.1, -0.2, 0.3], dtype=np.float32)
    actions = [each.predict(observation, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*actions)
    loaded.learn(32, reset_num_timesteps=False)
    later = state(loaded)
    assert all(th.isfinite(tensor).all() for tensor in later.values())
    assert any(not th.equal(tensor, good[name]) for name, tensor in later.items() if name != "n_updates")


def assert_same_policy(models) -> None:
    stock, ours = (model.policy.state_dict() for model in models)
    for name, tensor in ours.items():
        assert th.isfinite(tensor).all(), name
        assert th.equal(tensor, stock[name]), name


# --- rewards


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_rewards_that_are_not_finite(algorithm, kind: str, value: float, tmp_path) -> None:
    """The first minibatch spoils the weights; torch's distributions refuse them at the second, before anybody looks."""
    policy, action_space, options = KINDS[kind]
    model = algorithm(policy, Faulty(Sound(action_space), reward=value), **SMALL, **options)
    model.learn(32)
    good = state(model)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match=r"rollout \['rewards'.*The update was undone"),
    ):
        model.learn(32, reset_num_timesteps=False)
    assert_intact(model, good, tmp_path)


def test_stock_ppo_loses_its_policy_where_this_package_keeps_it() -> None:
    model = PPO("MlpPolicy", Faulty(Sound(), reward=np.nan), **SMALL)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="loc"):
        model.learn(64)
    assert model.policy.log_std.isnan().all()


@BOTH
@pytest.mark.parametrize("value", [1e30, -1e30])
def test_rewards_whose_square_is_too_large(algorithm, value: float, tmp_path) -> None:
    model = algorithm("MlpPolicy", Faulty(Sound(), reward=value), **SMALL)
    model.learn(32)
    good = state(model)
    message = (
        r"loss \['loss', 'value'\].*rollout all finite \(returns reach .*e\+30, .*too large for float32: scale the rewards"
    )
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=message):
        model.learn(32, reset_num_timesteps=False)
    assert_intact(model, good, tmp_path)


@BOTH
@pytest.mark.parametrize("value", [1e38, 1e39])
def test_rewards_whose_sum_is_too_large(algorithm, value: float, tmp_path) -> None:
    """1e39 is infinite in float32; of 1e38 the returns are."""
    model = algorithm("MlpPolicy", Faulty(Sound(), reward=value), **SMALL)
    model.learn(32)
    good = state(model)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"rollout \[.*'returns', 'advantages'\]\. "):
        model.learn(32, reset_num_timesteps=False)
    assert_intact(model, good, tmp_path)


@pytest.mark.parametrize("value", [1e-30, 1e-45, 1e-300, 1e15])
def test_rewards_that_stock_ppo_can_learn_from(value: float) -> None:
    models = [each(ActorCriticPolicy, Faulty(Sound(), reward=value), **SMALL).learn(128) for each in (PPO, PPOClip)]
    assert_same_policy(models)
    model = PPOPenalty("MlpPolicy", Faulty(Sound(), reward=value), **SMALL).learn(128)
    assert math.isfinite(model.logger.name_to_value["train/kl"])


@BOTH
def test_the_coefficient_is_untouched_by_a_failed_update(algorithm) -> None:
    model = algorithm("MlpPolicy", Faulty(Sound(), reward=np.nan), **SMALL)
    model.learn(32)
    kl_coef = getattr(model, "kl_coef", None)
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError):
        model.learn(32, reset_num_timesteps=False)
    assert getattr(model, "kl_coef", None) == kl_coef


# --- observations and actions


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_observations_that_are_no_numbers(algorithm, kind: str, tmp_path) -> None:
    """An error of the kind that stock PPO gives, before the environment sees an action."""
    policy, action_space, options = KINDS[kind]
    errors = []
    for each in (PPO, algorithm):
        model = each(policy, Faulty(Sound(action_space), sight=np.nan), **SMALL, **options)
        model.learn(32)
        good = state(model)
        with pytest.raises(ValueError, match=r"Expected parameter|mean action is not finite") as error:
            model.learn(32, reset_num_timesteps=False)
        errors.append(error.type)
        assert model.env.envs[0].unwrapped.steps == 41
    assert errors[0] is errors[1]
    assert_intact(model, good, tmp_path)


@BOTH
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_one_observation_that_is_infinite(algorithm, value: float, tmp_path) -> None:
    """tanh hides it from the action, not from the gradient; stock PPO ends with weights that are no numbers."""
    model = algorithm("MlpPolicy", Faulty(Sound(), sight=value), **SMALL)
    model.learn(32)
    good = state(model)
    with pytest.raises(
        FloatingPointError, match=r"gradients \['mlp_extractor.*rollout \['observations'\]\. The update was undone"
    ):
        model.learn(32, reset_num_timesteps=False)
    assert_intact(model, good, tmp_path)


class Named(gym.ObservationWrapper):
    """The observation under a name."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict({"speed": env.observation_space})

    def observation(self, observation):
        return {"speed": observation}


def test_which_of_several_observations_is_infinite() -> None:
    model = PPOPenalty("MultiInputPolicy", Named(Faulty(Sound(), sight=np.inf)), **SMALL)
    with pytest.raises(FloatingPointError, match=r"rollout \['speed'\]\. The update was undone"):
        model.learn(64)


@BOTH
def test_the_last_observation_is_not_finite(algorithm, tmp_path) -> None:
    """No action follows it; the critic's estimate of what would have followed is in the targets all the same."""
    model = algorithm("MlpPolicy", Faulty(gym.make("Pendulum-v1"), sight=np.nan, since=64), **SMALL)
    model.learn(32)
    good = state(model)
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match=r"rollout \['returns', 'advantages'\]"):
        model.learn(32, reset_num_timesteps=False)
    assert all(th.equal(tensor, good[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("value", [1e30, -3e38])
def test_large_observations_are_stock_ppos_matter(value: float) -> None:
    """They saturate tanh; no more than that."""
    models = [each(ActorCriticPolicy, Faulty(Sound(), sight=value), **SMALL).learn(96) for each in (PPO, PPOClip)]
    assert_same_policy(models)


@BOTH
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_no_action_is_predicted_from_nothing(algorithm, policy, deterministic: bool) -> None:
    model = algorithm(policy, Sound(), **SMALL)
    observation = np.array([0.0, np.nan, 0.0], dtype=np.float32)
    with pytest.raises(ValueError, match=r"loc|not finite"):
        model.predict(observation, deterministic=deterministic)


def test_weights_that_are_not_finite_do_not_act() -> None:
    """SB3's Gaussian refuses a mean that is not finite; so does the one with the fixed covariance."""
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL)
    with th.no_grad():
        model.policy.action_net.bias.fill_(th.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(32)


# --- advantages


class Advantages(RolloutBuffer):
    """A buffer with its own idea of some advantages."""

    def __init__(self, *args, value: float, count: int, **kwargs) -> None:
        self.value, self.count = value, count
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values, dones) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages[-self.count :] = self.value


def with_advantages(value: float, count: int) -> dict:
    return {"rollout_buffer_class": Advantages, "rollout_buffer_kwargs": {"value": value, "count": count}}


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_advantage_that_is_not_finite(algorithm, value: float) -> None:
    model = algorithm(ActorCriticPolicy, Sound(), **SMALL, **with_advantages(value, 1))
    good = state(model)
    with pytest.raises(FloatingPointError, match=r"rollout \['advantages'\]\. The update was undone"):
        model.learn(32)
    # Adam had no moments yet and has none now
    assert state(model).keys() == good.keys()
    assert all(th.equal(tensor, good[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("value", [0.0, 3.0, 2.0**100])
def test_advantages_without_variance_move_the_critic_only(value: float) -> None:
    """Normalised they are 0, and so is the gradient of the policy, in stock PPO too."""
    made = {}
    for algorithm in (PPO, PPOClip, PPOPenalty):
        model = algorithm(ActorCriticPolicy, Sound(), **SMALL, **with_advantages(value, 32))
        before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        model.learn(64)
        for name, tensor in model.policy.state_dict().items():
            assert th.equal(tensor, before[name]) == ("value" not in name), name
        made[algorithm] = model
    assert_same_policy([made[PPO], made[PPOClip]])
    assert made[PPOPenalty].logger.name_to_value["train/kl"] == 0


# --- gradients and weights


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@BOTH
def test_gradient_that_is_not_finite_names_the_weights(algorithm, bad: float, tmp_path) -> None:
    """The loss is finite, one gradient is not: as a layer with an unstable derivative gives it."""

    class Unstable(th.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * bad

    model = algorithm("MlpPolicy", Sound(), **SMALL)
    model.learn(32)
    good = state(model)
    hook = model.policy.value_net.register_forward_hook(lambda module, inputs, output: Unstable.apply(output))
    with pytest.raises(FloatingPointError, match=r"loss all finite, gradients \['mlp_extractor.value_net"):
        model.learn(32, reset_num_timesteps=False)
    hook.remove()
    assert_intact(model, good, tmp_path)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_only_the_last_gradient_is_not_finite(algorithm, bad: float, tmp_path) -> None:
    """Four minibatches: what the first three did is undone as well, and the message says that it was not the rollout."""
    model = algorithm("MlpPolicy", Sound(), **SMALL)
    model.learn(32)
    good, seen = state(model), []

    def spoil(gradient):
        seen.append(1)
        return gradient * bad if len(seen) == 4 else gradient

    hook = model.policy.action_net.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"rollout all finite \(it went wrong within the update: try a lower"):
        model.learn(32, reset_num_timesteps=False)
    hook.remove()
    assert_intact(model, good, tmp_path)


@BOTH
def test_any_error_within_an_update_undoes_it(algorithm, tmp_path) -> None:
    model = algorithm("MlpPolicy", Sound(), **SMALL)
    model.learn(32)
    good, seen = state(model), []

    def fail(gradient) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise ZeroDivisionError("of the user's own")

    hook = model.policy.action_net.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        model.learn(32, reset_num_timesteps=False)
    hook.remove()
    assert_intact(model, good, tmp_path)


# --- a spread near 0 and near infinity


@pytest.mark.parametrize("variance", [1e-12, 1e-30, 1e30])
def test_a_fixed_spread_at_the_ends(variance: float) -> None:
    model = PPOPenalty("MlpPolicy", Sound(), **SMALL, policy_kwargs={"covariance": variance}).learn(96)
    observation = th.tensor([[0.1, -0.2, 0.3]])
    mean = model.policy.get_distribution(observation).mode()
    _, log_prob, entropy = model.policy.evaluate_actions(observation, mean)
    # Two dimensions: the density at the mean is 1 / (2 pi variance), the entropy one nat per two dimensions more
    assert log_prob.item() == pytest.approx(-math.log(2 * math.pi * variance), rel=1e-6)
    assert entropy.item() == pytest.approx(1 + math.log(2 * math.pi * variance), rel=1e-6)
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())
    assert math.isfinite(model.logger.name_to_value["train/kl"])


@BOTH
@pytest.mark.parametrize("log_std", [-40, 50])
def test_a_learned_spread_whose_square_float32_does_not_hold(algorithm, log_std: float, tmp_path) -> None:
    """Stock PPO ends with weights that are no numbers."""
    stock = PPO("MlpPolicy", Sound(), **SMALL, policy_kwargs={"log_std_init": log_std})
    with pytest.raises(ValueError, match="loc"):
        stock.learn(32)
    assert stock.policy.log_std.isnan().any()
    model = algorithm(ActorCriticPolicy, Sound(), **SMALL, policy_kwargs={"log_std_init": log_std})
    with pytest.raises(FloatingPointError, match=r"'log_std'.*The update was undone"):
        model.learn(32)
    assert (model.policy.log_std == log_std).all()
    model.save(tmp_path / "model")
    assert (algorithm.load(tmp_path / "model").policy.log_std == log_std).all()


@BOTH
def test_a_spread_that_vanishes_with_the_last_step(algorithm, tmp_path) -> None:
    """Every weight is finite, and the policy cannot act: exp(-1000) is 0. The update is undone."""
    options = {**SMALL, "n_epochs": 1, "batch_size": 32}
    model = algorithm(ActorCriticPolicy, Sound(), **options)
    model.learn(32)
    good = state(model)
    hook = model.policy.log_std.register_hook(lambda gradient: 1e9 * th.ones_like(gradient))
    model.lr_schedule = lambda progress: 1e4
    with pytest.raises(ValueError, match="parameter scale"):
        model.learn(32, reset_num_timesteps=False)
    hook.remove()
    assert_intact(model, good, tmp_path)


# --- sizes


def test_a_thousand_action_dimensions() -> None:
    wide = spaces.Box(-1, 1, (1000,), np.float32)
    models = [each(ActorCriticPolicy, Sound(wide), **SMALL).learn(64) for each in (PPO, PPOClip)]
    assert_same_policy(models)
    model = PPOPenalty("MlpPolicy", Sound(wide), **SMALL)
    model.learn(32)
    moved, before = [], model.policy.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    model.learn(32, reset_num_timesteps=False)
    observations = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        moved.append(model.policy.get_distribution(observations).mode())
        model.policy.load_state_dict(before)
        moved.append(model.policy.get_distribution(observations).mode())
    # With a variance of 1/2 the divergence is the squared distance of the means
    distance = (moved[0] - moved[1]).double().square().sum(dim=1).mean().item()
    assert model.logger.name_to_value["train/kl"] == pytest.approx(distance, rel=1e-4)
    assert distance > 0


@pytest.mark.filterwarnings("ignore:.*mini-batch.*")
@pytest.mark.parametrize("batch_size", [33, 64, 10**30])
def test_a_batch_larger_than_the_rollout(batch_size: int) -> None:
    options = {**SMALL, "batch_size": batch_size}
    models = [each(ActorCriticPolicy, Sound(), **options).learn(64) for each in (PPO, PPOClip)]
    assert_same_policy(models)
    assert models[1]._n_updates == 4
    penalty = PPOPenalty("MlpPolicy", Sound(), **options).learn(64)
    whole = PPOPenalty("MlpPolicy", Sound(), **{**SMALL, "batch_size": 32}).learn(64)
    assert_same_policy([whole, penalty])
