"""Arguments at random: each wrong one is refused by name, and whatever is right trains, PPOClip just as stock PPO does."""

import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_penalty import KLPenalty, MlpPolicy, PPOClip, PPOPenalty, RewardToGoRolloutBuffer

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [4]}}
BOX = spaces.Box(-1, 1, (2,), np.float32)


class Tiny(gym.Env):
    """Two random numbers to see, the mean of the action to earn, episodes of three steps."""

    def __init__(self, action_space: spaces.Space = BOX) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(np.mean(action)), self.steps == 3, False, {}


ENV = Tiny()
random = partial(settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

# --- what is wrong

NO_NUMBER = st.one_of(
    st.text(max_size=5),
    st.booleans(),
    st.binary(max_size=3),
    st.lists(st.floats(0, 1), max_size=2),
    st.complex_numbers(max_magnitude=2),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=1),
)
NONE = st.none()
NAN = st.sampled_from([math.nan, -math.nan, np.float32("nan")])
INFINITE = st.sampled_from([math.inf, np.float64("inf"), 10**400])
NEGATIVE = st.one_of(st.floats(max_value=-1e-300), st.integers(max_value=-1), st.just(-(10**400)))
ZERO = st.sampled_from([0, 0.0, -0.0, np.float32(0), np.int64(0)])
FRACTION = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != int(x)) | st.just(16.0)
ABOVE_ONE = st.floats(min_value=1, exclude_min=True) | st.integers(min_value=2)
NO_BOOL = st.one_of(NONE, st.text(max_size=5), st.integers(), st.floats(), st.lists(st.booleans(), max_size=2))

NO_REAL = NO_NUMBER | NAN
NO_INTEGER = NO_REAL | FRACTION | NEGATIVE.filter(lambda x: x < -1) | st.sampled_from([math.inf, 16.0])


UNIT = NO_REAL | NONE | NEGATIVE | ABOVE_ONE | INFINITE
POSITIVE_OR_NONE = NO_REAL | NEGATIVE | ZERO | INFINITE
WRONG = {
    "learning_rate": NO_REAL | NONE | NEGATIVE | INFINITE,
    "n_steps": NO_INTEGER | NONE | st.integers(max_value=0),
    "batch_size": NO_INTEGER | NONE | st.integers(max_value=1),
    "n_epochs": NO_INTEGER | NONE | st.integers(max_value=0),
    "gamma": UNIT,
    "gae_lambda": UNIT,
    "clip_range": NO_REAL | NEGATIVE | ZERO,
    "clip_range_vf": POSITIVE_OR_NONE,
    "normalize_advantage": NO_BOOL,
    "ent_coef": NO_REAL | NONE | NEGATIVE | INFINITE,
    "vf_coef": NO_REAL | NONE | NEGATIVE | INFINITE,
    "max_grad_norm": NO_REAL | NONE | NEGATIVE | ZERO,
    "use_sde": NO_BOOL,
    "sde_sample_freq": NO_INTEGER | NONE | st.integers(max_value=-2),
    "rollout_buffer_class": NO_NUMBER | st.sampled_from([dict, RolloutBuffer.get, gym.Env]),
    "rollout_buffer_kwargs": st.one_of(st.text(min_size=1), st.integers(min_value=1), st.lists(st.integers(), min_size=1)),
    "target_kl": POSITIVE_OR_NONE,
    "stats_window_size": NO_INTEGER | NONE | st.integers(max_value=0),
    "policy_kwargs": st.one_of(st.text(min_size=1), st.integers(min_value=1), st.lists(st.integers(), min_size=1)),
    "seed": NO_INTEGER | st.integers(max_value=-1) | st.integers(min_value=2**32),
    "compile": NO_BOOL,
}
BOUNDS_OUT_OF_ORDER = st.tuples(st.floats(0.1, 1e3), st.floats(1e-3, 0.09))
CONTROLLERS = ["adaptive", "fixed", "proportional", "dual"]
DIRECTIONS = ["old_new", "new_old", "symmetric"]
NO_CONTROLLER = st.one_of(
    st.text().filter(lambda name: name not in CONTROLLERS),
    st.one_of(NONE, st.integers(), st.floats(), st.lists(st.text(), max_size=2), st.just(int)),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(lambda name, extra: {"name": name, extra: 1}, st.sampled_from(CONTROLLERS), st.text(min_size=25)),
    st.builds(lambda p: {"name": "proportional", "exponent": p}, UNIT | ZERO),
    st.builds(lambda rate: {"name": "dual", "learning_rate": rate}, NO_REAL | NONE | NEGATIVE | ZERO | INFINITE),
)
NO_PENALTY = st.one_of(
    st.text().filter(lambda name: name not in DIRECTIONS),
    st.one_of(NONE, st.integers(), st.floats(), st.lists(st.text(), max_size=2), st.booleans()),
    st.dictionaries(st.text(min_size=25), st.integers(), min_size=1, max_size=2),
    st.builds(lambda way: {"direction": way}, st.one_of(NO_NUMBER, NONE).filter(lambda way: way not in DIRECTIONS)),
    st.builds(lambda c: {"cutoff_coef": c}, NO_REAL | NONE | NEGATIVE | INFINITE),
    st.builds(lambda b: {"cutoff_coef": 1.0, "per_state": b}, NO_BOOL),
    st.just({"per_state": True}),
)
WRONG_PENALTY = {
    "max_ratio": NO_REAL | NEGATIVE | INFINITE | st.floats(0, 1),
    "kl_min": NO_REAL | NEGATIVE | INFINITE | st.floats(min_value=0.016),
    "kl_max": POSITIVE_OR_NONE | st.floats(0, 0.0066),
    "kl_coef": NO_REAL | NONE | NEGATIVE | ZERO | st.floats(1e-300, 0.99e-3) | st.floats(min_value=1001) | INFINITE,
    "kl_coef_factor": NO_REAL | NONE | NEGATIVE | INFINITE | st.floats(0, 1),
    "kl_coef_bounds": st.one_of(
        (NO_REAL | NONE | NEGATIVE | st.floats()).filter(lambda bounds: not isinstance(bounds, list) or len(bounds) != 2),
        BOUNDS_OUT_OF_ORDER,
        st.tuples(NO_REAL | NONE | NEGATIVE | ZERO | INFINITE, st.just(2.0)),
        st.tuples(st.just(0.5), NO_REAL | NONE | NEGATIVE | INFINITE),
        st.tuples(st.just(0.5), st.just(1.0), st.floats(1, 2)),
    ),
    "kl_controller": NO_CONTROLLER,
    "kl_penalty": NO_PENALTY,
}
NO_VARIANCE = NO_NUMBER.filter(lambda x: not isinstance(x, list)) | NAN | NEGATIVE | ZERO | INFINITE
WRONG_POLICY = {
    "covariance": st.one_of(
        NO_VARIANCE,
        st.lists(st.floats(0.1, 1), max_size=4).filter(lambda x: len(x) != 2),
        st.tuples(st.floats(0.1, 1), NAN | ZERO | st.floats(-1e3, -1e-3) | st.just(math.inf)),
        st.builds(lambda x: [[1, x], [x, 1]], st.floats(1, 1e3) | st.floats(-1e3, -1)),
        st.builds(lambda x: [[1, x], [0, 1]], st.floats(0.01, 1)),
        st.builds(lambda x: lambda progress: x if progress > 0.5 else [[x, 0], [0, x]], st.floats(0.1, 1)),
    ),
    "learn_covariance": NO_BOOL,
}


WRONG_ANSWER = NO_REAL | NONE | NEGATIVE | INFINITE
#: What a schedule must not answer, and what stands beside it at the other end
SCHEDULES = {
    "learning_rate": (PPOClip, WRONG_ANSWER, 0.1),
    "clip_range": (PPOClip, NO_REAL | NONE | NEGATIVE, 0.1),
    "clip_range_vf": (PPOPenalty, WRONG_ANSWER, 0.1),
    "target_kl": (PPOPenalty, WRONG_ANSWER, 0.01),
    "kl_min": (PPOPenalty, WRONG_ANSWER, 0.001),
    "kl_max": (PPOPenalty, WRONG_ANSWER, 0.1),
}


def assert_named(build, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}(\(|\.|`)"):
        build()


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(algorithm, name: str) -> None:
    @random(max_examples=25)
    @given(WRONG[name])
    def check(value) -> None:
        assert_named(lambda: algorithm("MlpPolicy", ENV, **{**SMALL, name: value}), name)

    check()


@pytest.mark.parametrize("name", WRONG_PENALTY)
def test_a_wrong_argument_of_the_penalty_is_named(name: str) -> None:
    @random(max_examples=50)
    @given(WRONG_PENALTY[name])
    def check(value) -> None:
        assert_named(lambda: PPOPenalty("MlpPolicy", ENV, **{**SMALL, name: value}), name)

    check()


@pytest.mark.parametrize("end", [1, 0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_with_a_wrong_end_is_named(name: str, end: int) -> None:
    algorithm, wrong, right = SCHEDULES[name]

    @random(max_examples=25)
    @given(wrong)
    def check(value) -> None:
        schedule = {name: lambda progress: value if progress == end else right}
        with pytest.raises(ValueError, match=rf"`{name}\({end}\)` must be .* got"):
            algorithm("MlpPolicy", ENV, **{**SMALL, **schedule})

    check()


@pytest.mark.parametrize("end", [1, 0])
def test_a_covariance_schedule_with_a_wrong_end_is_named(end: int) -> None:
    @random(max_examples=25)
    @given(NO_VARIANCE | NONE)
    def check(value) -> None:
        with pytest.raises(ValueError, match=rf"`covariance` must be .* remaining progress of {end}\)"):
            MlpPolicy(ENV.observation_space, BOX, lambda _: 1e-3, covariance=lambda now: value if now == end else 0.5)

    check()


@pytest.mark.parametrize("name", WRONG_POLICY)
def test_a_wrong_argument_of_the_policy_is_named(name: str) -> None:
    @random(max_examples=50)
    @given(WRONG_POLICY[name])
    def check(value) -> None:
        assert_named(lambda: MlpPolicy(ENV.observation_space, BOX, lambda _: 1e-3, net_arch=[4], **{name: value}), name)

    check()


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_no_environment_is_none(algorithm) -> None:
    assert_named(lambda: algorithm("MlpPolicy", None, **SMALL), "env")


# --- what is right


def schedules(lowest: float, highest: float, end: float = 0.0):
    """A number, or what goes from there to a fraction of it."""
    numbers = st.floats(lowest, highest)
    return st.one_of(
        numbers,
        st.builds(lambda x: LinearSchedule(x, end * x, 0.8), numbers),
        st.builds(lambda x: ConstantSchedule(x), numbers),
        st.builds(lambda x: lambda progress: x * (end + (1 - end) * progress), numbers),
    )


BUFFERS = st.sampled_from([None, RolloutBuffer, RewardToGoRolloutBuffer])
RIGHT = {
    "learning_rate": schedules(0, 0.02),
    "n_steps": st.integers(2, 9),
    "batch_size": st.integers(2, 20),
    "n_epochs": st.integers(1, 3),
    "gamma": st.floats(0, 1),
    "gae_lambda": st.floats(0, 1) | st.sampled_from([0, 1]),
    "clip_range": schedules(1e-3, 5) | st.just(math.inf),
    "clip_range_vf": NONE | schedules(1e-3, 5),
    "normalize_advantage": st.booleans(),
    "ent_coef": st.floats(0, 0.1),
    "vf_coef": st.floats(0, 2),
    "max_grad_norm": st.floats(1e-3, 10) | st.just(math.inf),
    "sde_sample_freq": st.integers(-1, 3),
    "rollout_buffer_class": BUFFERS,
    "target_kl": NONE | st.floats(1e-4, 1),
    "stats_window_size": st.integers(1, 200),
    "seed": st.integers(0, 2**32 - 1),
    "device": st.sampled_from(["cpu", "auto", th.device("cpu")]),
}
SPACES = st.sampled_from([BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
VARIANCES = st.one_of(
    schedules(0.01, 5, end=0.1),
    st.lists(st.floats(0.01, 5), min_size=2, max_size=2),
    st.builds(
        lambda a, b, c: [[a, c * math.sqrt(a * b)], [c * math.sqrt(a * b), b]], *[st.floats(0.1, 5)] * 2, st.floats(-0.9, 0.9)
    ),
)


@st.composite
def right_arguments(draw) -> dict:
    """Any of PPO's arguments, all fitting together; with the environments."""
    chosen = draw(st.fixed_dictionaries({"seed": RIGHT["seed"]}, optional={k: v for k, v in RIGHT.items() if k != "seed"}))
    action_space, n_envs = draw(SPACES), draw(st.integers(1, 2))
    use_sde = isinstance(action_space, spaces.Box) and draw(st.booleans())
    env = partial(DummyVecEnv, [partial(Tiny, action_space)] * n_envs)
    return {**SMALL, **chosen, "use_sde": use_sde, "env": env}


@st.composite
def right_policy(draw, arguments: dict) -> dict:
    """Keywords of this package's policies that suit the rest."""
    kwargs = dict(SMALL["policy_kwargs"])
    space = arguments["env"]().action_space
    if arguments["use_sde"] or not isinstance(space, spaces.Box):
        return kwargs
    learn = draw(st.booleans())
    variances = st.floats(0.01, 5) | st.lists(st.floats(0.01, 5), min_size=2, max_size=2) if learn else VARIANCES
    return {**kwargs, "covariance": draw(NONE | variances), "learn_covariance": learn}


@st.composite
def right_penalty(draw) -> dict:
    """Any of the penalty's own arguments, all fitting together."""
    target, low, lift = draw(st.floats(1e-4, 1)), draw(st.floats(0, 1.4)), draw(st.floats(0, 2))
    way = draw(st.sampled_from([lambda x: x, lambda x: LinearSchedule(x, 0, 1), lambda x: lambda progress: x * progress]))
    thresholds = {"target_kl": target, "kl_min": low * target, "kl_max": (max(low, 0.7) + lift) * target}
    lowest, span = draw(st.floats(1e-3, 1)), draw(st.floats(0, 10))
    bounds = {"kl_coef_bounds": (lowest, lowest + span), "kl_coef": draw(st.floats(lowest, lowest + span))}
    optional = {
        "kl_coef_factor": st.floats(1.001, 10),
        "clip_range": NONE | RIGHT["clip_range"],
        "kl_controller": st.one_of(
            st.sampled_from([*CONTROLLERS, lambda reading: 2 * reading.kl_coef]),
            st.builds(lambda p: {"name": "proportional", "exponent": p}, st.floats(0.01, 1)),
            st.builds(lambda rate: {"name": "dual", "learning_rate": rate}, st.floats(0.001, 1)),
        ),
        "kl_penalty": st.one_of(
            st.sampled_from(DIRECTIONS),
            st.builds(lambda c, s: {"cutoff_coef": c, "per_state": s}, st.floats(0.1, 1000), st.booleans()),
            st.builds(KLPenalty, st.sampled_from(DIRECTIONS), cutoff_coef=st.floats(0.1, 100)),
        ),
        "max_ratio": NONE | st.floats(1.01, 100),
    }
    names = draw(st.sampled_from([["target_kl"], ["target_kl", "kl_min"], ["target_kl", "kl_max"], list(thresholds)]))
    given_thresholds = {name: way(thresholds[name]) for name in names}
    # At the end of a schedule nothing is above 0, also no threshold that is a number
    return {**given_thresholds, **draw(st.sampled_from([{}, bounds])), **draw(st.fixed_dictionaries({}, optional=optional))}


def trained(algorithm, policy, env, **arguments):
    """Two iterations."""
    model = algorithm(policy, env(), **arguments)
    return model.learn(2 * model.n_steps * model.n_envs)


@pytest.mark.filterwarnings("ignore:.*mini-batch.*")
@random(max_examples=80)
@given(right_arguments())
def test_whatever_is_right_trains_as_stock_ppo_does(arguments: dict) -> None:
    stock, ours = (trained(algorithm, ActorCriticPolicy, **arguments) for algorithm in (PPO, PPOClip))
    for name, tensor in ours.policy.state_dict().items():
        assert th.equal(tensor, stock.policy.state_dict()[name]), name
    assert ours._n_updates == stock._n_updates
    assert ours.num_timesteps == stock.num_timesteps == 2 * ours.n_steps * ours.n_envs


@pytest.mark.filterwarnings("ignore:.*mini-batch.*")
@random(max_examples=100)
@given(st.data())
def test_whatever_is_right_trains_with_the_penalty(data) -> None:
    arguments = data.draw(right_arguments())
    arguments |= {**data.draw(right_penalty()), "policy_kwargs": data.draw(right_policy(arguments))}
    model = trained(PPOPenalty, "MlpPolicy", **arguments)
    assert model._n_updates == 2 * model.n_epochs
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())
    figures = model.logger.name_to_value
    # Rounding may take a divergence of 0 a little below
    assert -1e-6 < figures["train/kl"] < math.inf
    lowest, highest = arguments.get("kl_coef_bounds", (1e-3, 1e3))
    assert lowest <= model.kl_coef <= highest
    covariance = arguments["policy_kwargs"].get("covariance")
    if callable(covariance):
        # Asked before the second of two rollouts
        np.testing.assert_allclose(model.policy.covariance.numpy(), covariance(0.5), rtol=1e-6)
