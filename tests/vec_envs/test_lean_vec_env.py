"""The lean environments beside SB3's own: everything that training sees, to the bit."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    sync_envs_normalization,
    unwrap_vec_normalize,
)
from untidy import FlatUntidy, Untidy, bits

from sb3_ppo_penalty.vec_envs import LeanCallback, LeanVecEnv, LeanVecNormalize, lean
from sb3_ppo_penalty.vec_envs.running import update

MAKERS = {"CartPole": "CartPole-v1", "Pendulum": "Pendulum-v1", "HalfCheetah": "HalfCheetah-v5", "flat": FlatUntidy}
KEYS = {"norm_obs_keys": ["near", "far"]}


def statistics_of(env: VecEnv) -> Any:
    names = ["obs_rms", "ret_rms", "returns", "old_obs", "old_reward"]
    return bits({name: vars(env)[name] for name in names if name in vars(env)})


def view(env: VecEnv, steps: int = 50) -> list[Any]:
    """All that is returned in some steps; kept, and looked at in the end only, when memory was used again."""
    env.seed(3)
    env.action_space.seed(3)
    kept: list[Any] = [env.reset()]
    after = []
    for _ in range(steps):
        kept.append(env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)])))
        after.append((statistics_of(env), bits(env.unwrapped.reset_infos)))
    return [bits(each) for each in kept] + after


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", [*MAKERS, "dict"])
def test_without_normalisation_it_is_dummy_vec_env(name: str, n_envs: int) -> None:
    maker = MAKERS.get(name, Untidy)
    stock, own = (make_vec_env(maker, n_envs, vec_env_cls=cls) for cls in (DummyVecEnv, LeanVecEnv))
    assert view(stock) == view(own)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", [*MAKERS, "dict"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.9, "epsilon": 0.3, "clip_obs": 0.5, "clip_reward": 0.1},
        {"norm_obs": False},
        {"norm_reward": False, "clip_obs": 2},
        {"training": False},
    ],
    ids=str,
)
def test_with_normalisation_it_is_vec_normalize(name: str, n_envs: int, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, **(KEYS if name == "dict" else {})}
    maker = MAKERS.get(name, Untidy)
    stock = VecNormalize(make_vec_env(maker, n_envs), **settings)
    own = make_vec_env(maker, n_envs, vec_env_cls=LeanVecNormalize, vec_env_kwargs=settings)
    assert view(stock) == view(own)
    for attribute in ("get_original_obs", "get_original_reward"):
        assert bits(getattr(stock, attribute)()) == bits(getattr(own, attribute)())
    stock.save(str(tmp_path / "stock.pkl"))
    own.save(str(tmp_path / "own.pkl"))
    assert (tmp_path / "stock.pkl").read_bytes() == (tmp_path / "own.pkl").read_bytes()


def test_all_keys_are_normalised_by_default_and_bounds_of_images_follow() -> None:
    def boxes() -> gym.Env:
        env = Untidy()
        del env.observation_space.spaces["which"]
        return env

    stock = VecNormalize(make_vec_env(boxes, 2))
    own = LeanVecNormalize(make_vec_env(boxes, 2, vec_env_cls=LeanVecEnv))
    assert view(stock) == view(own)
    assert own.observation_space == stock.observation_space
    with pytest.raises(ValueError, match=r"only supports `gym\.spaces\.Box`"):
        LeanVecNormalize([Untidy])


def test_switches_take_effect_while_it_runs() -> None:
    stock, own = VecNormalize(make_vec_env("Pendulum-v1", 1)), LeanVecNormalize(make_vec_env("Pendulum-v1", 1))
    for change in ({}, {"training": False}, {"norm_reward": False}, {"training": True, "norm_obs": False}, {"clip_obs": 0.1}):
        for env in (stock, own):
            for name, value in change.items():
                setattr(env, name, value)
        assert view(stock, 5) == view(own, 5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("n_envs", [1, 2, 8, 33])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_statistics_take_a_batch_as_sb3s_do(dtype: type, shape: tuple[int, ...], n_envs: int) -> None:
    stock, own = RunningMeanStd(shape=shape), RunningMeanStd(shape=shape)
    generator = np.random.default_rng(0)
    for turn in range(20):
        batch = np.asarray(generator.normal(scale=9, loc=40, size=(n_envs, *shape))).astype(dtype)
        if turn == 18 and issubclass(dtype, np.floating):
            batch.flat[0] = np.inf
        stock.update(batch)
        update(own, batch)
        assert bits(stock) == bits(own)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
def test_rewards_that_are_not_finite_and_a_scale_of_zero() -> None:
    stock, own = (cls(DummyVecEnv([lambda: gym.make("CartPole-v1")]), epsilon=0.0) for cls in (VecNormalize, LeanVecNormalize))
    for reward in (1e300, np.inf, -np.inf, np.nan, 0.0):
        stock.ret_rms.var = own.ret_rms.var = np.float64(reward == 0.0)
        rewards = np.array([reward])
        assert bits(stock.normalize_reward(rewards)) == bits(own.normalize_reward(rewards))
        stock.ret_rms.var = own.ret_rms.var = np.float64(0)
        assert bits(stock.normalize_reward(rewards)) == bits(own.normalize_reward(rewards))
        for env in (stock, own):
            env.ret_rms = RunningMeanStd(shape=())
            env._update_reward(rewards)
        for name in ("mean", "var", "count"):
            np.testing.assert_array_equal(getattr(own.ret_rms, name), getattr(stock.ret_rms, name))


def test_files_are_vec_normalizes_and_load_both_ways(tmp_path: Path) -> None:
    file = str(tmp_path / "statistics.pkl")
    stock, own = VecNormalize(make_vec_env("Pendulum-v1")), LeanVecNormalize(make_vec_env("Pendulum-v1"))
    view(stock)
    view(own, 7)
    own.save(file)
    assert b"sb3_ppo_penalty" not in Path(file).read_bytes()
    again = VecNormalize.load(file, make_vec_env("Pendulum-v1"))
    assert type(again) is VecNormalize
    assert bits(again.obs_rms) == bits(own.obs_rms)
    stock.save(file)
    again = LeanVecNormalize.load(file, make_vec_env("Pendulum-v1"))
    assert type(again) is LeanVecNormalize
    assert type(again.venv) is DummyVecEnv
    assert view(again) == view(VecNormalize.load(file, make_vec_env("Pendulum-v1")))


def test_it_can_be_pickled_and_goes_on() -> None:
    own = LeanVecNormalize(make_vec_env("Pendulum-v1", 2))
    view(own, 9)
    copy = pickle.loads(pickle.dumps(own))
    copy.set_venv(make_vec_env("Pendulum-v1", 2, vec_env_cls=LeanVecEnv))
    assert type(copy) is LeanVecNormalize
    assert view(copy) == view(own)


def test_statistics_are_synchronised_with_sb3s() -> None:
    stock, own = VecNormalize(make_vec_env("Pendulum-v1", 2)), LeanVecNormalize(make_vec_env("Pendulum-v1", 2))
    view(own, 9)
    sync_envs_normalization(own, stock)
    assert (bits(stock.obs_rms), bits(stock.ret_rms)) == (bits(own.obs_rms), bits(own.ret_rms))
    view(stock, 9)
    sync_envs_normalization(stock, own)
    assert (bits(stock.obs_rms), bits(stock.ret_rms)) == (bits(own.obs_rms), bits(own.ret_rms))
    assert unwrap_vec_normalize(VecFrameStack(own, 2)) is own


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type:UserWarning")
@pytest.mark.parametrize("n_envs", [1, 2])
def test_training_with_sb3s_callbacks_is_the_same_to_the_bit(n_envs: int, tmp_path: Path) -> None:
    results = []
    for cls in (VecNormalize, LeanVecNormalize):
        folder = tmp_path / cls.__name__
        env, eval_env = (
            cls(make_vec_env("Pendulum-v1", n, seed=1, env_kwargs={"max_episode_steps": 50})) for n in (n_envs, 1)
        )
        eval_env.training = False
        model = PPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=0)
        assert model.get_vec_normalize_env() is env
        evaluate = EvalCallback(eval_env, eval_freq=60, n_eval_episodes=1, log_path=str(folder), verbose=0)
        checkpoint = CheckpointCallback(64, str(folder), save_vecnormalize=True)
        model.learn(256, callback=[evaluate, checkpoint])
        weights = [bits(each.detach().numpy()) for each in model.policy.parameters()]
        evaluations = np.load(folder / "evaluations.npz")
        files = [path.read_bytes() for path in sorted(folder.glob("*vecnormalize*.pkl"))]
        episodes = bits([dict(each) for each in model.ep_info_buffer])
        results.append((weights, bits(evaluations["results"]), files, episodes, statistics_of(env)))
    assert results[0] == results[1]
    assert results[0][2]


def test_a_callback_makes_the_training_environment_lean() -> None:
    results = []
    for callback in (None, LeanCallback()):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=1, env_kwargs={"max_episode_steps": 50}))
        model = PPO("MlpPolicy", env, n_steps=64, n_epochs=1, seed=0).learn(128).learn(128, callback=callback)
        results.append(([bits(each.detach().numpy()) for each in model.policy.parameters()], statistics_of(env)))
    assert results[0] == results[1]
    assert (type(env), type(env.venv)) == (LeanVecNormalize, LeanVecEnv)
    assert model.get_vec_normalize_env() is env


@pytest.mark.parametrize("cls", [LeanVecEnv, LeanVecNormalize])
def test_environments_are_reached_as_in_dummy_vec_env(cls: type) -> None:
    settings = KEYS if cls is LeanVecNormalize else {}
    env = make_vec_env(Untidy, 2, vec_env_cls=cls, vec_env_kwargs=settings, env_kwargs={"render_mode": "rgb_array"})
    env.set_options([{"steps": 5}, {"steps": 2}])
    env.reset()
    assert env.get_attr("steps") == [5, 2]
    env.reset()
    assert env.get_attr("steps") == [0, 0]
    env.set_attr("gravity", 1.6, indices=[1])
    assert env.get_attr("gravity", indices=1) == [1.6]
    assert env.env_method("_look", indices=[0])[0].keys() == {"far", "image", "near", "which"}
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]
    assert env.render().shape == (4, 2, 3)
    assert (env.reset_infos if cls is LeanVecEnv else env.venv.reset_infos) == [{"resets": 2}] * 2
    env.close()
    same = Untidy()
    with pytest.raises(ValueError, match="same instance"):
        cls([lambda: same, lambda: same])


def test_an_environment_above_or_below_sb3s_wrappers() -> None:
    makers = [lambda: gym.make("Pendulum-v1", max_episode_steps=9)] * 2
    stock = VecFrameStack(VecMonitor(VecNormalize(DummyVecEnv(makers))), 3)
    own = VecFrameStack(VecMonitor(LeanVecNormalize(LeanVecEnv(makers))), 3)
    assert view(stock) == view(own)


class OwnNormalize(VecNormalize):
    pass


def test_what_stands_can_be_made_lean() -> None:
    stock, changed = (VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1", 2)), 3) for _ in range(2))
    assert view(stock, 5) == view(changed, 5)
    assert lean(changed) is changed
    assert (type(changed.venv), type(changed.venv.venv)) == (LeanVecNormalize, LeanVecEnv)
    assert view(stock) == view(changed)
    other = lean(OwnNormalize(LeanVecEnv([lambda: gym.make("Pendulum-v1")])))
    assert (type(other), type(other.venv)) == (OwnNormalize, LeanVecEnv)


def test_infos_of_a_class_of_their_own_are_copied_whole() -> None:
    class Ordered(Untidy):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, OrderedDict(info)

    stock, own = DummyVecEnv([Ordered]), LeanVecEnv([Ordered])
    assert view(stock, 9) == view(own, 9)
