"""Controllers, schedules and shapes of the penalty inside PPOPenalty: each does what it says, and survives what users do."""

import json
import math
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.algorithms.proximal import Drift
from sb3_ppo_penalty.objectives.divergence import kl_divergence, parameters_of
from sb3_ppo_penalty.objectives.kl_controllers import AdaptiveRule, DualAscent, KLReading, Proportional
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 4, "seed": 0}


def model_with(**options) -> PPOPenalty:
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **{**SMALL, **options})
    model.set_logger(configure(None, []))
    return model


def follow(model: PPOPenalty, *kls: float) -> list[float]:
    """The coefficients after updates with these divergences."""
    model.set_logger(configure(None, []))
    seen = []
    for kl in kls:
        model._after_update(Drift(**{**dict.fromkeys(Drift._fields, 1.0), "kl": kl}))
        seen.append(model.kl_coef)
    return seen


class Counting:
    """A user's own controller, with a memory."""

    def __init__(self) -> None:
        self.seen: list[KLReading] = []

    def __call__(self, reading: KLReading) -> float:
        self.seen.append(reading)
        return float(len(self.seen))


CONTROLLERS = {
    "adaptive": ("adaptive", [2.0, 2.0, 1.0]),
    "fixed": ("fixed", [1.0, 1.0, 1.0]),
    # the square root of 3 and of 1, and no less than half
    "proportional": ("proportional", [math.sqrt(3), math.sqrt(3), math.sqrt(3) / 2]),
    "proportional, its exponent": ({"name": "proportional", "exponent": 0.25}, [3**0.25, 3**0.25, 3**0.25 / 2]),
    "one's own function": (lambda reading: reading.kl_coef + 100 * reading.kl, [4.0, 5.0, 5.0]),
    "one's own object": (Counting(), [1.0, 2.0, 3.0]),
}


# --- controllers


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_controller_moves_the_coefficient(name) -> None:
    controller, expected = CONTROLLERS[name]
    model = model_with(kl_controller=controller)
    assert follow(model, 0.03, 0.01, 0.0) == pytest.approx(expected)
    assert type(model.kl_coef) is float
    assert model.logger.name_to_value["train/kl_coef"] == pytest.approx(expected[-1])


def test_dual_ascent_moves_the_coefficient() -> None:
    # Adam's first steps on a gradient that stays are the learning rate: e^0.3 each
    assert follow(model_with(kl_controller={"name": "dual", "learning_rate": 0.3}), 0.02, 0.02) == pytest.approx(
        [1.34985881, 1.82211880], rel=1e-6
    )


def test_a_controller_is_told_what_was_measured_and_what_is_aimed_at() -> None:
    model = model_with(kl_controller=Counting(), kl_coef=3.0, target_kl=0.05, kl_min=0.01, kl_coef_factor=1.5)
    follow(model, 0.03)
    assert model.kl_controller.seen == [KLReading(3.0, 0.03, 0.05, 0.01, pytest.approx(0.075), 1.5)]


def test_learning_uses_the_controller() -> None:
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, kl_controller=Counting(), learning_rate=3e-3).learn(192)
    logged = model.logger.name_to_value
    assert [seen.kl_coef for seen in model.kl_controller.seen] == [1.0, 1.0, 2.0]
    assert model.kl_controller.seen[-1].kl == logged["train/kl"] > 1e-6
    assert (logged["train/kl_coef"], logged["train/kl_coef_change"]) == (3.0, 1)


@pytest.mark.parametrize("controller", ["adaptive", "proportional", "dual", lambda reading: reading.kl_coef * 1.7])
def test_bounds_and_saturation_hold_for_every_controller(controller) -> None:
    model = model_with(kl_controller=controller, kl_coef_bounds=(0.9, 1.05))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert follow(model, *[1.0] * 9) == [1.05] * 9
        assert not told
        assert follow(model, *[1.0] * 30) == [1.05] * 30
    assert [str(warning.message)[:42] for warning in told] == ["`kl_coef` has stood at its bound 1.05 for "[:42]]


def test_a_coefficient_at_the_lowest_default_is_told_of() -> None:
    model = model_with(kl_coef=0.0011)
    with pytest.warns(RuntimeWarning, match=r"`kl_coef` has stood at its bound 0.001 for 10 updates: the policy moves less"):
        assert follow(model, *[1e-6] * 30)[-1] == 1e-3


def test_a_floor_of_the_users_own_is_no_saturation() -> None:
    model = model_with(kl_coef=2.0, kl_coef_bounds=(2.0, 1e3))  # warnings are errors here
    assert follow(model, *[1e-6] * 30) == [2.0] * 30


def test_a_fixed_coefficient_is_no_saturated_one() -> None:
    model = model_with(kl_controller="fixed", kl_coef=1e3)  # at its bound; warnings are errors here
    assert follow(model, *[1.0] * 30) == [1e3] * 30


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_no_controller_sees_a_divergence_that_is_not_finite(kl) -> None:
    model = model_with(kl_controller=Counting(), kl_coef=7.0)
    with pytest.warns(RuntimeWarning, match=f"KL.* is {kl}: `kl_coef` stays at 7"):
        assert follow(model, kl) == [7.0]
    assert model.kl_controller.seen == []
    model.kl_coef = np.float32(2)  # as a callback may have it
    with pytest.warns(RuntimeWarning, match="stays at 2"):
        follow(model, kl)
    assert type(model.kl_coef) is float


@pytest.mark.parametrize("wrong", [math.nan, None, "2", True])
def test_what_a_controller_may_not_return(wrong) -> None:
    with pytest.raises(ValueError, match=r"`kl_controller\(reading\)` must be a number, got"):
        follow(model_with(kl_controller=lambda reading: wrong), 0.01)


@pytest.mark.parametrize(("returned", "granted"), [(math.inf, 1e3), (-1.0, 1e-3), (np.float32(2.5), 2.5), (3, 3.0)])
def test_what_it_may_return_comes_inside_the_bounds(returned, granted) -> None:
    model = model_with(kl_controller=lambda reading: returned)
    assert follow(model, 0.01) == [granted]
    assert type(model.kl_coef) is float


def test_a_callback_may_set_the_coefficient() -> None:
    class Set(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.model.kl_coef = 2

    for controller, expected in (("fixed", 2.0), (lambda reading: 10 * reading.kl_coef, 20.0)):
        model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, kl_controller=controller)
        model.learn(128, callback=Set())
        assert model.kl_coef == model.logger.name_to_value["train/kl_coef"] == expected
        assert type(model.kl_coef) is float


# --- files


@pytest.mark.parametrize(
    "controller",
    ["adaptive", "fixed", "proportional", "dual", Counting()],
    ids=lambda own: own if isinstance(own, str) else "own",
)
def test_a_controller_goes_on_where_it_was_saved(tmp_path, controller) -> None:
    kls = [0.031, 0.0002, 0.013, 0.5, 0.007]
    model = model_with(kl_controller=controller, kl_coef=1.3, learning_rate=3e-3)
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = PPOPenalty.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert vars(loaded.kl_controller) == vars(model.kl_controller)
    assert loaded.kl_coef == model.kl_coef
    assert follow(loaded, *kls) == follow(model, *kls)  # bit for bit
    before = dict(vars(loaded.kl_controller))
    loaded.learn(64, reset_num_timesteps=False)
    if controller == "dual":
        assert (before["steps"], loaded.kl_controller.steps) == (7, 8)


def test_the_coefficient_is_readable_in_the_file_and_the_options_are(tmp_path) -> None:
    model = model_with(kl_controller="dual", kl_penalty={"direction": "symmetric", "cutoff_coef": 10.0})
    follow(model, 0.02)
    model.save(tmp_path / "model.zip")
    saved = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert saved["kl_coef"] == model.kl_coef == pytest.approx(math.exp(0.1))
    assert saved["kl_controller"]["steps"] == 1
    assert saved["kl_controller"]["mean"] == pytest.approx(0.1)
    assert {"direction": "symmetric", "cutoff_coef": 10.0}.items() <= saved["kl_penalty"].items()


def test_options_can_be_exchanged_at_load(tmp_path) -> None:
    model = model_with(kl_controller="dual", kl_penalty="symmetric", kl_coef=3.0)
    follow(model, 0.02, 0.02)
    model.save(tmp_path / "model.zip")

    def load(**options) -> PPOPenalty:
        return PPOPenalty.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), **options)

    assert load().kl_penalty == KLPenalty("symmetric")
    assert load(kl_coef=5.0).kl_coef == 5.0
    assert load(kl_coef=5.0).kl_controller.steps == 2
    other = load(kl_controller="proportional", kl_penalty={"cutoff_coef": 5.0}, max_ratio=3.0)
    assert (other.kl_controller, other.kl_penalty, other.max_ratio) == (Proportional(), KLPenalty(cutoff_coef=5.0), 3.0)
    assert other.kl_coef == model.kl_coef
    assert load(kl_controller="dual").kl_controller == DualAscent()  # a new one remembers nothing
    other.learn(64)
    for wrong in ({"kl_controller": "duel"}, {"kl_penalty": "sideways"}, {"kl_min": lambda _: -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}"):
            load(**wrong)


def test_two_models_share_no_memory() -> None:
    controller = DualAscent()
    models = [model_with(kl_controller=controller) for _ in range(2)]
    follow(models[0], 0.02, 0.02)
    assert [model.kl_controller.steps for model in models] == [2, 0]


def test_a_file_from_before_the_options_loads(tmp_path) -> None:
    model = model_with(kl_coef=3.0)
    model.save(tmp_path / "model.zip", exclude=["kl_controller", "kl_penalty"])
    loaded = PPOPenalty.load(tmp_path / "model.zip")
    assert (loaded.kl_controller, loaded.kl_penalty, loaded.kl_coef) == (AdaptiveRule(), KLPenalty(), 3.0)


# --- schedules


def at(model: PPOPenalty, progress: float) -> tuple[float, ...]:
    model._current_progress_remaining = progress
    return (model.current_target_kl, *model.kl_thresholds)


def test_the_target_and_its_band_follow_a_schedule() -> None:
    model = model_with(target_kl=LinearSchedule(0.03, 0.012, 1.0))
    assert at(model, 1.0) == pytest.approx((0.03, 0.02, 0.045))
    # half-way 0.021: / 1.5 and * 1.5
    assert at(model, 0.5) == pytest.approx((0.021, 0.014, 0.0315))
    assert at(model, 0.0) == pytest.approx((0.012, 0.008, 0.018))


@pytest.mark.parametrize(
    "schedule", [lambda p: 0.02 * p, FloatSchedule(0.02), ConstantSchedule(0.02), lambda p: np.float32(0.02)]
)
def test_thresholds_follow_schedules(schedule) -> None:
    model = model_with(kl_min=schedule, kl_max=lambda p: 0.03 + 0.02 * p)
    target, low, high = at(model, 1.0)
    assert (target, low, high) == pytest.approx((0.01, 0.02, 0.05))
    assert type(low) is float


def test_schedules_are_followed_and_logged_in_training(tmp_path) -> None:
    schedules = {"target_kl": LinearSchedule(0.03, 0.01, 1.0), "kl_min": lambda p: 0.004 * (1 + p), "kl_max": lambda p: 10.0}
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, **schedules)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(256)
    model.logger.close()
    rows = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    # logged before the update of the same row: after 1, 2 and 3 quarters
    assert rows["traintarget_kl"][1:].tolist() == pytest.approx([0.025, 0.02, 0.015])
    assert rows["traintarget_kl_min"][1:].tolist() == pytest.approx([0.007, 0.006, 0.005])
    assert rows["traintarget_kl_max"][1:].tolist() == [10.0] * 3
    model.save(tmp_path / "model.zip")
    loaded = PPOPenalty.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"))
    assert at(loaded, 0.5) == pytest.approx((0.02, 0.006, 10.0))
    loaded.learn(64, reset_num_timesteps=False)


def test_a_number_stays_readable_in_the_file(tmp_path) -> None:
    model_with(target_kl=0.02, kl_min=0.001, kl_max=1.0).save(tmp_path / "model.zip")
    saved = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert (saved["target_kl"], saved["kl_min"], saved["kl_max"]) == (0.02, 0.001, 1.0)


def test_a_schedule_that_ends_at_zero_as_rl_zoos_do() -> None:
    for controller in ("adaptive", "proportional", "dual"):
        model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, target_kl=lambda p: 0.02 * p, kl_controller=controller)
        model.learn(128)
        assert model.logger.name_to_value["train/target_kl"] == 0
        assert model.logger.name_to_value["train/kl_coef_change"] == 1


def root(progress: float) -> float:
    """A schedule that has no value at all below 0: math.sqrt raises there."""
    return 0.02 * math.sqrt(progress)


@pytest.mark.parametrize("schedule", [lambda p: 0.02 * p, LinearSchedule(0.02, 0.0, 1.0), FloatSchedule(root), root])
@pytest.mark.parametrize("names", [("target_kl",), ("kl_min",), ("kl_min", "kl_max"), ("target_kl", "kl_min", "kl_max")])
def test_schedules_rest_at_their_end_where_training_overshoots(schedule, names) -> None:
    """100 steps in rollouts of 64: the last update is made at a remaining progress of -0.28."""
    others = {"kl_max": 0.03} if names == ("kl_min",) else {}
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, **dict.fromkeys(names, schedule), **others)
    model.learn(100)
    assert model._current_progress_remaining == pytest.approx(-0.28)
    for name in names:
        key = f"train/{name if name == 'target_kl' else f'target_{name}'}"
        assert dict(model.logger.name_to_value)[key] == 0
    if "target_kl" in names:
        assert model.current_target_kl == 0
    if "kl_max" in names:
        assert model.kl_thresholds == (0, 0)
    model.learn(100, reset_num_timesteps=False)


def test_a_covariance_rests_at_its_end_where_training_overshoots() -> None:
    """Stock PPO's next training begins with the progress that its last one left."""
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, policy_kwargs={"covariance": lambda p: 0.1 + 0.4 * p}).learn(100)
    model.policy.update_covariance(model._current_progress_remaining)
    assert model.policy.covariance.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize(
    "number",
    [np.float32, np.asarray, th.tensor, lambda x: th.tensor([x]), lambda x: 1],
    ids=["numpy", "array", "tensor", "tensor of one", "integer"],
)
def test_schedules_may_return_whatever_holds_one_number(number) -> None:
    schedules = {name: lambda p: number(0.125) for name in ("learning_rate", "clip_range", "clip_range_vf", "target_kl")}
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **SMALL, **schedules, kl_controller=lambda reading: number(0.125))
    model.learn(64)
    assert (model.current_target_kl, model.kl_coef, model.clip_range(0.5)) == (float(number(0.125)),) * 3
    assert type(model.current_target_kl) is type(model.kl_coef) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kl": lambda p: th.tensor([0.1, 0.1])}, r"`target_kl\(1\)` must be a finite number at least 0, got tensor"),
        ({"learning_rate": lambda p: np.zeros(2)}, r"`learning_rate\(1\)` must be"),
        ({"target_kl": lambda p: p - 0.5}, r"`target_kl\(0\)` must be a finite number at least 0, got -0.5"),
        ({"target_kl": lambda p: math.nan}, r"`target_kl\(1\)` must be"),
        ({"target_kl": lambda p: None}, r"`target_kl\(1\)` must be"),
        ({"kl_min": lambda p: "0.01"}, r"`kl_min\(1\)` must be"),
        ({"kl_max": lambda p: math.inf}, r"`kl_max\(1\)` must be"),
        ({"kl_min": lambda p: 0.02 - 0.01 * p}, r"`kl_min` must be such that kl_min <= kl_max, got \(0.02, 0.015\)"),
        ({"kl_max": lambda p: 0.02 * p}, r"`kl_max` must be such that"),
        ({"target_kl": "lin_0.02"}, "`target_kl` must be a finite number above 0 or a schedule or None, got 'lin_0.02'"),
    ],
)
def test_schedules_that_cannot_be_meant(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        model_with(**arguments)


def test_a_schedule_that_goes_wrong_half_way_is_named_before_the_update() -> None:
    model = model_with(target_kl=lambda p: -1.0 if p == 0.5 else 0.01)
    before = None

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            nonlocal before
            before = [parameter.detach().clone() for parameter in self.model.policy.parameters()]

    with pytest.raises(ValueError, match=r"`target_kl\(0.5\)` must be a finite number at least 0, got -1"):
        model.learn(128, callback=Keep())
    assert all(th.equal(*pair) for pair in zip(model.policy.parameters(), before, strict=True))


def test_ppo_clips_target_is_a_number() -> None:
    with pytest.raises(ValueError, match="`target_kl` must be a finite number above 0 or None"):
        PPOClip("MlpPolicy", "Pendulum-v1", **SMALL, target_kl=lambda p: 0.01)


# --- shapes of the penalty


class Nothing(gym.RewardWrapper):
    """An environment in which nothing is to be gained."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))

    def reward(self, reward):
        return 0.0


def spread_where_entropy_and_penalty_balance(**options) -> PPOPenalty:
    """
    One update, gone on with until it converges, of a policy whose spread of 1 may grow and whose advantages are all 0.

    It maximises log s - beta * D(s) in the standard deviation s.
    """
    settings = {
        "n_steps": 32,
        "batch_size": 32,
        "n_epochs": 150,
        "seed": 0,
        "learning_rate": 0.02,
        "normalize_advantage": False,
    }
    settings |= {"gamma": 0.0, "vf_coef": 0.0, "ent_coef": 1.0, "max_grad_norm": math.inf, "kl_controller": "fixed"}
    policy_kwargs = {"learn_covariance": True, "covariance": 1.0}
    model = PPOPenalty("MlpPolicy", Nothing(), **settings, policy_kwargs=policy_kwargs, **options)
    with th.no_grad():
        for weight in model.policy.value_net.parameters():
            weight.zero_()  # a prediction of exactly 0, as the return is
    return model.learn(32)


@pytest.mark.parametrize(
    ("direction", "variance"),
    [
        # D = log s + 1 / (2 s^2) - 1/2: 1 - beta + beta / s^2 = 0
        pytest.param("old_new", 2.0, id="old_new"),
        # D = s^2 / 2 - log s - 1/2: 1 + beta - beta s^2 = 0
        pytest.param("new_old", 1.5, id="new_old"),
        # half the sum of the two: s^4 - s^2 - 1 = 0, the golden ratio
        pytest.param("symmetric", 1.618034, id="symmetric"),
    ],
)
def test_each_direction_rests_where_its_own_divergence_balances_the_entropy(direction, variance) -> None:
    model = spread_where_entropy_and_penalty_balance(kl_coef=2.0, kl_penalty=direction)
    assert model.policy.log_std.exp().item() ** 2 == pytest.approx(variance, rel=2e-3)


@pytest.mark.parametrize("per_state", [False, True])
def test_the_cutoff_holds_where_a_weak_penalty_does_not(per_state) -> None:
    """All states move alike here, so both cutoffs are the same: c (D - 2 d)^2 lets D go to just above 2 d, here 0.1."""
    free = spread_where_entropy_and_penalty_balance(kl_coef=1e-3, target_kl=0.05)
    shape = KLPenalty(cutoff_coef=1000.0, per_state=per_state)
    held = spread_where_entropy_and_penalty_balance(kl_coef=1e-3, target_kl=0.05, kl_penalty=shape)
    assert free.logger.name_to_value["train/kl"] > 1
    assert 0.1 < held.logger.name_to_value["train/kl"] < 0.102


def test_the_cutoff_follows_the_schedule_of_the_target() -> None:
    held = spread_where_entropy_and_penalty_balance(
        kl_coef=1e-3, target_kl=LinearSchedule(1.0, 0.02, 1.0), kl_penalty={"cutoff_coef": 1000.0}
    )
    assert 0.04 < held.logger.name_to_value["train/kl"] < 0.043


def furthest_state(tmp_path, **options) -> tuple[float, float]:
    """Mean and largest divergence of single states in an update with a far too high learning rate."""
    settings = {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "seed": 0, "vf_coef": 0.0}
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", **settings, learning_rate=3e-3, kl_controller="fixed", **options)
    model.save(tmp_path / "before")
    model.learn(256)
    observations = th.as_tensor(model.rollout_buffer.observations)
    policies = PPOPenalty.load(tmp_path / "before").policy, model.policy
    with th.no_grad():
        kl = kl_divergence(*(parameters_of(policy.get_distribution(observations)) for policy in policies))
    return kl.mean().item(), kl.max().item()


def test_the_cutoff_per_state_holds_the_state_that_goes_furthest(tmp_path) -> None:
    options = {"target_kl": 0.01, "kl_coef": 1e-3}
    figures = [
        furthest_state(tmp_path, **options, kl_penalty=shape)
        for shape in ({}, {"cutoff_coef": 1000.0}, {"cutoff_coef": 1000.0, "per_state": True})
    ]
    (free, _), (mean, furthest), (_, furthest_held) = figures
    assert free > 0.1 > 0.03 > mean
    assert furthest > 0.05 > 0.03 > furthest_held


def test_truncation_bounds_the_ratios() -> None:
    largest = []
    for max_ratio in (None, 1.5):
        options = {"kl_coef": 1e-3, "kl_controller": "fixed", "learning_rate": 1e-2, "n_epochs": 20, "vf_coef": 0.0}
        model = PPOPenalty("MlpPolicy", "Pendulum-v1", **{**SMALL, **options}, max_ratio=max_ratio).learn(64)
        largest.append(model.logger.name_to_value["train/max_ratio"])
    assert largest[0] > 2 * largest[1]
