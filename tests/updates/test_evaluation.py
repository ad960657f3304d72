"""The divergence is that of the distribution which a policy evaluates with, whatever the policy's class and its attributes."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Beta, kl
from torch.nn.functional import softplus

from sb3_ppo_penalty import MlpPolicy, PPOClip, PPOPenalty, register_divergence
from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty
from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.evaluation import acting, evaluate, example, example_actions, find_source

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "seed": 0, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def _validates(monkeypatch):
    """The first thing that torch compiles in a process ends the checks of its distributions' arguments."""
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", True)


def learned(policy, compiled=False, **options):
    model = PPOPenalty(policy, "Pendulum-v1", **{**SMALL, **options})
    if compiled:
        model.policy = th.compile(model.policy, backend="eager")
    return model.learn(128)


def weights(model) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


class OwnObject(ActorCriticPolicy):
    """Makes a distribution object for each evaluation; what `action_dist` holds says nothing."""

    def _get_action_dist_from_latent(self, latent_pi):
        self.action_dist.proba_distribution(th.ones(len(latent_pi), 1), self.log_std.detach() - 1)
        return DiagGaussianDistribution(1).proba_distribution(self.action_net(latent_pi), self.log_std)


class OtherKind(OwnObject):
    """Its `action_dist` is of another kind altogether."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.action_dist = CategoricalDistribution(3)

    def _get_action_dist_from_latent(self, latent_pi):
        return DiagGaussianDistribution(1).proba_distribution(self.action_net(latent_pi), self.log_std)


class Overriding(ActorCriticPolicy):
    """Evaluates on its own, and knows its distribution only when asked."""

    def evaluate_actions(self, obs, actions):
        features = self.extract_features(obs)
        latent_pi, latent_vf = self.mlp_extractor(features)
        distribution = self._own(latent_pi)
        return self.value_net(latent_vf), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs):
        return self._own(self.mlp_extractor.forward_actor(self.extract_features(obs)))

    def _own(self, latent_pi):
        return DiagGaussianDistribution(1).proba_distribution(self.action_net(latent_pi), self.log_std)


class Twice(ActorCriticPolicy):
    """Makes another distribution after the one that it evaluates with, in the same object."""

    def evaluate_actions(self, obs, actions):
        found = super().evaluate_actions(obs, actions)
        self._get_action_dist_from_latent(th.zeros(len(actions), 64))
        return found


@pytest.mark.parametrize("policy", [OwnObject, OtherKind, Overriding, Twice])
@pytest.mark.parametrize("guard", [None, "fixup"])
def test_behaviour_decides_not_the_class(policy, guard) -> None:
    """Policies that do the same train to the same weights, and so does the log; the fixed guard takes the divergence too."""
    options = {"guard": guard, "target_kl": 1e-4 if guard else 0.01}
    plain, other = learned(ActorCriticPolicy, **options), learned(policy, **options)
    th.testing.assert_close(weights(plain), weights(other), rtol=1e-4, atol=1e-6)
    figures = [model.logger.name_to_value for model in (plain, other)]
    for name in ("kl", "kl_max_state", "kl_estimate", "policy_gradient_loss"):
        assert figures[0][f"train/{name}"] == pytest.approx(figures[1][f"train/{name}"], rel=1e-3)
    if guard:
        assert figures[0]["train/guard_acted"] == 1


@pytest.mark.parametrize("options", [{}, {"policy_kwargs": {"covariance": lambda progress: 0.2 + progress}}])
def test_a_compiled_policy_trains_saves_loads_and_predicts(options, tmp_path) -> None:
    plain, compiled = learned("MlpPolicy", **options), learned("MlpPolicy", compiled=True, **options)
    assert plain.logger.name_to_value["train/kl"] > 1e-6
    th.testing.assert_close(weights(plain), weights(compiled))
    if options:
        # The schedule was followed: 0.2 + 1 before the first rollout, 0.2 + 1/2 before the second
        assert compiled.policy.covariance.item() == pytest.approx(0.7)
    compiled.save(tmp_path / "model")
    loaded = PPOPenalty.load(tmp_path / "model", env=compiled.get_env())
    observation = np.array([0.3, -0.5, 1.0], dtype=np.float32)
    actions = [each.predict(observation, deterministic=True)[0] for each in (plain, compiled, loaded)]
    np.testing.assert_allclose(actions[0], actions[1], rtol=1e-6)
    np.testing.assert_array_equal(actions[1], actions[2])
    loaded.learn(64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's tracer
@pytest.mark.parametrize("name", ["evaluate_actions", "_get_action_dist_from_latent"])
def test_a_compiled_method_is_not_in_the_way(name) -> None:
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL)
    setattr(model.policy, name, th.compile(getattr(model.policy, name), backend="eager"))
    th.testing.assert_close(weights(model.learn(128)), weights(learned("MlpPolicy")))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's tracer
@pytest.mark.parametrize("at", ["class", "instance"])
def test_actor_and_critic_are_told_apart_behind_a_compiled_method(at, monkeypatch) -> None:
    """One graph for all results says of each weight that each result depends on it."""

    class Own(ActorCriticPolicy):
        pass

    pair = {**SMALL, "max_grad_norm": (0.5, 0.5)}
    model = PPOPenalty(Own, "Pendulum-v1", **pair)
    place = Own if at == "class" else model.policy
    monkeypatch.setattr(place, "evaluate_actions", th.compile(place.evaluate_actions, backend="aot_eager"))
    actor, critic = model.learn(64)._actor_and_critic()
    assert {name.split(".")[1] for name in actor if "mlp" in name} == {"policy_net"}
    assert (len(actor), len(critic)) == (7, 6)
    th.testing.assert_close(weights(model), weights(PPOPenalty(ActorCriticPolicy, "Pendulum-v1", **pair).learn(64)))


def test_the_actor_runs_once_per_minibatch() -> None:
    """64 steps of one environment: 3 epochs of 2 minibatches, and 3 passes more: looked at, frozen, measured."""
    np.random.seed(0)
    masked = MaskablePPOPenalty("MlpPolicy", InvalidActionEnvDiscrete(dim=5, n_invalid_actions=3), **SMALL)
    models = [masked, *(PPOPenalty(policy, "Pendulum-v1", **SMALL) for policy in ("MlpPolicy", OwnObject))]
    for model in models:
        calls: list[int] = []
        model.policy.action_net.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        train, during = model.train, []

        def counted(calls=calls, train=train, during=during) -> None:
            before = len(calls)
            train()
            during.append(len(calls) - before)

        model.train = counted
        model.learn(64)
        assert during == [6 + 3]


class Contradictory(ActorCriticPolicy):
    """Nothing that it can be asked for gives the log-probabilities that it trains on."""

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, 0.5 * log_prob, entropy


class Silent(Overriding):
    def get_distribution(self, obs):
        raise NotImplementedError("nobody asks")


@pytest.mark.parametrize(("policy", "message"), [(Contradictory, "gives the log-probabilities"), (Silent, "nobody asks")])
def test_a_distribution_that_cannot_be_found_is_an_error_of_the_penalty_alone(policy, message) -> None:
    with pytest.raises(ValueError, match=rf"`policy` must have a KL divergence.*{message}"):
        PPOPenalty(policy, "Pendulum-v1", **SMALL)
    logged = PPOClip(policy, "Pendulum-v1", **SMALL).learn(64).logger.name_to_value
    assert logged["train/kl_estimate"] > 0
    assert "train/kl" not in logged


def test_the_loss_and_the_log_use_the_tested_functions(monkeypatch) -> None:
    """A ratio that is always 1 has no gradient and no clip fraction; the critic's learns on."""
    monkeypatch.setattr(losses, "importance_ratio", lambda log_prob, old: th.ones_like(log_prob))
    model = PPOClip(ActorCriticPolicy, "Pendulum-v1", **SMALL)
    before = [parameter.clone() for parameter in (*model.policy.action_net.parameters(), *model.policy.value_net.parameters())]
    model.learn(64)
    after = [*model.policy.action_net.parameters(), *model.policy.value_net.parameters()]
    assert [th.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False, False]
    assert model.logger.name_to_value["train/clip_fraction"] == 0


# A distribution whose divergence nobody has told


class BetaDistribution(Distribution):
    """Beta on each dimension, stretched to Pendulum's torques from -2 to 2."""

    def proba_distribution_net(self, latent_dim):
        return th.nn.Linear(latent_dim, 2)

    def proba_distribution(self, parameters):
        self.distribution = Beta(*(softplus(parameters) + 1).chunk(2, dim=-1))
        return self

    def log_prob(self, actions):
        return (self.distribution.log_prob((actions + 2) / 4) - np.log(4)).sum(dim=-1)

    def entropy(self):
        return (self.distribution.entropy() + np.log(4)).sum(dim=-1)

    def sample(self):
        return 4 * self.distribution.sample().clamp(1e-6, 1 - 1e-6) - 2

    def mode(self):
        return 4 * self.distribution.mean - 2

    def actions_from_params(self, parameters, deterministic=False):
        return self.proba_distribution(parameters).get_actions(deterministic)

    def log_prob_from_params(self, parameters):
        actions = self.actions_from_params(parameters)
        return actions, self.log_prob(actions)


class KnownBeta(BetaDistribution):
    pass


class WrongBeta(BetaDistribution):
    pass


class BetaPolicy(ActorCriticPolicy):
    distribution_class = BetaDistribution

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        del self.log_std
        self.action_dist = self.distribution_class()
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


class KnownBetaPolicy(BetaPolicy):
    distribution_class = KnownBeta


class WrongBetaPolicy(BetaPolicy):
    distribution_class = WrongBeta


def concentrations(beta):
    return beta.distribution.concentration1, beta.distribution.concentration0


def beta_divergence(a, b, new_a, new_b):
    return kl.kl_divergence(Beta(a, b), Beta(new_a, new_b)).sum(dim=-1)


@pytest.fixture(autouse=True, scope="module")
def _known() -> None:
    register_divergence(KnownBeta, concentrations, beta_divergence)
    register_divergence(WrongBeta, concentrations, lambda a, b, c, d: kl.kl_divergence(Beta(a, b), Beta(c, d)))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": (0.5, 0.5), "target_kl": 0.1, "ent_coef": 0.01}])
def test_clip_trains_without_a_known_divergence(options, tmp_path) -> None:
    model = PPOClip(BetaPolicy, "Pendulum-v1", **SMALL, **options).learn(128)
    logged = model.logger.name_to_value
    assert 0 < logged["train/kl_estimate"] < 1
    assert logged["train/max_ratio"] > 1
    assert not {"train/kl", "train/kl_p99", "train/kl_max_state"} & set(logged)
    model.save(tmp_path / "model")
    PPOClip.load(tmp_path / "model", env=model.get_env()).learn(64, reset_num_timesteps=False)


def test_pairs_of_gradient_lengths_belong_to_actor_and_critic_of_any_policy() -> None:
    model = PPOClip(BetaPolicy, "Pendulum-v1", **SMALL, max_grad_norm=(0.5, 0.5)).learn(64)
    actor, critic = model._actor_and_critic()
    assert {name.split(".")[0] for name in (*actor, *critic)} == {"mlp_extractor", "action_net", "value_net"}
    assert all("policy_net" in name or "action_net" in name for name in actor)
    assert all("value_net" in name for name in critic)
    assert len(actor) == len(critic) == 6


def test_the_penalty_asks_for_a_divergence_before_it_collects(tmp_path) -> None:
    message = r"`policy` must have a KL divergence.*BetaDistribution.*register_divergence"
    with pytest.raises(ValueError, match=message):
        PPOPenalty(BetaPolicy, "Pendulum-v1", **SMALL)
    PPOClip(BetaPolicy, "Pendulum-v1", **SMALL).save(tmp_path / "clip")
    with pytest.raises(ValueError, match=message):
        PPOPenalty.load(tmp_path / "clip", clip_range=None)
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL)
    model.policy = BetaPolicy(model.observation_space, model.action_space, model.lr_schedule)
    with pytest.raises(ValueError, match=message):
        model.learn(64)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("guard", [None, "fixup"])
def test_a_registered_divergence_is_penalised_and_logged(guard, tmp_path) -> None:
    """The logged divergence is torch's own, between the policy that acted, from its file, and the one that was trained."""
    options = {"target_kl": 1e-4} if guard else {}
    model = PPOPenalty(KnownBetaPolicy, "Pendulum-v1", **SMALL, **options, guard=guard).learn(64)
    model.save(tmp_path / "before")
    model.learn(64, reset_num_timesteps=False)
    acted = PPOPenalty.load(tmp_path / "before").policy
    observations = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        old, new = (policy.get_distribution(observations).distribution for policy in (acted, model.policy))
        expected = kl.kl_divergence(old, new).sum(dim=-1)
    logged = model.logger.name_to_value
    assert logged["train/kl"] == pytest.approx(expected.mean().item(), rel=1e-3)
    assert logged["train/kl_max_state"] == pytest.approx(expected.max().item(), rel=1e-3)
    assert expected.mean() > 1e-6


def test_a_heavier_coefficient_holds_a_registered_distribution() -> None:
    kls = [
        PPOPenalty(KnownBetaPolicy, "Pendulum-v1", **{**SMALL, "n_epochs": 20}, vf_coef=0.0, kl_coef=kl_coef).learn(64)
        for kl_coef in (1e-3, 1000.0)
    ]
    light, heavy = (model.logger.name_to_value["train/kl"] for model in kls)
    assert light > 10 * heavy > 0


def test_a_registered_divergence_is_checked() -> None:
    with pytest.raises(ValueError, match=r"one number per state, shape \(2,\), got \(2, 1\)"):
        PPOPenalty(WrongBetaPolicy, "Pendulum-v1", **SMALL)


# The pieces


def test_an_evaluation_leaves_the_policy_as_it_was() -> None:
    policy = PPOPenalty(MlpPolicy, "Pendulum-v1", **SMALL).policy
    observations, actions = th.randn(5, 3), th.randn(5, 1)
    before = dict(vars(policy))
    evaluation = evaluate(policy, observations, actions, find_source(policy, observations, actions))
    assert vars(policy) == before
    th.testing.assert_close(evaluation.distribution().log_prob(actions), evaluation.log_prob, rtol=0, atol=0)
    policy.mlp_extractor.forward = None
    with pytest.raises(TypeError):
        evaluate(policy, observations, actions, "made")
    assert set(vars(policy)) == set(before)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_drift_is_that_of_evaluated_actions_with_and_without_the_critic(hooked) -> None:
    """A hook that only `evaluate_actions` runs through is no reason for another measure."""
    model = learned(ActorCriticPolicy)
    if hooked:
        model.policy.mlp_extractor.register_forward_hook(lambda module, args, out: (0.5 * out[0], out[1]))
    rollout = Transitions.of(model.rollout_buffer)
    with acting(model.policy):
        _, log_prob, _ = model.policy.evaluate_actions(rollout.observations, rollout.actions)
    asked = []
    model.policy.value_net.register_forward_hook(lambda *_: asked.append(hooked))
    _, log_ratio = model._evaluator(model._distribution_source).moved(rollout)
    assert th.equal(log_ratio, log_prob - rollout.old_log_prob)
    assert asked == [True] * hooked


def test_asking_leaves_each_module_in_its_mode() -> None:
    policy = PPOPenalty(
        "CnnPolicy", FakeImageEnv(screen_height=40, screen_width=40, n_channels=1), n_steps=8, batch_size=8
    ).policy
    policy.train()
    policy.features_extractor.eval()
    with acting(policy):
        assert not any(module.training for module in policy.modules())
        assert not policy(th.zeros(1, 1, 40, 40))[1].requires_grad
    assert policy.training
    assert not any(module.training for module in policy.features_extractor.modules())


def test_examples_are_members_away_from_the_bounds() -> None:
    huge = np.finfo(np.float32).max
    space = spaces.Dict(
        {
            "open": spaces.Box(-np.inf, np.inf, (2,)),
            "huge": spaces.Box(-huge, huge, (2,)),
            "narrow": spaces.Box(np.float32(0), np.float32(1), (50,)),
            "image": spaces.Box(0, 255, (4, 4, 1), np.uint8),
            "choice": spaces.Discrete(3),
            "several": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(4),
        }
    )
    made = example(space, rows=2)
    for key, part in space.spaces.items():
        assert all(part.contains(np.asarray(row) if part.shape else row) for row in made[key])
    assert made["narrow"].min() >= 0.25
    assert made["narrow"].max() <= 0.75
    assert np.abs(made["huge"]).max() < 10
    for key in space.spaces:
        np.testing.assert_array_equal(np.asarray(example(space, 2)[key]), np.asarray(made[key]))


class Shapes(gym.Env):
    def __init__(self, action_space):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,)), action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (2, 3)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)]
)
def test_example_actions_are_shaped_as_a_rollout_s(space) -> None:
    model = PPOClip("MlpPolicy", Shapes(space), n_steps=4, batch_size=4).learn(4)
    collected, made = Transitions.of(model.rollout_buffer).actions, example_actions(model.policy, rows=4)
    assert (made.shape, made.dtype) == (collected.shape, collected.dtype)
