"""Gymnasium's vectorised environments beside the same environments in SB3's DummyVecEnv, episode by episode."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from untidy import FlatUntidy, Tidy, Untidy, bits

from sb3_ppo_penalty import PPOPenalty
from sb3_ppo_penalty.vec_envs import BatchedVecEnv, LeanVecNormalize

EXAMPLE = Path(__file__).parents[2] / "examples" / "batched_pendulum.py"
MODES = ["NextStep", "SameStep", "Disabled"]


def short(name: str) -> Callable[[], gym.Env]:
    return lambda: gym.make(name, max_episode_steps=17)


MAKERS: dict[str, Callable[[], gym.Env]] = {
    "CartPole": short("CartPole-v1"),
    "Pendulum": short("Pendulum-v1"),
    "Blackjack": short("Blackjack-v1"),
    "dict": lambda: Tidy(Untidy()),
    "flat": lambda: Tidy(FlatUntidy()),
}


def plain(value: Any) -> Any:
    """Content without what a batch of infos does to types: Python's numbers become numpy's."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return np.asarray(value).tolist()


def view(env: VecEnv, steps: int = 80) -> list[Any]:
    """All that is returned in some steps; kept, and looked at in the end only, when memory was used again."""
    env.seed(3)
    env.action_space.seed(3)
    returned = [env.reset()]
    first = []
    for _ in range(steps):
        returned.append(env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)])))
        first.append(plain(dict(enumerate(env.unwrapped.reset_infos))))
    seen = [bits(dict(returned[0]) if isinstance(returned[0], dict) else returned[0])]
    for observations, rewards, dones, infos in returned[1:]:
        seen.append(bits(dict(observations) if isinstance(observations, dict) else observations))
        seen += [bits(rewards), bits(dones), [plain(info) for info in infos]]
    return seen + first


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAKERS)
def test_training_sees_what_it_sees_in_dummy_vec_env(name: str, mode: str, copy: bool) -> None:
    own = BatchedVecEnv(SyncVectorEnv([MAKERS[name]] * 3, copy=copy, autoreset_mode=mode))
    assert view(own) == view(DummyVecEnv([MAKERS[name]] * 3))


@pytest.mark.parametrize("mode", MODES)
def test_also_from_other_processes(mode: str) -> None:
    own = BatchedVecEnv(AsyncVectorEnv([MAKERS["CartPole"]] * 2, autoreset_mode=mode))
    assert view(own) == view(DummyVecEnv([MAKERS["CartPole"]] * 2))
    assert own.has_attr("gravity")
    assert not own.has_attr("nothing")
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        own.get_attr("nothing")
    own.set_attr("gravity", 1.6)
    assert own.get_attr("gravity", indices=[1]) == [1.6]
    assert own.env_method("get_wrapper_attr", "gravity") == [1.6, 1.6]
    assert own.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
    assert own.env_is_wrapped(Monitor) == [False, False]
    for ask in (lambda: own.set_attr("gravity", 9.8, indices=0), lambda: own.env_method("has_wrapper_attr", "x", indices=[1])):
        with pytest.raises(ValueError, match=r"`indices` must be None or all of range\(2\)"):
            ask()
    own.close()


@pytest.mark.parametrize("wrapper", [VecNormalize, LeanVecNormalize])
def test_under_normalisation_and_monitor(wrapper: type[VecNormalize]) -> None:
    own = wrapper(BatchedVecEnv(SyncVectorEnv([MAKERS["flat"]] * 3, autoreset_mode="SameStep")))
    stock = VecNormalize(DummyVecEnv([MAKERS["flat"]] * 3))
    assert view(own) == view(stock)
    assert (bits(own.obs_rms), bits(own.ret_rms)) == (bits(stock.obs_rms), bits(stock.ret_rms))


def wild(observations: Any) -> Any:
    """Actions that depend on the last digits of the observations."""
    return (np.sin(1e3 * observations.sum(axis=1)) > 0).astype(np.int64)


def cart_poles(num_envs: int) -> VectorEnv:
    return gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point", max_episode_steps=20)


def test_a_step_that_only_resets_is_no_transition() -> None:
    own, raw = BatchedVecEnv(cart_poles(1)), cart_poles(1)
    own.seed(5)
    ours, (theirs, _) = own.reset(), raw.reset(seed=5)
    ends = []
    for _ in range(200):
        assert bits(ours) == bits(theirs)
        ours, reward, done, infos = own.step(wild(ours))
        theirs, expected, terminated, truncated, _ = raw.step(wild(theirs))
        assert bits(reward) == bits(expected)
        if terminated[0] or truncated[0]:
            assert bits(infos[0]["terminal_observation"]) == bits(theirs[0])
            ends.append(infos[0]["TimeLimit.truncated"])
            assert ends[-1] == (not terminated[0])
            theirs, expected, *_ = raw.step(np.array([1]))
            assert expected == 0
        assert done[0] == ("terminal_observation" in infos[0])
    assert {*ends} == {True, False}


def test_gymnasiums_batched_cart_poles_play_the_episodes_of_single_ones() -> None:
    own = BatchedVecEnv(cart_poles(6))
    observations = own.reset()
    singles = [gym.make("CartPole-v1", max_episode_steps=20) for _ in range(6)]
    dones, ends = np.ones(6, dtype=bool), []
    for _ in range(150):
        for place in np.flatnonzero(dones):
            singles[place].reset()
            singles[place].unwrapped.state = own.env.unwrapped.state[:, place].copy()
        actions = wild(observations)
        observations, rewards, dones, infos = own.step(actions)
        for place, single in enumerate(singles):
            observation, reward, terminated, truncated, _ = single.step(actions[place])
            last = infos[place]["terminal_observation"] if dones[place] else observations[place]
            assert last == pytest.approx(observation, abs=1e-6)
            assert (rewards[place], dones[place]) == (reward, terminated or truncated)
            assert infos[place]["TimeLimit.truncated"] == (truncated and not terminated)
            ends += [terminated] if dones[place] else []
        assert np.abs(observations[dones]).max(initial=0) <= 0.05
    assert len(ends) > 30
    assert {*ends} == {True, False}


@pytest.mark.parametrize("algorithm", [PPO, PPOPenalty])
def test_the_same_policy_is_learnt_as_in_dummy_vec_env(algorithm: type[PPO]) -> None:
    def monitored() -> gym.Env:
        return Monitor(short("Pendulum-v1")())

    batch = SyncVectorEnv([monitored] * 2, autoreset_mode="SameStep")
    models = [
        algorithm("MlpPolicy", VecNormalize(env), n_steps=32, n_epochs=2, seed=1).learn(128)
        for env in (BatchedVecEnv(batch), DummyVecEnv([monitored] * 2))
    ]
    own, stock = ([bits(each.detach().numpy()) for each in model.policy.parameters()] for model in models)
    assert own == stock
    own, stock = ([(episode["r"], episode["l"]) for episode in model.ep_info_buffer] for model in models)
    assert own == stock
    assert len(own) == 6


def test_stock_ppo_learns_in_a_batch_and_is_evaluated() -> None:
    env = VecMonitor(BatchedVecEnv(gym.make_vec("CartPole-v1", num_envs=16)))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=256, n_epochs=5, learning_rate=3e-3, seed=1)
    before, _ = evaluate_policy(model, env, n_eval_episodes=16)
    model.learn(6 * 1024)
    assert len(model.ep_info_buffer) == 100
    after, _ = evaluate_policy(model, env, n_eval_episodes=16)
    assert (before < 15, after > 60) == (True, True)


def test_episodes_can_come_from_gymnasiums_own_statistics() -> None:
    batch = RecordEpisodeStatistics(SyncVectorEnv([MAKERS["Pendulum"]] * 2, autoreset_mode="SameStep"))
    env = BatchedVecEnv(batch)
    env.reset()
    returns = np.zeros(2)
    for _ in range(17):
        _, rewards, dones, infos = env.step(np.zeros((2, 1), dtype=np.float32))
        returns += rewards
    assert dones.all()
    assert [info["episode"]["l"] for info in infos] == [17, 17]
    assert [info["episode"]["r"] for info in infos] == pytest.approx(returns)
    for mode in ("NextStep", "Disabled"):
        with pytest.raises(ValueError, match="`env` must be without RecordEpisodeStatistics"):
            BatchedVecEnv(RecordEpisodeStatistics(SyncVectorEnv([MAKERS["Pendulum"]], autoreset_mode=mode)))


class Forgetful(VectorWrapper):
    """A batch that lacks something."""

    def __init__(self, env: VectorEnv, lacks: str) -> None:
        super().__init__(env)
        self.lacks = lacks

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=None if self.lacks == "reset_mask" else options)

    def step(self, actions):
        *rest, infos = self.env.step(actions)
        infos.pop(self.lacks, None)
        return *rest, infos


@pytest.mark.parametrize("lacks", ["reset_mask", "final_obs"])
def test_a_batch_that_ends_episodes_otherwise_is_refused(lacks: str) -> None:
    mode = "NextStep" if lacks == "reset_mask" else "SameStep"
    env = BatchedVecEnv(Forgetful(SyncVectorEnv([MAKERS["CartPole"]] * 3, autoreset_mode=mode), lacks))
    env.reset()

    def play() -> None:
        for _ in range(30):
            env.step(np.array([0, 1, 0]))

    with pytest.raises(ValueError, match=rf"`env` must .*{lacks}"):
        play()


def test_wrong_arguments_have_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"`env` must be a gymnasium\.vector\.VectorEnv"):
        BatchedVecEnv(gym.make("CartPole-v1"))
    silent = SyncVectorEnv([MAKERS["CartPole"]])
    silent.metadata = {}
    with pytest.raises(ValueError, match=r"`env\.metadata\['autoreset_mode'\]` must be one of"):
        BatchedVecEnv(silent)
    apart = AsyncVectorEnv([MAKERS["CartPole"]], shared_memory=False)
    with pytest.raises(ValueError, match="`env` must be made with autoreset_mode SameStep, or with shared_memory"):
        BatchedVecEnv(apart)
    apart.close()
    nested = gym.spaces.Dict({"a": gym.spaces.Dict({"b": gym.spaces.Discrete(2)})})
    batch = SyncVectorEnv([MAKERS["CartPole"]])
    batch.single_observation_space = nested
    with pytest.raises(NotImplementedError, match="Nested observation spaces"):
        BatchedVecEnv(batch)


def test_options_are_for_the_whole_batch_and_for_one_reset() -> None:
    env = BatchedVecEnv(SyncVectorEnv([Untidy] * 2))
    env.set_options({"steps": 5})
    env.reset()
    assert env.get_attr("steps") == [5, 5]
    env.reset()
    assert env.get_attr("steps") == [0, 0]
    env.set_options([{"steps": 1}, {"steps": 2}])
    with pytest.raises(ValueError, match="`options` must be the same for all environments"):
        env.reset()


def test_single_environments_are_reached_where_there_are_any() -> None:
    env = BatchedVecEnv(SyncVectorEnv([lambda: Monitor(Untidy(render_mode="rgb_array"))] * 2))
    env.reset()
    env.set_attr("gravity", 1.6, indices=1)
    env.set_attr("new", "here")
    assert env.get_attr("gravity", indices=[1]) == [1.6]
    assert env.get_attr("new") == ["here", "here"]
    assert env.get_attr("step")[0] == env.env.envs[0].step
    assert env.env_method("get_total_steps", indices=0) == [0]
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.render().shape == (4, 2, 3)
    env.close()


def test_a_batch_of_one_piece_says_that_it_has_no_single_environments() -> None:
    env = BatchedVecEnv(gym.make_vec("CartPole-v1", num_envs=3, render_mode="rgb_array"))
    assert env.get_attr("render_mode") == ["rgb_array"] * 3
    assert env.env_is_wrapped(Monitor, indices=[0, 2]) == [False, False]
    assert not env.has_attr("action_masks")
    for ask in (
        lambda: env.get_attr("gravity"),
        lambda: env.set_attr("gravity", 1.6),
        lambda: env.env_method("action_masks"),
    ):
        with pytest.raises(AttributeError, match="cannot be asked of single environments"):
            ask()
    env.reset()
    assert env.render().ndim == 3
    env.close()


class OnePiece(VectorEnv):
    """A batch of counters with every form of infos, and memory that it uses again."""

    def __init__(self) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = 3
        self.single_observation_space = gym.spaces.Dict({"count": gym.spaces.Box(-9, 9, (1,), np.float32)})
        self.single_action_space = gym.spaces.Discrete(2)
        self.count, self.last = np.zeros((3, 1)), np.zeros((3, 1))
        self.seen = []

    def reset(self, *, seed=None, options=None):
        self.seen.append((seed, options))
        return {"count": self.count}, {}

    def step(self, actions):
        self.count[:, 0] += [1, 2, 3]
        self.last[:] = self.count
        over = self.count[:, 0] >= 6
        self.count[over] = 0
        infos = {"name": "all", "_private": 1, "at": self.last, "lives": [3, 2, 1], "_lives": np.array([True, False, True])}
        final = {"final_obs": {"count": self.last}, "final_info": {"won": over}}
        return {"count": self.count}, np.ones(3), over, over, {**infos, **final}


def test_infos_of_a_batch_are_told_apart() -> None:
    env = BatchedVecEnv(OnePiece())
    env.reset()
    first, second, _ = (env.step(np.zeros(3, dtype=np.int64)) for _ in range(3))
    common = {"name": "all", "_private": 1, "TimeLimit.truncated": False}
    infos = [{**common, "at": 1, "lives": 3}, {**common, "at": 2}, {**common, "at": 3, "lives": 1}]
    assert first[3] == infos
    assert first[0]["count"].tolist() == [[1], [2], [3]]
    assert second[2].tolist() == [False, False, True]
    terminal = second[3][2].pop("terminal_observation")
    assert terminal["count"].tolist() == [6]
    assert second[3][2] == {"won": True, "TimeLimit.truncated": False}
    assert env.reset_infos[2] == {"name": "all", "_private": 1, "at": 6, "lives": 1}


def test_seeds_and_options_are_for_one_reset() -> None:
    batch = OnePiece()
    env = BatchedVecEnv(batch)
    env.seed(7)
    env.set_options({"steps": 1})
    env.reset()
    env.reset()
    assert batch.seen == [(7, {"steps": 1}), (None, None)]


def test_the_example_is_gymnasiums_pendulum(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("batched_pendulum", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    batch, single = module.BatchedPendulum(4), gym.make("Pendulum-v1")
    env = BatchedVecEnv(batch)
    env.seed(0)
    env.reset()
    single.reset()
    single.unwrapped.state = np.array([batch.angle[2], batch.speed[2]])
    generator = np.random.default_rng(0)
    for step in range(200):
        actions = generator.uniform(-3, 3, (4, 1)).astype(np.float32)
        observations, rewards, dones, infos = env.step(actions)
        observation, reward, _, truncated, _ = single.step(actions[2])
        assert rewards[2] == pytest.approx(reward, abs=1e-5)
        assert dones[2] == truncated == (step == 199)
        ours = infos[2]["terminal_observation"] if truncated else observations[2]
        assert ours == pytest.approx(observation, abs=1e-5)
    assert infos[2]["TimeLimit.truncated"]
    command = [sys.executable, str(EXAMPLE), "--timesteps", "1000", "--n-envs", "4"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "steps/s" in run.stdout


def test_make_vec_env_stays_as_it_is() -> None:
    assert type(make_vec_env("CartPole-v1", 2)) is DummyVecEnv
