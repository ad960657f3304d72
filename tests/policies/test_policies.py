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
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as torch_kl_divergence

from sb3_ppo_penalty import CnnPolicy, MlpPolicy, MultiInputPolicy, PPOClip, PPOPenalty
from sb3_ppo_penalty.objectives.divergence import concatenate, kl_divergence, parameters_of
from sb3_ppo_penalty.policies.distributions import FixedGaussianDistribution

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


def test_the_default_is_the_articles_half():
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


@pytest.mark.parametrize("form", FORMS)
def test_constants_are_other_tensors_only_if_they_have_changed(form):
    """The old policy's parameters keep the constants: a constant is replaced if it changes, and never written in place."""
    policy = make(covariance=FORMS[form])
    before = {name: tensor for name, tensor in policy.named_buffers() if name != "covariance"}
    kept = [tensor.clone() for tensor in before.values()]
    policy.load_state_dict(policy.state_dict())
    assert all(tensor is before[name] for name, tensor in policy.named_buffers() if name in before)
    state = {**policy.state_dict(), "covariance": 4 * policy.covariance}
    policy.load_state_dict(state)
    assert not any(tensor is before[name] for name, tensor in policy.named_buffers() if name in before)
    check_density(policy, 4 * MATRICES[form])
    assert all(th.equal(*pair) for pair in zip(before.values(), kept, strict=True))


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
    # A new policy with the same arguments starts there too
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


# --- schedules

#: Schedules, each with its covariances at a remaining progress of 1, 0.5 and 0
SCHEDULES = {
    "LinearSchedule": (LinearSchedule(0.5, 0.1, 1.0), [np.eye(3) * variance for variance in (0.5, 0.3, 0.1)]),
    "LinearSchedule that ends early": (LinearSchedule(0.5, 0.1, 0.5), [np.eye(3) * variance for variance in (0.5, 0.1, 0.1)]),
    "FloatSchedule": (FloatSchedule(0.2), [np.eye(3) * 0.2] * 3),
    "function": (lambda p: 0.1 + 0.4 * p, [np.eye(3) * variance for variance in (0.5, 0.3, 0.1)]),
    "one each": (lambda p: [0.1, 0.2 + p, 1.0], [np.diag([0.1, variance, 1.0]) for variance in (1.2, 0.7, 0.2)]),
    "full": (lambda p: (0.5 + p) * np.array(FULL), [scale * np.array(FULL) for scale in (1.5, 1.0, 0.5)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_reaches_the_distribution(name):
    schedule, matrices = SCHEDULES[name]
    policy = make(covariance=schedule)
    check_density(policy, matrices[0])  # before the first `update_covariance`
    for progress, matrix in zip((0.5, 0.0, 1.0), (*matrices[1:], matrices[0]), strict=True):
        policy.update_covariance(progress)
        check_density(policy, matrix)
        assert policy.log_std.exp().tolist() == pytest.approx(np.sqrt(matrix.diagonal()).tolist())
        th.manual_seed(0)
        distribution = policy.get_distribution(observations(1).expand(40_000, 3))
        spread = np.cov((distribution.sample() - distribution.mode()).detach().numpy().T)
        np.testing.assert_allclose(spread, matrix, atol=0.05 * matrix.max())


def test_without_a_schedule_nothing_follows():
    for arguments in ({}, {"covariance": FULL}, {"learn_covariance": True}, {"use_sde": True}):
        policy = make(**arguments)
        state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        policy.update_covariance(0.0)
        assert all(th.equal(tensor, state[name]) for name, tensor in policy.state_dict().items())
    make(action_space=spaces.Discrete(3)).update_covariance(0.0)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (lambda p: 0.5 * p, {}, r"`covariance` must be positive: .*\(the schedule's answer at a remaining progress of 0\)"),
        (lambda p: 0.5 - p, {}, r"`covariance` must be positive: .*progress of 1\)"),
        (lambda p: [0.5, 0.5], {}, r"`covariance` must be one variance, 3 variances .*progress of 1\)"),
        (lambda p: None, {}, "`covariance` must be a number, a list or a square matrix, got None"),
        (lambda p: 0.5 if p else FULL, {}, r"`covariance` must be a schedule of one shape, got \(3, 3\) after \(3,\)"),
        (lambda p: 0.5, {"learn_covariance": True}, "`covariance` must be no schedule with `learn_covariance`"),
        (lambda p: 0.5, {"log_std_init": 0.0}, "`covariance` and `log_std_init`"),
        (lambda p: 0.5, {"use_sde": True}, "no meaning with use_sde=True"),
        (lambda p: 0.5, {"action_space": spaces.Discrete(3)}, "no meaning with the action space"),
    ],
)
def test_schedules_that_cannot_be_meant(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(covariance=schedule, **arguments)


def test_a_schedule_that_goes_wrong_half_way_leaves_the_covariance():
    policy = make(covariance=lambda p: 0.5 if p in (0, 1) else FULL if p > 0.5 else -1)
    for progress, message in ((0.75, "of one shape"), (0.25, "must be positive")):
        with pytest.raises(ValueError, match=message):
            policy.update_covariance(progress)
        check_density(policy, 0.5 * np.eye(3))


@pytest.mark.parametrize("name", ["function", "one each", "full"])
def test_the_divergence_between_two_moments_of_a_schedule_is_exact(name):
    """Between the parameters at two moments, against torch's divergence of distributions made from the matrices."""
    schedule, matrices = SCHEDULES[name]
    policy = make(covariance=schedule)
    with th.no_grad():
        frozen = concatenate([parameters_of(policy.get_distribution(observations()))], len(observations()))
        old_mean = policy.get_distribution(observations()).mode().clone()
        policy.action_net.weight.add_(0.1)
        policy.update_covariance(0.0)
        new = policy.get_distribution(observations())
        kl = kl_divergence(frozen, parameters_of(new))
    gaussians = [
        MultivariateNormal(mean.double(), th.tensor(matrix))
        for mean, matrix in zip((old_mean, new.mode()), (matrices[0], matrices[-1]), strict=True)
    ]
    assert kl.min() > 0.1
    th.testing.assert_close(kl, torch_kl_divergence(*gaussians).float(), rtol=1e-5, atol=1e-6)


class Diary(BaseCallback):
    """Records the variances at the start of every rollout, at its end and at the end of training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float]] = []

    def note(self, moment: str) -> None:
        self.seen.append((moment, round(self.model.policy.covariance[0].item(), 6)))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.note("start")

    def _on_rollout_end(self) -> None:
        self.note("end")

    def _on_training_end(self) -> None:
        self.note("trained")


def scheduled(algorithm_class=PPOPenalty, schedule=SCHEDULES["function"][0], **arguments):
    settings = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, **arguments}
    return algorithm_class(MlpPolicy, target_env(), policy_kwargs={"covariance": schedule}, **settings)


@pytest.mark.parametrize("algorithm_class", [PPOPenalty, PPOClip])
def test_training_follows_the_schedule_between_updates(algorithm_class):
    model, diary = scheduled(algorithm_class), Diary()
    model.learn(64, callback=diary)
    # All, three, two and one quarter of the training remain when a rollout starts: 0.1 + 0.4 p
    assert diary.seen == [(when, value) for value in (0.5, 0.4, 0.3, 0.2) for when in ("start", "end")] + [("trained", 0.2)]
    assert model.logger.name_to_value["train/std"] == pytest.approx(math.sqrt(0.2))
    # A second training starts the schedule again; a continued one goes on
    for reset, expected in ((True, [0.5, 0.3]), (False, [0.3, 0.2])):
        diary = Diary()
        model.learn(32, callback=diary, reset_num_timesteps=reset)
        # continued: 32 and 48 of 64 steps are done
        assert [value for when, value in diary.seen if when == "start"] == expected


@pytest.mark.parametrize("name", ["function", "full"])
def test_rollout_and_update_are_made_with_one_covariance(name):
    """The covariance changes between an update and the next rollout only, so a schedule alone makes no divergence."""
    model = scheduled(schedule=SCHEDULES[name][0], learning_rate=0.0).learn(32)
    buffer = model.rollout_buffer
    with th.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(th.as_tensor(buffer.observations), th.as_tensor(buffer.actions))
    np.testing.assert_allclose(log_prob.numpy(), buffer.log_probs[:, 0], rtol=1e-5)
    check_density(model.policy, SCHEDULES[name][1][1])
    assert model.logger.name_to_value["train/kl"] == 0
    assert model.logger.name_to_value["train/max_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_model_files_keep_the_schedule_and_where_it_is(tmp_path, name):
    schedule, matrices = SCHEDULES[name]
    model = scheduled(schedule=schedule).learn(32)
    check_density(model.policy, matrices[1])
    model.save(tmp_path / "model.zip")
    loaded = PPOPenalty.load(tmp_path / "model.zip", env=target_env())
    check_density(loaded.policy, matrices[1])
    actions = []
    for each in (model, loaded):
        th.manual_seed(0)
        actions.append(each.predict(observations().numpy())[0])
    np.testing.assert_array_equal(*actions)
    loaded.learn(32, reset_num_timesteps=False)  # 32 and 48 of 64 steps
    expected = {"function": 0.2, "LinearSchedule": 0.2, "LinearSchedule that ends early": 0.1, "FloatSchedule": 0.2}
    if name in expected:
        check_density(loaded.policy, expected[name] * np.eye(3))
    if name == "full":
        check_density(loaded.policy, 0.75 * np.array(FULL))


@pytest.mark.parametrize("name", SCHEDULES)
def test_policy_files_keep_the_covariance_of_the_moment(tmp_path, name):
    schedule, matrices = SCHEDULES[name]
    policy = make(covariance=schedule)
    policy.update_covariance(0.5)
    policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt")
    check_density(loaded, matrices[1])
    assert th.equal(loaded.covariance, policy.covariance)
    loaded.update_covariance(0.0)  # a policy file holds no schedule
    check_density(loaded, matrices[1])


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "TRPO"])
def test_an_algorithm_that_does_not_follow_is_told_of(algorithm):
    algorithm_class, settings = ALGORITHMS[algorithm]
    policy_kwargs = {"covariance": LinearSchedule(0.5, 0.1, 1.0)}
    model = algorithm_class(MlpPolicy, target_env(), seed=0, policy_kwargs=policy_kwargs, **settings)
    with pytest.warns(UserWarning, match="`covariance` is a schedule, but this algorithm does not follow it") as told:
        model.learn(96)
    assert len(told) == 1
    check_density(model.policy, 0.5 * np.eye(3))


def test_a_callback_can_tell_another_algorithms_policy():
    class Tell(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.model.policy.update_covariance(1 - self.num_timesteps / 64)

    model = scheduled(PPO, LinearSchedule(0.5, 0.1, 1.0)).learn(64, callback=Tell())  # warnings are errors here
    check_density(model.policy, 0.2 * np.eye(3))


class Projection(FlattenExtractor):
    """Features extractor with weights."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.matrix = th.nn.Parameter(th.randn(3, 3))

    def forward(self, observations):
        return super().forward(observations) @ self.matrix


def test_acting_with_two_extractors_is_what_sb3_evaluates():
    policy = make(features_extractor_class=Projection, share_features_extractor=False)
    assert not th.equal(policy.pi_features_extractor.matrix, policy.vf_features_extractor.matrix)
    with th.no_grad():
        actions, values, log_prob = policy(observations())
        expected_values, expected_log_prob, _ = policy.evaluate_actions(observations(), actions)
    th.testing.assert_close(values, expected_values)
    th.testing.assert_close(log_prob, expected_log_prob, rtol=1e-4, atol=1e-5)


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
