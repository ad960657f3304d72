"""The policies with a fixed covariance inside SB3: algorithms, files, devices, images and dicts."""

import copy
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import MultivariateNormal

from sb3_ppo_penalty import CnnPolicy, MlpPolicy, MultiInputPolicy, PPOClip, PPOPenalty
from sb3_ppo_penalty.distributions import FixedGaussianDistribution

BOX = spaces.Box(-1, 1, (3,))
OBSERVATIONS = BOX  # as in SB3's IdentityEnv
FULL = [[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]]
#: The covariances asked for, and the matrix that each stands for
FORMS = {"number": 0.3, "one each": [0.1, 0.5, 2.0], "full": FULL}
MATRICES = {"number": np.diag([0.3] * 3), "one each": np.diag([0.1, 0.5, 2.0]), "full": np.array(FULL)}


def make(policy_class=MlpPolicy, action_space=BOX, **arguments):
    th.manual_seed(0)
    return policy_class(OBSERVATIONS, action_space, lambda _: 1e-3, **arguments)


def observations(count: int = 20) -> th.Tensor:
    return th.randn(count, 3, generator=th.Generator().manual_seed(3))


def check_density(policy, matrix) -> None:
    """The policy's own log-probability against torch's, around the policy's own mean."""
    with th.no_grad():
        actions = th.randn(20, 3, generator=th.Generator().manual_seed(4))
        mean = policy.get_distribution(observations()).mode()
        _, log_prob, entropy = policy.evaluate_actions(observations(), actions)
    reference = MultivariateNormal(mean, th.tensor(matrix, dtype=th.float32))
    th.testing.assert_close(log_prob, reference.log_prob(actions), rtol=1e-5, atol=1e-5)
    th.testing.assert_close(entropy, reference.entropy(), rtol=1e-5, atol=1e-5)


def target_env() -> IdentityEnv:
    return IdentityEnv(space=BOX, ep_length=8)


# --- what the arguments do


def test_the_default_is_the_documents_half():
    policy = make()
    assert policy.covariance.tolist() == [0.5, 0.5, 0.5]
    check_density(policy, 0.5 * np.eye(3))


@pytest.mark.parametrize("form", FORMS)
def test_a_covariance_reaches_the_distribution(form):
    policy = make(covariance=FORMS[form])
    assert policy.has_fixed_covariance
    check_density(policy, MATRICES[form])
    # SB3 logs the mean of its exponential as the standard deviation
    assert policy.log_std.exp().tolist() == pytest.approx(np.sqrt(MATRICES[form].diagonal()).tolist())


def test_the_spread_may_be_given_as_sb3s_log_std():
    # exp(2 ln 0.7) = 0.49
    check_density(make(log_std_init=math.log(0.7)), 0.49 * np.eye(3))


def test_sb3s_log_std_in_sb3s_place():
    policy = MlpPolicy(OBSERVATIONS, BOX, lambda _: 1e-3, [16], th.nn.Tanh, True, False, math.log(0.7))
    check_density(policy, 0.49 * np.eye(3))


def test_an_action_of_two_axes_is_flattened():
    policy = make(action_space=spaces.Box(-1, 1, (2, 2)), covariance=np.diag([0.1, 0.2, 0.3, 0.4]))
    action, _ = policy.predict(np.zeros(3, dtype=np.float32))
    assert action.shape == (2, 2)
    assert policy.get_distribution(observations(5)).sample().shape == (5, 4)


def test_learning_starts_at_the_covariance():
    policy = make(learn_covariance=True, covariance=[0.1, 0.5, 2.0])
    assert not policy.has_fixed_covariance
    assert type(policy.action_dist) is DiagGaussianDistribution
    assert "log_std" in dict(policy.named_parameters())
    check_density(policy, np.diag([0.1, 0.5, 2.0]))


def test_a_learned_covariance_of_one_is_sb3s_policy_bit_for_bit():
    ours, reference = make(learn_covariance=True, covariance=1.0), make(ActorCriticPolicy)
    outputs = []
    for policy in (ours, reference):
        th.manual_seed(1)
        outputs.append(policy(observations()))
    assert all(th.equal(*pair) for pair in zip(*outputs, strict=True))


def test_learning_starts_at_a_half_unless_told():
    check_density(make(learn_covariance=True), 0.5 * np.eye(3))
    check_density(make(learn_covariance=True, log_std_init=math.log(0.7)), 0.49 * np.eye(3))


@pytest.mark.parametrize(
    ("action_space", "arguments", "message"),
    [
        pytest.param(BOX, {"covariance": -1.0}, "`covariance` must be positive", id="negative"),
        pytest.param(BOX, {"covariance": [0.5, 0.5]}, "`covariance` must be one variance, 3 variances", id="length"),
        pytest.param(BOX, {"covariance": np.ones((3, 3))}, "`covariance` must be positive definite", id="singular"),
        pytest.param(BOX, {"covariance": math.nan}, "`covariance` must be finite", id="nan"),
        pytest.param(BOX, {"covariance": 0.5, "log_std_init": 0.0}, "`covariance` and `log_std_init`", id="twice"),
        pytest.param(BOX, {"covariance": FULL, "learn_covariance": True}, "only a diagonal learns", id="full and learned"),
        pytest.param(BOX, {"covariance": 0.5, "use_sde": True}, "no meaning with use_sde=True", id="gSDE"),
        pytest.param(BOX, {"learn_covariance": True, "use_sde": True}, "no meaning with use_sde=True", id="gSDE learns"),
        pytest.param(
            spaces.Discrete(3), {"covariance": 0.5}, r"no meaning with the action space Discrete\(3\)", id="Discrete"
        ),
        pytest.param(spaces.Discrete(3), {"learn_covariance": True}, r"no meaning with .* Discrete\(3\)", id="learned"),
        pytest.param(spaces.MultiBinary(3), {"covariance": 0.5}, "no meaning with .* MultiBinary", id="MultiBinary"),
        pytest.param(spaces.MultiDiscrete([3]), {"covariance": 0.5}, "no meaning with .* MultiDiscrete", id="MultiDiscrete"),
    ],
)
def test_what_cannot_be_asked_for(action_space, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(action_space=action_space, **arguments)


def test_other_policies_are_sb3s():
    assert type(make(action_space=spaces.Discrete(3)).action_dist) is CategoricalDistribution
    assert type(make(use_sde=True).action_dist) is StateDependentNoiseDistribution
    assert not make(use_sde=True).has_fixed_covariance


# --- where the covariance lives


@pytest.mark.parametrize("form", FORMS)
def test_it_is_state_but_no_parameter(form):
    policy = make(covariance=FORMS[form])
    extra = set(policy.state_dict()) - set(dict(policy.named_parameters()))
    assert extra == {"covariance"}
    reference = make(ActorCriticPolicy)
    assert set(dict(policy.named_parameters())) == set(dict(reference.named_parameters())) - {"log_std"}
    optimized = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in optimized} == {id(parameter) for parameter in policy.parameters()}
    assert not policy.covariance.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_it_follows_the_networks_to_another_device_and_type(form):
    policy = make(covariance=FORMS[form]).double()
    distribution = policy._get_action_dist_from_latent(th.zeros(5, 64, dtype=th.float64))
    assert distribution.sample().dtype == distribution.log_prob(th.zeros(5, 3).double()).dtype == th.float64
    assert distribution.entropy().dtype == th.float64
    elsewhere = policy.to(th.device("meta"))
    assert {tensor.device.type for tensor in (*elsewhere.buffers(), *elsewhere.parameters())} == {"meta"}
    distribution = elsewhere._get_action_dist_from_latent(th.zeros(5, 64, dtype=th.float64, device="meta"))
    assert distribution.log_prob(th.zeros(5, 3, device="meta")).device.type == "meta"


@pytest.mark.parametrize(("before", "after"), [("number", "one each"), ("one each", "number")])
def test_another_covariance_can_be_loaded(before, after):
    policy, other = make(covariance=FORMS[before]), make(covariance=FORMS[after])
    policy.load_state_dict(other.state_dict())
    check_density(policy, MATRICES[after])
    assert th.equal(policy.log_std, other.log_std)
    th.manual_seed(0)
    expected = other(observations())
    th.manual_seed(0)
    assert all(th.equal(*pair) for pair in zip(policy(observations()), expected, strict=True))


def test_another_full_covariance_can_be_loaded():
    policy = make(covariance=np.eye(3))
    policy.load_state_dict(make(covariance=FULL).state_dict())
    check_density(policy, FULL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["copy", "pickle"])
def test_copies(form, clone):
    policy = make(covariance=FORMS[form])
    check_density(clone(policy), MATRICES[form])
    copied = clone(policy)
    with th.no_grad():
        copied.covariance.mul_(2)
    check_density(policy, MATRICES[form])


# --- files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_policy_files(tmp_path, form, shared):
    policy = make(covariance=FORMS[form], share_features_extractor=shared, net_arch=[8])
    policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt")
    assert loaded.share_features_extractor is shared
    assert th.equal(loaded.covariance, policy.covariance)
    check_density(loaded, MATRICES[form])
    for deterministic in (True, False):
        actions = []
        for each in (policy, loaded):
            th.manual_seed(0)
            actions.append(each.predict(observations().numpy(), deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize(
    ("action_space", "arguments"),
    [
        pytest.param(BOX, {"log_std_init": -1.0}, id="log_std_init"),
        pytest.param(BOX, {"learn_covariance": True, "covariance": [0.1, 0.5, 2.0]}, id="learned"),
        pytest.param(BOX, {"use_sde": True, "log_std_init": -2.0}, id="gSDE"),
        pytest.param(spaces.Discrete(3), {}, id="Discrete"),
    ],
)
def test_policy_files_of_the_other_kinds(tmp_path, action_space, arguments):
    policy = make(action_space=action_space, **arguments)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt")
    assert type(loaded.action_dist) is type(policy.action_dist)
    state = policy.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(th.equal(loaded.state_dict()[name], state[name]) for name in state)
    actions = th.as_tensor(np.array([action_space.sample() for _ in range(20)]))
    evaluations = [each.evaluate_actions(observations(), actions) for each in (policy, loaded)]
    assert all(th.equal(*pair) for pair in zip(*evaluations, strict=True))


def test_the_file_of_a_learned_covariance_holds_what_was_learned(tmp_path):
    policy_kwargs = {"learn_covariance": True, "covariance": [0.1, 0.5, 2.0]}
    settings = {"n_steps": 32, "batch_size": 16, "learning_rate": 0.01, "seed": 0, "policy_kwargs": policy_kwargs}
    model = PPOClip("MlpPolicy", target_env(), ent_coef=0.1, **settings).learn(64)
    learned = model.policy.log_std.detach().clone()
    assert ((2 * learned).exp() - th.tensor([0.1, 0.5, 2.0])).abs().min() > 1e-3
    model.policy.save(tmp_path / "policy.pt")
    assert th.equal(MlpPolicy.load(tmp_path / "policy.pt").log_std, learned)
    # What is built anew from the same arguments starts there, too
    th.testing.assert_close(MlpPolicy(**model.policy._get_constructor_parameters()).log_std, learned)
    model.save(tmp_path / "model.zip")
    assert th.equal(PPOClip.load(tmp_path / "model.zip").policy.log_std, learned)


@pytest.mark.parametrize("form", FORMS)
def test_model_files(tmp_path, form):
    model = PPOPenalty("MlpPolicy", target_env(), n_steps=16, batch_size=8, policy_kwargs={"covariance": FORMS[form]})
    model.save(tmp_path / "model.zip")
    loaded = PPOPenalty.load(tmp_path / "model.zip", env=target_env())
    check_density(loaded.policy, MATRICES[form])
    loaded.learn(16)
    check_density(loaded.policy, MATRICES[form])


# --- SB3's algorithms

ALGORITHMS = {
    "PPOPenalty": (PPOPenalty, {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    "PPOClip": (PPOClip, {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    "PPO": (PPO, {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    "A2C": (A2C, {"n_steps": 32}),
    "TRPO": (TRPO, {"n_steps": 32, "batch_size": 32}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_the_networks_and_leaves_the_covariance(algorithm, form):
    algorithm_class, settings = ALGORITHMS[algorithm]
    model = algorithm_class(MlpPolicy, target_env(), seed=0, policy_kwargs={"covariance": FORMS[form]}, **settings)
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    constants = {name: buffer.clone() for name, buffer in model.policy.named_buffers()}
    model.learn(64)
    for name, parameter in model.policy.named_parameters():
        assert parameter.isfinite().all()
        assert not th.equal(parameter, before[name]), f"{name} did not learn"
    assert all(th.equal(buffer, constants[name]) for name, buffer in model.policy.named_buffers())
    check_density(model.policy, MATRICES[form])


@pytest.mark.parametrize("algorithm_class", [PPOPenalty, PPOClip, PPO])
def test_the_standard_deviation_is_logged(algorithm_class):
    policy_kwargs = {"covariance": [0.04, 0.25, 1.0]}
    model = algorithm_class(MlpPolicy, target_env(), n_steps=16, batch_size=8, policy_kwargs=policy_kwargs).learn(16)
    # The mean of 0.2, 0.5 and 1
    assert model.logger.name_to_value["train/std"] == pytest.approx(1.7 / 3)


def test_the_standard_deviation_of_a_full_matrix_is_of_each_dimension_by_itself():
    policy_kwargs = {"covariance": [[0.04, 0.05, 0], [0.05, 0.25, 0], [0, 0, 1.0]]}
    model = PPOPenalty("MlpPolicy", target_env(), n_steps=16, batch_size=8, policy_kwargs=policy_kwargs).learn(16)
    assert model.logger.name_to_value["train/std"] == pytest.approx(1.7 / 3)


# --- images and dicts


class SmallImages(FakeImageEnv):
    """The smallest images that SB3's network takes, with actions that are numbers."""

    def __init__(self) -> None:
        super().__init__(screen_height=36, screen_width=36, discrete=False)


@pytest.mark.parametrize(
    ("name", "policy_class", "environment", "dimensions"),
    [
        ("CnnPolicy", CnnPolicy, SmallImages, 5),
        ("MultiInputPolicy", MultiInputPolicy, lambda: SimpleMultiObsEnv(discrete_actions=False), 4),
    ],
)
@pytest.mark.parametrize("algorithm_class", [PPOPenalty, PPOClip])
def test_images_and_dicts(tmp_path, name, policy_class, environment, dimensions, algorithm_class):
    matrix = 0.2 * np.eye(dimensions) + 0.1
    settings = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0}
    model = algorithm_class(name, environment(), policy_kwargs={"covariance": matrix}, **settings)
    assert type(model.policy) is policy_class
    assert isinstance(model.policy.action_dist, FixedGaussianDistribution)
    before = model.policy.action_net.weight.detach().clone()
    model.learn(16)
    assert not th.equal(model.policy.action_net.weight, before)
    np.testing.assert_allclose(model.policy.covariance.numpy(), matrix, rtol=1e-6)
    observation = model.observation_space.sample()
    actions = [model.predict(observation, deterministic=True)[0] for _ in range(2)]
    np.testing.assert_array_equal(*actions)
    assert not np.array_equal(model.predict(observation)[0], model.predict(observation)[0])
    model.policy.save(tmp_path / "policy.pt")
    loaded = policy_class.load(tmp_path / "policy.pt")
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], actions[0])


# --- acting


def test_predict():
    policy, observation = make(covariance=FULL), observations(1).numpy()
    action, state = policy.predict(observation, deterministic=True)
    assert state is None
    with th.no_grad():
        mean = policy.get_distribution(th.as_tensor(observation)).mode().numpy()
    np.testing.assert_array_equal(action, np.clip(mean, -1, 1))
    th.manual_seed(0)
    samples = [policy.predict(observation)[0] for _ in range(2)]
    assert not np.array_equal(*samples)


def test_predict_clips_to_the_actions_bounds():
    policy = make(covariance=100.0)
    actions = policy.predict(observations(200).numpy())[0]
    assert actions.min() == -1
    assert actions.max() == 1


def test_a_pendulum_of_gymnasium():
    model = PPOPenalty("MlpPolicy", gym.make("Pendulum-v1"), n_steps=64, seed=0).learn(64)
    assert model.policy.covariance.tolist() == [0.5]
    assert model.logger.name_to_value["train/std"] == pytest.approx(math.sqrt(0.5))
