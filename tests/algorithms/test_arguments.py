"""Wrong arguments are refused by name, at construction and at load; right ones pass, in SB3's order and with its defaults."""

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer, require_number

SMALL = {"n_steps": 16, "batch_size": 8, "n_epochs": 1}
ALGORITHMS = pytest.mark.parametrize("algorithm_class", [PPOPenalty, PPOClip])


def build(algorithm_class=PPOPenalty, env=None, policy="MlpPolicy", **arguments):
    return algorithm_class(policy, env or IdentityEnvBox(ep_length=8), **{**SMALL, **arguments})


# --- the helpers


def test_the_error_names_argument_value_and_what_is_allowed():
    with pytest.raises(ArgumentError, match=r"^`gamma` must be small, got 'x'$"):
        require(False, "gamma", "x", "small")
    require(True, "gamma", "x", "small")


def test_the_error_is_caught_as_either():
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="`gamma`"):
            require(False, "gamma", 2, "small")


@pytest.mark.parametrize("value", [3, 4, 10**30, np.int64(3), np.uint8(7)])
def test_integers_that_pass(value):
    require_integer("n", value, 3)


@pytest.mark.parametrize("value", [2, -1, np.int8(2), 3.0, np.float64(3), "3", True, np.True_, None, [3], math.nan, math.inf])
def test_integers_that_do_not(value):
    with pytest.raises(ArgumentError, match=rf"`n` must be an integer of at least 3, got {re.escape(repr(value))}"):
        require_integer("n", value, 3)


def test_a_boolean_is_no_one():
    with pytest.raises(ArgumentError):
        require_integer("n", True, 1)
    with pytest.raises(ArgumentError):
        require_number("x", True, 0)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.float64(1), np.int32(1), Fraction(1, 3)])
def test_numbers_that_pass(value):
    require_number("x", value, 0, 1)


@pytest.mark.parametrize(
    "value", [-1e-9, 1.0001, math.nan, math.inf, -math.inf, "0.5", None, [0.5], 1j, np.float32("nan"), abs]
)
def test_numbers_that_do_not(value):
    with pytest.raises(ArgumentError, match=r"`x` must be a finite number at least 0 and at most 1, got .*"):
        require_number("x", value, 0, 1)


def test_the_options_of_a_number():
    require_number("x", None, 0, optional=True)
    require_number("x", lambda progress: -5.0, 0, schedule=True)
    require_number("x", math.inf, 0, infinite=True)
    require_number("x", -1e300)
    for value, options in [
        (0.0, {"open_below": True}),
        (math.nan, {"infinite": True}),
        (-math.inf, {"infinite": True}),
        (None, {"schedule": True}),
        (abs, {"optional": True}),
    ]:
        with pytest.raises(ArgumentError):
            require_number("x", value, 0, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "allowed"),
    [
        ((), {}, "a finite number"),
        ((), {"infinite": True}, "a number"),
        ((0,), {"open_below": True}, "a finite number above 0"),
        ((0.5,), {"optional": True}, "a finite number at least 0.5 or None"),
        ((-math.inf, 1), {"schedule": True}, "a finite number at most 1 or a schedule"),
        ((0, 1), {"schedule": True, "optional": True}, "a finite number at least 0 and at most 1 or a schedule or None"),
    ],
)
def test_what_is_allowed_is_said(arguments, options, allowed):
    with pytest.raises(ArgumentError) as error:
        require_number("x", "bad", *arguments, **options)
    assert str(error.value) == f"`x` must be {allowed}, got 'bad'"


# --- the algorithms


WRONG = [
    ("learning_rate", -1e-3),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("learning_rate", "1e-3"),
    ("learning_rate", None),
    ("learning_rate", True),
    ("n_steps", 0),
    ("n_steps", -16),
    ("n_steps", 16.0),
    ("n_steps", True),
    ("n_steps", None),
    ("batch_size", 1),
    ("batch_size", 0),
    ("batch_size", 8.0),
    ("batch_size", "8"),
    ("batch_size", None),
    ("normalize_advantage", "no"),
    ("normalize_advantage", None),
    ("sde_sample_freq", -2),
    ("sde_sample_freq", "no"),
    ("rollout_buffer_class", DictRolloutBuffer),
    ("n_epochs", 0),
    ("n_epochs", 1.5),
    ("n_epochs", True),
    ("gamma", -0.1),
    ("gamma", 1.1),
    ("gamma", math.nan),
    ("gae_lambda", -0.1),
    ("gae_lambda", 1.1),
    ("gae_lambda", "0.95"),
    ("clip_range", 0),
    ("clip_range", -0.2),
    ("clip_range", math.nan),
    ("clip_range", "0.2"),
    ("clip_range_vf", 0),
    ("clip_range_vf", -0.2),
    ("clip_range_vf", math.nan),
    ("ent_coef", -0.01),
    ("ent_coef", math.nan),
    ("ent_coef", None),
    ("vf_coef", -0.5),
    ("vf_coef", math.inf),
    ("max_grad_norm", 0),
    ("max_grad_norm", -0.5),
    ("max_grad_norm", math.nan),
    ("max_grad_norm", None),
    ("max_grad_norm", (0.5,)),
    ("max_grad_norm", (0.5, 0.0)),
    ("max_grad_norm", [math.nan, 0.5]),
    ("max_grad_norm", [0.5, "0.5"]),
    ("target_kl", 0),
    ("target_kl", -0.01),
    ("target_kl", math.inf),
    ("target_kl", "0.01"),
    ("stats_window_size", 0),
    ("stats_window_size", 2.5),
    ("rollout_buffer_class", ReplayBuffer),
    ("rollout_buffer_class", dict),
    ("rollout_buffer_class", "RolloutBuffer"),
]

WRONG_PENALTY = [
    ("kl_coef", 0),
    ("kl_coef", -1.0),
    ("kl_coef", math.nan),
    ("kl_coef", math.inf),
    ("kl_coef", "1"),
    ("kl_coef", None),
    ("kl_coef", True),
    ("kl_coef", 1e-4),
    ("kl_coef", 1e4),
    ("kl_min", -0.001),
    ("kl_min", math.nan),
    ("kl_min", "0"),
    ("kl_min", 0.016),
    ("kl_max", 0),
    ("kl_max", -0.01),
    ("kl_max", math.inf),
    ("kl_max", 0.006),
    ("kl_coef_factor", 1),
    ("kl_coef_factor", 0.5),
    ("kl_coef_factor", -2),
    ("kl_coef_factor", math.nan),
    ("kl_coef_factor", math.inf),
    ("kl_coef_factor", None),
    ("kl_coef_bounds", (0, 1e3)),
    ("kl_coef_bounds", (-1, 1e3)),
    ("kl_coef_bounds", (2.0, 1.0)),
    ("kl_coef_bounds", (1e-3, math.inf)),
    ("kl_coef_bounds", (math.nan, 1.0)),
    ("kl_coef_bounds", (0.5, math.nan)),
    ("kl_coef_bounds", (0.5, 1.0, 2.0)),
    ("kl_coef_bounds", ("0.5", 2.0)),
    ("kl_coef_bounds", 1.0),
    ("kl_coef_bounds", "12"),
    ("kl_coef_bounds", None),
    ("kl_coef_bounds", (True, 2.0)),
]


@ALGORITHMS
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_each_wrong_argument_is_named(algorithm_class, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*got"):
        build(algorithm_class, **{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_PENALTY)
def test_each_wrong_argument_of_the_penalty_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*got"):
        build(**{name: value})


def test_thresholds_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"`kl_min` must be such that kl_min <= kl_max, got \(0.03, 0.02\)"):
        build(kl_min=0.03, kl_max=0.02)
    assert build(kl_min=0.02, kl_max=0.02).kl_thresholds == (0.02, 0.02)
    assert build(kl_min=0, kl_max=0.02).kl_thresholds == (0, 0.02)


def test_only_the_penalty_goes_without_a_clip():
    assert build(PPOPenalty, clip_range=None).clip_range is None
    with pytest.raises(ValueError, match="`clip_range` must be a number or a schedule, got None"):
        build(PPOClip, clip_range=None)


@ALGORITHMS
def test_one_transition_cannot_be_normalised(algorithm_class):
    one_step = {"n_steps": 1, "batch_size": 2}
    with pytest.raises(ValueError, match=r"`n_steps` must be more than 1 in total over 1 environment\(s\), got 1"):
        build(algorithm_class, **one_step)
    two = DummyVecEnv([lambda: IdentityEnvBox(ep_length=8)] * 2)
    assert build(algorithm_class, two, **one_step).n_steps == 1


@ALGORITHMS
def test_without_normalisation_a_batch_of_one_is_fine(algorithm_class):
    model = build(algorithm_class, n_steps=2, batch_size=1, normalize_advantage=False).learn(2)
    assert model.num_timesteps == 2
    assert build(algorithm_class, n_steps=1, batch_size=1, normalize_advantage=False).learn(1).num_timesteps == 1


@ALGORITHMS
def test_a_truncated_minibatch_is_announced_in_sb3s_words(algorithm_class):
    with pytest.warns(UserWarning, match="truncated mini-batch of size 6"):
        build(algorithm_class, n_steps=16, batch_size=10)


@ALGORITHMS
@pytest.mark.parametrize(
    "action_space",
    [
        pytest.param(spaces.Dict(move=spaces.Discrete(2)), id="Dict"),
        pytest.param(spaces.Tuple([spaces.Discrete(2)]), id="Tuple"),
        pytest.param(spaces.Box(-np.inf, np.inf, (2,)), id="Box without bounds"),
        pytest.param(spaces.MultiBinary([2, 2]), id="MultiBinary of two axes"),
        pytest.param(spaces.MultiDiscrete([[2, 3], [4, 5]]), id="MultiDiscrete of two axes"),
    ],
)
def test_action_spaces_that_ppo_cannot_have(algorithm_class, action_space):
    env = IdentityEnvBox()
    env.action_space = action_space
    with pytest.raises(ValueError, match="action space"):
        build(algorithm_class, env)


@ALGORITHMS
def test_gsde_needs_numbers_for_actions(algorithm_class):
    with pytest.raises(ValueError, match="continuous actions"):
        build(algorithm_class, IdentityEnv(2), use_sde=True)


@ALGORITHMS
def test_what_catches_sb3s_assertion_still_does(algorithm_class):
    for each in (PPO, algorithm_class):
        with pytest.raises(AssertionError, match="batch_size"):
            build(each, batch_size=1)
        with pytest.raises(AssertionError, match="clip_range_vf"):
            build(each, clip_range_vf=-0.1)


@ALGORITHMS
def test_wrong_arguments_are_refused_at_load(tmp_path, algorithm_class):
    path = tmp_path / "model.zip"
    build(algorithm_class).save(path)
    for name, value in {"gamma": 2.0, "batch_size": 1, "clip_range": -1.0, "target_kl": 0.0, "n_epochs": 0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            algorithm_class.load(path, **{name: value})
    assert algorithm_class.load(path, gamma=0.5).gamma == 0.5


def test_wrong_arguments_of_the_penalty_are_refused_at_load(tmp_path):
    path = tmp_path / "model.zip"
    build().save(path)
    wrong = {"kl_coef_factor": 0.5, "kl_coef": -1.0, "kl_min": 0.5, "kl_max": 0.001, "kl_coef_bounds": (2.0, 4.0)}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match="`kl_coef` must be" if name == "kl_coef_bounds" else f"`{name}` must be"):
            PPOPenalty.load(path, **{name: value})
    assert PPOPenalty.load(path, kl_coef_factor=1.5).kl_coef_factor == 1.5


# --- what passes

NUMBERS = {
    "learning_rate": 0.25,
    "n_steps": 16,
    "batch_size": 8,
    "n_epochs": 2,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "clip_range": 0.25,
    "clip_range_vf": 0.25,
    "ent_coef": 0.25,
    "vf_coef": 0.25,
    "max_grad_norm": 0.5,
    "target_kl": 0.25,
    "stats_window_size": 10,
}
PENALTY_NUMBERS = {"kl_coef": 0.5, "kl_min": 0.125, "kl_max": 0.5, "kl_coef_factor": 2.0}


@pytest.mark.parametrize(("integer", "number"), [(np.int64, np.float64), (np.int32, np.float32), (np.uint16, np.float16)])
@pytest.mark.parametrize("algorithm_class", [PPOPenalty, PPOClip])
def test_numpys_numbers_train_as_pythons_do(tmp_path, algorithm_class, integer, number):
    numbers = {**NUMBERS, **(PENALTY_NUMBERS if algorithm_class is PPOPenalty else {})}
    from_numpy = {name: integer(value) if isinstance(value, int) else number(value) for name, value in numbers.items()}
    models = [build(algorithm_class, IdentityEnv(2, ep_length=8), seed=0, **each).learn(32) for each in (numbers, from_numpy)]
    figures = [{name: value for name, value in model.logger.name_to_value.items() if "time/" not in name} for model in models]
    assert figures[0] == figures[1]
    models[1].save(tmp_path / "model.zip")
    assert algorithm_class.load(tmp_path / "model.zip").n_steps == 16


@pytest.mark.parametrize("number", [np.float64, np.float32])
@pytest.mark.parametrize("kl_max", [1e-9, 100.0])
def test_the_coefficient_is_pythons_whatever_moves_it(number, kl_max):
    arguments = {"kl_coef": 1.0, "kl_coef_factor": 2.0, "kl_min": 0.0 if kl_max < 1 else 50.0, "kl_max": kl_max}
    model = build(seed=0, n_epochs=2, **{name: number(value) for name, value in arguments.items()}).learn(32)
    assert type(model.kl_coef) is float
    assert model.kl_coef == (4.0 if kl_max < 1 else 0.25)


@ALGORITHMS
@pytest.mark.parametrize("schedule", [lambda progress: 0.4 * progress, LinearSchedule(0.4, 0.0, 1.0), FloatSchedule(0.4)])
def test_schedules_are_followed(algorithm_class, schedule):
    model = build(algorithm_class, learning_rate=schedule, clip_range=schedule, clip_range_vf=schedule).learn(32)
    # The last update is made when half, and then all of the steps are done; SB3 counts at the end of the rollout
    expected = schedule(0.0)
    for key in ("learning_rate", "clip_range", "clip_range_vf"):
        assert model.logger.name_to_value[f"train/{key}"] == pytest.approx(expected)


@ALGORITHMS
def test_infinite_bounds_switch_off(algorithm_class):
    model = build(algorithm_class, max_grad_norm=math.inf, clip_range=math.inf).learn(16)
    assert model.logger.name_to_value["train/clip_range"] == math.inf


def test_loading_tolerates_what_enjoy_passes(tmp_path):
    for algorithm_class in (PPOPenalty, PPOClip):
        build(algorithm_class).save(tmp_path / "model.zip")
        replaced = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
        model = algorithm_class.load(tmp_path / "model.zip", custom_objects=replaced)
        assert model.predict(np.zeros(1, dtype=np.float32))[0].shape == (1,)


# --- SB3's signature


def parameters_of_constructor(algorithm_class):
    return {name: p for name, p in inspect.signature(algorithm_class.__init__).parameters.items() if name != "self"}


@pytest.mark.parametrize(
    ("algorithm_class", "own_defaults", "added"),
    [
        (PPOClip, {}, ["compile"]),
        (
            PPOPenalty,
            {"clip_range": None, "target_kl": 0.01},
            [
                "compile",
                "kl_coef",
                "kl_min",
                "kl_max",
                "kl_coef_factor",
                "kl_coef_bounds",
                "kl_controller",
                "kl_penalty",
                "max_ratio",
                "guard",
            ],
        ),
    ],
)
def test_the_signature_is_that_of_ppo(algorithm_class, own_defaults, added):
    reference, ours = parameters_of_constructor(PPO), parameters_of_constructor(algorithm_class)
    assert list(ours) == [*reference, *added]
    defaults = {name: parameter.default for name, parameter in reference.items()}
    assert {name: ours[name].default for name in reference} == {**defaults, **own_defaults}
    assert all(ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in reference)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
    assert all(ours[name].default is not inspect.Parameter.empty for name in added)


def test_the_papers_defaults():
    model = build()
    assert model.kl_coef == 1
    assert model.kl_coef_factor == 2
    # 0.01 / 1.5 and 0.01 * 1.5
    assert model.kl_thresholds == pytest.approx((0.0066666667, 0.015))


@ALGORITHMS
def test_all_of_ppos_arguments_by_position(algorithm_class):
    values = {
        "learning_rate": 1e-3,
        "n_steps": 16,
        "batch_size": 8,
        "n_epochs": 3,
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "clip_range": 0.3,
        "clip_range_vf": 0.4,
        "normalize_advantage": False,
        "ent_coef": 0.01,
        "vf_coef": 0.6,
        "max_grad_norm": 0.7,
        "use_sde": True,
        "sde_sample_freq": 4,
        "rollout_buffer_class": RolloutBuffer,
        "rollout_buffer_kwargs": {},
        "target_kl": 0.05,
        "stats_window_size": 7,
        "tensorboard_log": None,
        "policy_kwargs": {"net_arch": [8]},
        "verbose": 0,
        "seed": 3,
        "device": "cpu",
    }
    models = [each("MlpPolicy", IdentityEnvBox(), *values.values()) for each in (PPO, algorithm_class)]
    schedules = {"clip_range", "clip_range_vf"}
    for name in values.keys() - schedules - {"stats_window_size", "device"}:
        assert getattr(models[1], name) == getattr(models[0], name) == values[name], name
    assert [models[1].clip_range(1.0), models[1].clip_range_vf(1.0)] == [0.3, 0.4]
    assert models[1]._stats_window_size == 7
    models[1].learn(16)


@ALGORITHMS
def test_ppos_default_arguments_can_be_passed_as_they_are(algorithm_class):
    defaults = [parameter.default for parameter in list(parameters_of_constructor(PPO).values())[2:]]
    model = algorithm_class("MultiInputPolicy", SimpleMultiObsEnv(), *defaults)
    assert model.clip_range(1.0) == 0.2
    if algorithm_class is PPOPenalty:
        assert model.kl_thresholds == pytest.approx((0.0066666667, 0.015))
