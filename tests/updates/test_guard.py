"""The guard: where it leaves the policy, that the critic goes on, and that what it promises holds whatever the step size."""

import json
import math
import zipfile
from copy import deepcopy

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_penalty import Guard, PPOPenalty
from sb3_ppo_penalty.objectives.divergence import ActionParameters, kl_divergence, parameters_of
from sb3_ppo_penalty.updates.update import Update

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 6, "seed": 0}
TINY = {"net_arch": [16]}
#: The divergence passes 4 * 0.005 in the third of six epochs: 0.0129 after the second, 0.0213 after the third
THIRD = {"learning_rate": 5e-3, "target_kl": 0.005, "max_grad_norm": math.inf, "policy_kwargs": TINY}
#: States of which the percentile, the 198th, is not the largest
MANY = {"n_steps": 200, "batch_size": 100, "n_epochs": 2}


def made(env="Pendulum-v1", **options) -> PPOPenalty:
    return PPOPenalty(**{"policy": "MlpPolicy", "env": env, **SMALL, "policy_kwargs": TINY, **options})


def third(**options) -> PPOPenalty:
    model = made(**{**THIRD, **options})
    return model.learn(model.n_steps)


def weights_of(model: PPOPenalty, critic: bool) -> list[th.Tensor]:
    return [weight for name, weight in model.policy.named_parameters() if ("value" in name) == critic]


def moments_of(model: PPOPenalty, critic: bool) -> list[th.Tensor]:
    state = model.policy.optimizer.state
    return [state[weight][key] for weight in weights_of(model, critic) for key in ("step", "exp_avg", "exp_avg_sq")]


def equal(ours: list[th.Tensor], theirs: list[th.Tensor]) -> bool:
    return all(th.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def logged(model: PPOPenalty, key: str) -> float:
    return model.logger.name_to_value[f"train/{key}"]


def distributions(model: PPOPenalty, observations) -> ActionParameters:
    model.policy.set_training_mode(False)
    with th.no_grad():
        return deepcopy(parameters_of(model.policy.get_distribution(th.as_tensor(observations))))


class Acted(BaseCallback):
    """Keeps how the policy acted in the last rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.observations = self.model.rollout_buffer.observations[:, 0].copy()
        self.old = distributions(self.model, self.observations)

    def divergences(self) -> th.Tensor:
        """KL(old || new) in every state of the rollout, from the two policies and nothing that the update left."""
        return kl_divergence(self.old, distributions(self.model, self.observations))


# --- what it promises

SPACES = {
    "Box, fixed": ("Pendulum-v1", {}),
    "Box, learned": ("Pendulum-v1", {"policy_kwargs": {**TINY, "learn_covariance": True}}),
    "Box, full": ("Reacher-v5", {"policy_kwargs": {**TINY, "covariance": [[0.5, 0.2], [0.2, 0.4]]}}),
    "gSDE": ("Pendulum-v1", {"use_sde": True}),
    "SB3's own policy": ("Pendulum-v1", {"policy": ActorCriticPolicy}),
    "Discrete": ("CartPole-v1", {}),
    "MultiDiscrete": (lambda: IdentityEnvMultiDiscrete(4), {}),
    "MultiBinary": (lambda: IdentityEnvMultiBinary(4), {}),
}
MEASURES = {"mean": th.mean, "p99": lambda kls: kls.sort().values[-2], "max": th.max}  # of 128 states: ceil(0.99 * 128) = 127


@pytest.mark.parametrize("action", ["rollback", "fixup"])
@pytest.mark.parametrize("space", SPACES)
def test_the_divergence_never_exceeds_the_bound_whatever_the_learning_rate(space: str, action: str) -> None:
    env, options = SPACES[space]
    went_too_far = 0
    for learning_rate, measure in ((1e-1, "mean"), (1.0, "p99"), (10.0, "max")):
        guard = Guard(action, max_kl_factor=3.0, measure=measure, max_passes=3)
        model = made(
            env if isinstance(env, str) else env(),
            n_steps=128,
            batch_size=64,
            n_epochs=2,
            guard=guard,
            learning_rate=learning_rate,
            target_kl=0.01,
            **options,
        )
        for _ in range(2):
            model.learn(128, callback=(acted := Acted()), reset_num_timesteps=False)
            assert MEASURES[measure](acted.divergences()).item() <= 0.03 * (1 + 1e-5)
            assert logged(model, "guard_acted") == (logged(model, "guard_kl") > 0.03)
            went_too_far += logged(model, "guard_kl") > 1
    assert went_too_far >= 2  # there was something to hold


def test_without_a_guard_these_learning_rates_go_far_beyond() -> None:
    for learning_rate in (1e-1, 1.0, 10.0):
        model = made(n_epochs=2, learning_rate=learning_rate)
        model.learn(64, callback=(acted := Acted()))
        assert acted.divergences().mean().item() > 0.06


# --- where the policy is left


def test_stop_leaves_the_policy_after_the_epoch_that_went_too_far() -> None:
    model, three, six = third(guard="stop"), third(n_epochs=3), third()
    assert (logged(model, "guard_acted"), logged(model, "guard_epochs"), logged(model, "guard_rolled_back")) == (1, 3, 0)
    assert logged(model, "guard_kl") == logged(model, "kl") == pytest.approx(logged(three, "kl"))
    assert logged(model, "kl") > 0.02
    assert equal(weights_of(model, critic=False), weights_of(three, critic=False))
    assert equal(moments_of(model, critic=False), moments_of(three, critic=False))
    assert not equal(weights_of(six, critic=False), weights_of(three, critic=False))


def test_rollback_returns_the_policy_and_its_moments_to_the_last_epoch_inside() -> None:
    model, two = third(guard="rollback"), third(n_epochs=2)
    assert (logged(model, "guard_acted"), logged(model, "guard_epochs"), logged(model, "guard_rolled_back")) == (1, 2, 1)
    assert logged(model, "guard_kl") > 0.02 > logged(model, "kl") == pytest.approx(logged(two, "kl"))
    assert equal(weights_of(model, critic=False), weights_of(two, critic=False))
    assert equal(moments_of(model, critic=False), moments_of(two, critic=False))


@pytest.mark.parametrize("action", ["stop", "rollback"])
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.SGD])
def test_the_critics_epochs_go_on_as_if_nothing_had_happened(action: str, optimizer) -> None:
    """Two networks, no common clipping: the critic's way does not depend on the policy's."""
    kwargs = {**TINY, "optimizer_class": optimizer}
    rate = 5e-3 if optimizer is th.optim.Adam else 0.3
    kwargs |= {"optimizer_kwargs": {"momentum": 0.9}} if optimizer is th.optim.SGD else {}
    options = {"policy_kwargs": kwargs, "learning_rate": rate, "vf_coef": 1e-4}
    model, six = third(guard=action, **options), third(**options)
    assert logged(model, "guard_epochs") < 6
    assert model._n_updates == 6
    assert not equal(weights_of(model, critic=False), weights_of(six, critic=False))
    assert equal(weights_of(model, critic=True), weights_of(six, critic=True))
    if optimizer is th.optim.Adam:
        assert equal(moments_of(model, critic=True), moments_of(six, critic=True))


def test_no_step_of_the_critics_epochs_moves_the_policy() -> None:
    model = made(n_epochs=3, learning_rate=1.0, guard="rollback")
    before, seen = model.policy.action_net.weight.detach().clone(), []
    model.policy.action_net.register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))
    model.learn(64)
    assert logged(model, "guard_epochs") == 0
    # Two epochs of two minibatches, and the look at what came of it
    assert equal(seen[-5:], [before] * 5)
    assert not equal(seen[-6:], [before] * 6)


def test_fixup_brings_the_policy_just_inside_by_lowering_the_divergence() -> None:
    stopped, model = third(guard="stop"), third(guard="fixup")
    assert (logged(model, "guard_acted"), logged(model, "guard_epochs"), logged(model, "guard_rolled_back")) == (1, 3, 0)
    assert logged(model, "guard_passes") >= 1
    assert logged(model, "guard_kl") == logged(stopped, "kl") > 0.02
    assert 0.01 < logged(model, "kl") <= 0.02


def test_fixup_leaves_minibatches_inside_the_bound_alone() -> None:
    """A single state is beyond: of two minibatches one makes a step, where two epochs of two have made four."""
    # Without momentum, which would carry other states on
    options = {"n_epochs": 2, "policy_kwargs": {**TINY, "optimizer_kwargs": {"betas": (0.0, 0.999)}}}
    largest = logged(third(**options), "kl_max_state")
    model = third(**options, guard=Guard("fixup", 0.99 * largest / 0.005, "max"))
    assert (logged(model, "guard_passes"), logged(model, "guard_rolled_back")) == (1, 0)
    assert logged(model, "kl_max_state") < 0.99 * largest
    assert model.policy.optimizer.state[model.policy.action_net.weight]["step"].item() == 5


def test_fixup_that_does_not_get_inside_is_a_rollback() -> None:
    model = made(n_epochs=2, learning_rate=10.0, guard=Guard("fixup", max_passes=2))
    before = deepcopy(weights_of(model, critic=False))
    model.learn(64)
    assert (logged(model, "guard_passes"), logged(model, "guard_rolled_back"), logged(model, "guard_epochs")) == (2, 1, 0)
    assert equal(weights_of(model, critic=False), before)


class Normed(BaseFeaturesExtractor):
    """A trunk with weights and with running means."""

    def __init__(self, observation_space) -> None:
        super().__init__(observation_space, features_dim=4)
        self.layers = th.nn.Sequential(th.nn.Linear(3, 4), th.nn.BatchNorm1d(4, momentum=0.5))

    def forward(self, observations):
        return self.layers(observations)


@pytest.mark.parametrize("n_epochs", [1, 3])
def test_what_actor_and_critic_share_belongs_to_the_policy(n_epochs: int) -> None:
    kwargs = {**TINY, "features_extractor_class": Normed}
    model = made(n_epochs=n_epochs, learning_rate=1.0, guard="rollback", policy_kwargs=kwargs)
    before = deepcopy(model.policy.state_dict())
    model.learn(64, callback=(acted := Acted()))
    assert logged(model, "guard_epochs") == 0
    same = {name for name, tensor in model.policy.state_dict().items() if th.equal(tensor, before[name])}
    trunk_and_actor = {name for name in before if "value_net" not in name}
    # The critic comes back too, because it fits that trunk; in the epochs that are left its own weights learn
    assert same == (set(before) if n_epochs == 1 else trunk_and_actor)
    assert {name for name in before if "running" in name} <= same
    assert acted.divergences().max().item() < 1e-6


# --- what follows from it


def test_the_coefficient_follows_what_the_guard_measured() -> None:
    """The policy is where it was, and the adaptive rule would take that for a penalty that is too heavy."""
    model = made(n_epochs=2, learning_rate=1.0, guard="rollback").learn(64)
    assert logged(model, "kl") == 0
    assert logged(model, "guard_kl") > 1
    assert (model.kl_coef, logged(model, "kl_coef_change")) == (2.0, 1)
    model.learning_rate = 0.0
    model._setup_lr_schedule()
    model.learn(64, reset_num_timesteps=False)
    assert (logged(model, "guard_acted"), logged(model, "guard_epochs"), model.kl_coef) == (0, 2, 1.0)


@pytest.mark.parametrize("action", ["stop", "rollback", "fixup"])
@pytest.mark.parametrize(("measure", "key"), [("p99", "kl_p99"), ("max", "kl_max_state")])
def test_the_controller_is_told_the_mean_whatever_the_guard_measures(measure: str, key: str, action: str) -> None:
    """Between the mean and the measured divergence the adaptive rule lowers the coefficient, as it does without a guard."""
    free = third(**MANY)
    threshold = 0.5 * (logged(free, "kl") + logged(free, key))
    guard = Guard(action, 0.99 * logged(free, key) / 0.005, measure)
    model = third(**MANY, guard=guard, kl_min=threshold, kl_max=threshold)
    assert logged(model, "guard_acted") == 1
    assert logged(model, "guard_kl") == pytest.approx(logged(free, key))
    assert logged(model, "guard_mean_kl") == pytest.approx(logged(free, "kl"))
    assert model.kl_coef == logged(model, "kl_coef") == 0.5
    controlled = third(**MANY, guard=guard, kl_controller=lambda reading: reading.kl)
    assert controlled.kl_coef == pytest.approx(logged(free, "kl"))


def test_the_measure_decides() -> None:
    """Mean, percentile and largest divergence lie apart: a bound between two of them is passed by some alone."""
    free = third(**MANY)
    mean, percentile, largest = (logged(free, key) for key in ("kl", "kl_p99", "kl_max_state"))
    assert (percentile > 1.5 * mean, largest > 1.005 * percentile) == (True, True)

    def acted(bound: float) -> dict[str, float]:
        measures = ("mean", "p99", "max")
        return {each: logged(third(**MANY, guard=Guard("stop", bound / 0.005, each)), "guard_acted") for each in measures}

    assert acted(math.sqrt(mean * percentile)) == {"mean": 0, "p99": 1, "max": 1}
    assert acted(math.sqrt(percentile * largest)) == {"mean": 0, "p99": 0, "max": 1}


def test_the_bound_follows_a_schedule_of_the_target() -> None:
    model = made(n_epochs=2, guard="rollback", target_kl=lambda progress: 0.01 * progress).learn(64)
    # At the end of the schedule the bound is 0: nothing may move, and nothing has
    assert logged(model, "guard_acted") == 1
    assert logged(model, "kl") == 0


def test_no_guard_no_look(monkeypatch) -> None:
    looks = []
    measure = Update.drift_of
    monkeypatch.setattr(Update, "drift_of", lambda self, rollout: looks.append(0) or measure(self, rollout))
    monkeypatch.setattr(PPOPenalty, "_actor_and_critic", None)
    model = third()
    assert len(looks) == 1
    assert not [key for key in model.logger.name_to_value if "guard" in key]


def test_an_update_that_is_not_finite_is_undone_as_without_a_guard() -> None:
    model = made(guard="rollback").learn(64)
    before = deepcopy(model.policy.state_dict())
    model.learning_rate = 1e30
    model._setup_lr_schedule()
    with pytest.raises(FloatingPointError, match="The update was undone"):
        model.learn(64, reset_num_timesteps=False)
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


# --- how it is asked for


def test_it_can_be_asked_for_by_name_by_dict_and_by_object() -> None:
    assert made().guard is None
    assert made(guard="stop").guard == Guard("stop", max_kl_factor=4.0, measure="mean")
    assert made(guard={"action": "fixup", "measure": "max"}).guard == Guard("fixup", measure="max")
    assert made(guard=Guard("rollback", 2.0)).guard.max_kl_factor == 2.0


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("halt", r"`guard.action` must be one of \['stop', 'rollback', 'fixup'\], got 'halt'"),
        (True, "`guard` must be"),
        ({"max_kl_factor": 2.0}, "`guard` must be"),
        ({"action": "stop", "factor": 2.0}, "`guard` must be"),
        ({"action": None}, "`guard.action` must be"),
        ({"action": "stop", "measure": "median"}, "`guard.measure` must be"),
        ({"action": "stop", "max_kl_factor": 0}, "`guard.max_kl_factor` must be"),
        ({"action": "stop", "max_kl_factor": math.inf}, "`guard.max_kl_factor` must be"),
        ({"action": "fixup", "max_passes": 0}, "`guard.max_passes` must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(guard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(guard=guard)


def test_it_survives_save_and_load_and_nothing_of_an_update_reaches_the_file(tmp_path) -> None:
    third(guard=Guard("fixup", 2.0, "p99", 7)).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert "_guard_report" not in json.loads(archive.read("data"))
    assert PPOPenalty.load(tmp_path / "model.zip").guard == Guard("fixup", 2.0, "p99", 7)
    assert PPOPenalty.load(tmp_path / "model.zip", guard="stop").guard == Guard("stop")
    with pytest.raises(ValueError, match="`guard"):
        PPOPenalty.load(tmp_path / "model.zip", guard="halt")
