"""Training on several ranks: real processes that talk over gloo on the loopback, and really die."""

import csv
import math
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_penalty import (
    PPOClip,
    PPOPenalty,
    RecurrentPPOPenalty,
    ResumableCheckpointCallback,
    latest_checkpoint,
    resume,
)
from sb3_ppo_penalty.distributed import session
from sb3_ppo_penalty.distributed.team import Team
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates import ranks as ranks_module
from sb3_ppo_penalty.updates.ranks import ALONE, RankError, Ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["sb3_ppo_penalty.algorithms.maskable", "sb3_contrib", "pytest", "torch._dynamo"])
#: Seconds after which a test that hangs is one that failed
PATIENCE = 300
SLOW = pytest.mark.slow
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 3, "seed": 5, "device": "cpu", "learning_rate": 3e-3}
TINY = {"net_arch": [16]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_rank(rank: int, size: int, port: int, timeout: float, work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """What runs in a child: as if torchrun had started it."""
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{size}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    th.set_num_threads(1)
    with session(timeout=timeout) as ranks:
        th.save(work(ranks, folder, *arguments), folder / f"rank_{rank}.pt")


def started(work: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout: float = 60) -> list[Any]:
    port = free_port()
    processes = [
        CHILDREN.Process(target=one_rank, args=(rank, size, port, timeout, work, folder, *arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any]) -> list[int]:
    """Their exit codes. Nobody waits for ever: who hangs is killed."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    assert hanging == []
    return [process.exitcode for process in processes]


def on_ranks(work: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What every rank's work returned."""
    assert ended(started(work, size, folder, *arguments)) == [0] * size
    return [th.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(size)]


def state_of(model: Any) -> list[th.Tensor]:
    """All that has to be alike on all ranks."""
    moments = [value for state in model.policy.optimizer.state.values() for value in state.values()]
    coefficient = th.tensor(getattr(model, "kl_coef", 0.0), dtype=th.float64)
    return [tensor.detach().clone() for tensor in (*model.policy.state_dict().values(), *moments, coefficient)]


def alike(one: list[th.Tensor], other: list[th.Tensor]) -> bool:
    return len(one) == len(other) and all(th.equal(a, b) for a, b in zip(one, other, strict=True))


def figures_of(model: Any) -> dict[str, float]:
    return {name: float(value) for name, value in model.logger.name_to_value.items() if name.startswith("train/")}


# The update of several ranks is that of one process


class Case(dict):
    """Arguments; those of each rank where a list stands for a value."""

    def of(self, rank: int) -> dict[str, Any]:
        return {name: value[rank] if isinstance(value, list) else value for name, value in self.items()}


PARITY: dict[str, tuple[type, str, Case]] = {
    "penalty": (PPOPenalty, "Pendulum-v1", Case()),
    "penalty, all options": (
        PPOPenalty,
        "Pendulum-v1",
        Case(clip_range=0.3, clip_range_vf=0.5, ent_coef=0.01, max_grad_norm=(0.3, 0.5))
        | {"kl_penalty": {"cutoff_coef": 10.0, "per_state": True}, "max_ratio": 2.0, "target_kl": 0.001},
    ),
    "clip, early stop": (PPOClip, "CartPole-v1", Case(target_kl=0.0005, n_epochs=6)),
    "rollback": (PPOPenalty, "Pendulum-v1", Case(guard="rollback", target_kl=0.0003, n_epochs=5)),
    # The percentile of 128 states is the 127th
    "fixup": (
        *(PPOPenalty, "Pendulum-v1"),
        Case(guard={"action": "fixup", "measure": "p99"}, target_kl=0.001, n_epochs=5, n_steps=64, batch_size=32),
    ),
    "unequal minibatches": (PPOPenalty, "Pendulum-v1", Case(n_steps=[32, 48], batch_size=[8, 12])),
    "not normalised": (PPOPenalty, "Pendulum-v1", Case(normalize_advantage=False)),
    "compiled, early stop": (PPOClip, "CartPole-v1", Case(target_kl=0.0005, n_epochs=6, compile=True)),
}


def made(case: str, rank: int, **options: Any) -> Any:
    algorithm, env, own = PARITY[case]
    arguments = {**SMALL, "policy_kwargs": TINY, **Case(own).of(rank), **options}
    return algorithm("MlpPolicy", env, **arguments)


class Start(BaseCallback):
    """Keeps what the ranks start with, and the order in which they cut their rollouts."""

    def _on_training_start(self) -> None:
        self.weights = {name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()}
        self.orders: list[th.Tensor] = []
        drawn = Transitions.drawn_order

        def noted(rollout: Transitions) -> th.Tensor:
            self.orders.append(drawn(rollout))
            return self.orders[-1]

        Transitions.drawn_order = noted

        def back() -> None:
            Transitions.drawn_order = drawn

        self.back = back

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        self.rollout = {name: getattr(buffer, name).copy() for name in names}

    def _on_step(self) -> bool:
        return True


def one_update(ranks: Ranks, folder: Path, cases: list[str]) -> dict[str, Any]:
    """One case after the other in the same two processes."""
    found = {}
    for case in cases:
        model, start = made(case, ranks.rank), Start()
        model.learn(1, start)
        start.back()
        found[case] = {
            "weights": start.weights,
            "rollout": start.rollout,
            "orders": start.orders,
            "after": dict(model.policy.state_dict()),
            "state": state_of(model),
            "kl_coef": getattr(model, "kl_coef", None),
            "updates": model._n_updates,
            "figures": figures_of(model),
            "compiled": len(model._compiler.graphs) if model._compiler else 0,
        }
    return found


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What the ranks did in a case; those that compile, which takes its time, are made only where they are asked for."""
    made_once: dict[bool, list[dict[str, Any]]] = {}

    def of(case: str) -> list[dict[str, Any]]:
        compiles = "compiled" in case
        if compiles not in made_once:
            cases = [each for each in PARITY if ("compiled" in each) == compiles]
            made_once[compiles] = on_ranks(one_update, 2, tmp_path_factory.mktemp("updates"), cases)
        return [each[case] for each in made_once[compiles]]

    return of


def in_one(case: str, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same update in this process: both ranks' rollouts one after the other, cut where the ranks cut theirs."""
    sizes = [len(each["rollout"]["values"]) for each in ranks]
    batches = [Case(PARITY[case][2]).of(rank).get("batch_size", SMALL["batch_size"]) for rank in (0, 1)]
    model = made(case, 0, n_steps=sum(sizes), batch_size=sum(batches), compile=False)
    model._setup_learn(1)
    model.policy.load_state_dict(ranks[0]["weights"])
    orders = []
    for pair in zip(*(each["orders"] for each in ranks), strict=True):
        pieces = zip(pair[0].split(batches[0]), (pair[1] + sizes[0]).split(batches[1]), strict=True)
        orders.append(th.cat([piece for both in pieces for piece in both]))
    model.rollout_buffer.reset()
    for name in ranks[0]["rollout"]:
        setattr(model.rollout_buffer, name, np.concatenate([each["rollout"][name] for each in ranks]))
    model.rollout_buffer.full = True
    monkeypatch.setattr(Transitions, "drawn_order", lambda rollout: orders.pop(0))
    model.train()
    assert orders == []
    return model


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
@pytest.mark.parametrize("case", [pytest.param(each, marks=SLOW) if "compiled" in each else each for each in PARITY])
def test_two_ranks_update_as_one_process_with_both_rollouts(
    case: str, updates: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = updates(case)
    assert alike(ranks[0]["state"], ranks[1]["state"])
    assert not np.array_equal(*(each["rollout"]["actions"][:10] for each in ranks))
    whole = in_one(case, ranks, monkeypatch)
    start, end = ranks[0]["weights"], whole.policy.state_dict()
    assert max((end[name] - start[name]).abs().max().item() for name in end) > 1e-3
    for name, tensor in ranks[0]["after"].items():
        th.testing.assert_close(tensor, end[name], rtol=0, atol=1e-6 if "compiled" not in case else 1e-5)
    assert ranks[0]["kl_coef"] == getattr(whole, "kl_coef", None)
    assert ranks[0]["updates"] == ranks[1]["updates"] == whole._n_updates
    assert ranks[0]["compiled"] == ("compiled" in case)
    expected, found = figures_of(whole), ranks[0]["figures"]
    assert found.keys() == expected.keys()
    # These hang on the order of two parts or are a mean over each: see the documentation
    for name in expected.keys() - {"train/explained_variance", "train/loss", "train/std"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-6), name
    if case == "clip, early stop":
        assert whole._n_updates < 6
    if case in ("rollback", "fixup"):
        assert expected["train/guard_acted"] == 1
        assert expected["train/guard_epochs"] < 5


# Whole trainings


class Known(gym.Env[Any, Any]):
    """Episodes of known length and return."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int, reward: float, success: bool) -> None:
        self.length, self.pay, self.success, self.steps = length, reward, success, 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        done = self.steps == self.length
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), self.pay, done, False, {"is_success": self.success}


class BatchNorm(FlattenExtractor):
    """Has buffers that move with every minibatch that is seen."""

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


class Note(BaseCallback):
    """What a callback sees: the count of steps at every step."""

    def __init__(self, stop_at_call: int = 10**9) -> None:
        super().__init__()
        self.counts: list[int] = []
        self.stop_at_call = stop_at_call

    def _on_step(self) -> bool:
        self.counts.append(self.num_timesteps)
        return self.n_calls < self.stop_at_call


def masked() -> Any:
    from sb3_ppo_penalty.algorithms.maskable import MaskablePPOPenalty

    return MaskablePPOPenalty("MlpPolicy", InvalidActionEnvDiscrete(dim=8, n_invalid_actions=4), **SMALL)


TEN: dict[str, Callable[[], Any]] = {
    "penalty": lambda: PPOPenalty("MlpPolicy", "Pendulum-v1", target_kl=0.003, **SMALL),
    "clip": lambda: PPOClip("MlpPolicy", "CartPole-v1", target_kl=0.002, **SMALL),
    "gSDE": lambda: PPOPenalty("MlpPolicy", "Pendulum-v1", use_sde=True, sde_sample_freq=4, guard="fixup", **SMALL),
    "batch norm": lambda: PPOPenalty(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={"features_extractor_class": BatchNorm, **TINY}, guard="rollback", **SMALL
    ),
    "masked": masked,
}


def ten_iterations(ranks: Ranks, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in TEN.items():
        model = make()
        start = state_of(model)
        model.learn(10 * 32 * ranks.size)
        found[name] = {"start": start, "end": state_of(model), "steps": model.num_timesteps, "figures": figures_of(model)}
    return found


def counted(ranks: Ranks, folder: Path) -> dict[str, Any]:
    env = make_vec_env(lambda: Known(10, 1.0, True) if ranks.is_main_process else Known(5, 3.0, False), ranks.rank + 1)
    model = PPOPenalty("MlpPolicy", env, policy_kwargs=TINY, **{**SMALL, "n_steps": 20, "batch_size": 20})
    model.set_logger(configure(str(folder / f"log_{ranks.rank}"), ["csv"]))
    note = Note()
    model.learn(180, [note])
    episodes = [(each["r"], each["l"]) for each in model.ep_info_buffer]
    found = {"counts": note.counts, "steps": model.num_timesteps, "calls": note.n_calls, "episodes": episodes}
    return {**found, "progress": model._current_progress_remaining}


def normalized(ranks: Ranks, folder: Path) -> dict[str, Any]:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    seen: list[Any] = []

    class Seen(BaseCallback):
        def _on_training_start(self) -> None:
            seen.append(env.get_original_obs())

        def _on_step(self) -> bool:
            seen.append(env.get_original_obs())
            return True

    PPOPenalty("MlpPolicy", env, policy_kwargs=TINY, **SMALL).learn(3 * 64, Seen())
    rms = env.obs_rms
    return {"seen": np.concatenate(seen), "obs": (rms.mean, rms.var, rms.count), "returns": env.ret_rms.var}


class Keyed(gym.ObservationWrapper[Any, Any, Any]):
    """Dict observations, of which one key has the name of another statistic."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        box = env.observation_space
        self.observation_space = gym.spaces.Dict({"returns": box, "raw": box, "kind": gym.spaces.Discrete(2)})

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"returns": observation, "raw": observation, "kind": 0}


#: Around one environment on rank 0, two on rank 1
NORMALIZED: dict[str, Callable[[Any], Any]] = {
    "rewards": lambda env: VecNormalize(env, norm_obs=False),
    "observations": lambda env: VecNormalize(env, norm_reward=False),
    "dict": lambda env: VecNormalize(env, norm_obs_keys=["returns"]),
    "dict, rewards": lambda env: VecNormalize(env, norm_obs=False),
    "inside": lambda env: VecFrameStack(VecMonitor(VecNormalize(env, norm_obs=False)), 2),
    "outside": lambda env: VecNormalize(VecFrameStack(env, 2), norm_obs=False),
    "two": lambda env: VecNormalize(VecFrameStack(VecNormalize(env, norm_reward=False), 2), norm_obs=False),
    "frozen": lambda env: VecNormalize(env, training=False),
}


def numbers_of(rms: RunningMeanStd) -> tuple[Any, ...]:
    return rms.mean, rms.var, rms.count


def normalized_in_part(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The statistics of each VecNormalize, from the outside in, after two rollouts."""
    found: dict[str, Any] = {}
    for name, wrap in NORMALIZED.items():
        dicts = "dict" in name
        env = wrap(make_vec_env("Pendulum-v1", 1 + ranks.rank, wrapper_class=Keyed if dicts else None))
        if name == "frozen":
            env.obs_rms.mean += 0.1 + ranks.rank
            # 3 * 0.1 / 3 is not 0.1
            env.ret_rms.var, env.ret_rms.count = np.float64(0.1), 3.0
        PPOPenalty("MultiInputPolicy" if dicts else "MlpPolicy", env, policy_kwargs=TINY, **SMALL).learn(2 * 96)
        found[name] = []
        while isinstance(env, VecEnvWrapper):
            if isinstance(env, VecNormalize):
                seen = vars(env).get("obs_rms", {})
                seen = {key: numbers_of(rms) for key, rms in (seen if isinstance(seen, dict) else {"all": seen}).items()}
                found[name].append({"rewards": numbers_of(env.ret_rms), "observations": seen})
            env = env.venv
    return found


def stopping(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Rank 1 stops in the middle of its second rollout."""
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL)
    note = Note(stop_at_call=10**9 if ranks.is_main_process else 40)
    model.learn(640, note)
    return {"steps": model.num_timesteps, "calls": note.n_calls, "updates": model._n_updates, "state": state_of(model)}


def outcome_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Bad(gym.Wrapper[Any, Any, Any, Any]):
    """In its 40th step the reward is another."""

    def __init__(self, env: gym.Env[Any, Any], reward: float) -> None:
        super().__init__(env)
        self.reward, self.steps = reward, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward, *others = self.env.step(action)
        return observation, self.reward if self.steps == 40 else reward, *others


def not_finite(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Rank 1 alone gets a reward that is no number, or one so large that its loss is infinite but no gradient is."""
    found: dict[str, Any] = {}
    for name, reward in (("no number", math.nan), ("too large", 1.9e19)):
        env = gym.make("Pendulum-v1")
        model = PPOPenalty(
            "MlpPolicy", env if ranks.is_main_process else Bad(env, reward), policy_kwargs=TINY, gamma=0.0, **SMALL
        )
        model.learn(64)
        before = state_of(model)
        message = outcome_of(lambda model=model: model.learn(64, reset_num_timesteps=False))
        found[name] = {"message": message, "undone": alike(before, state_of(model)), "state": before}
    return found


def failing(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Rank 1 alone cannot evaluate its fourth minibatch, or cannot measure how far the policy moved."""
    found: dict[str, Any] = {}
    # The policy is asked when `learn` begins and twice when the rollout is frozen; then come six minibatches
    for name, place in (("minibatch", 3 + 4), ("drift", 3 + 6 + 1)):
        model = PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL)
        start = Start()
        calls, whole = [0], model.policy.evaluate_actions

        def broken(*arguments: Any, name: str = name, place: int = place, calls: Any = calls, whole: Any = whole) -> Any:
            calls[0] += 1
            if not ranks.is_main_process and calls[0] == place:
                raise ArithmeticError(f"{name} is broken")
            return whole(*arguments)

        model.policy.evaluate_actions = broken
        message = outcome_of(lambda model=model, start=start: model.learn(64, start))
        start.back()
        undone = all(th.equal(tensor, start.weights[key]) for key, tensor in model.policy.state_dict().items())
        found[name] = {"message": message, "undone": undone}
    return found


def unlike(ranks: Ranks, folder: Path) -> dict[str, Any]:
    def learn(**options: Any) -> str:
        return outcome_of(lambda: PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **{**SMALL, **options}).learn(64))

    class Meddler(BaseCallback):
        def _on_rollout_start(self) -> None:
            if not ranks.is_main_process:
                with th.no_grad():
                    self.model.policy.value_net.bias.add_(1e-6)

        def _on_step(self) -> bool:
            return True

    class OwnGet(RolloutBuffer):
        def get(self, batch_size: int | None = None) -> Any:
            yield from super().get(batch_size)

    model, assigned = (PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL) for _ in range(2))
    assigned.rollout_buffer = OwnGet(32, model.observation_space, model.action_space, "cpu")

    def normalized(*options: dict[str, Any] | None) -> str:
        env, own = make_vec_env("Pendulum-v1", 1), options[ranks.rank]
        env = env if own is None else VecNormalize(env, **own)
        return outcome_of(lambda: PPOPenalty("MlpPolicy", env, policy_kwargs=TINY, **SMALL).learn(64))

    return {
        "VecNormalize": [
            normalized({"norm_obs": False}, None),
            normalized(None, {}),
            normalized({}, {"norm_obs": False}),
            normalized({"clip_reward": 5.0}, {}),
        ],
        "memory": outcome_of(
            lambda: RecurrentPPOPenalty("MlpLstmPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL).learn(64)
        ),
        "buffer": [learn(rollout_buffer_class=OwnGet), outcome_of(lambda: assigned.learn(64))],
        "n_epochs": learn(n_epochs=2 + ranks.rank),
        "kl_coef": learn(kl_coef=1.0 + ranks.rank),
        "n_steps": learn(n_steps=4, batch_size=2) if ranks.is_main_process else learn(n_steps=64, batch_size=2),
        "cutoff": learn(kl_penalty={"cutoff_coef": 10.0}),
        "meddled": outcome_of(lambda: model.learn(64, Meddler())),
    }


def first_observations(ranks: Ranks, folder: Path) -> dict[str, Any]:
    env = make_vec_env("Pendulum-v1", 2)
    model = PPOPenalty("MlpPolicy", env, policy_kwargs=TINY, **SMALL)
    model.learn(1)
    return {"first": model.rollout_buffer.observations.reshape(2, 32, 3)[:, 0], "verbose": model.verbose}


WORKS = (ten_iterations, counted, normalized, normalized_in_part, stopping, not_finite, failing, unlike, first_observations)


def everything(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """One after the other in the same processes."""
    return {work.__name__: work(ranks, folder) for work in WORKS}


class Two(NamedTuple):
    """What two ranks did, and the folder they wrote into."""

    folder: Path
    ranks: list[dict[str, Any]]

    def __call__(self, name: str) -> list[dict[str, Any]]:
        return [each[name] for each in self.ranks]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    return Two(folder, on_ranks(everything, 2, folder))


@pytest.mark.parametrize("name", TEN)
def test_ranks_are_alike_to_the_last_bit_after_ten_iterations(name: str, two: Two) -> None:
    first, second = (each[name] for each in two("ten_iterations"))
    assert first["steps"] == second["steps"] == 640
    assert not alike(first["start"], second["start"])
    assert alike(first["end"], second["end"])
    assert not alike(first["start"], first["end"])
    assert first["figures"] == second["figures"]


def test_rank_0_logs_steps_and_episodes_of_all(two: Two) -> None:
    """Three environments: one on rank 0 whose episodes last 10 steps and return 10; two on rank 1: 5 steps, 15."""
    first, second = two("counted")
    assert first["counts"] == second["counts"] == list(range(3, 181, 3))
    assert first["steps"] == second["steps"] == 180
    assert first["calls"] == second["calls"] == 60
    assert first["progress"] == second["progress"] == 0
    assert first["episodes"] == second["episodes"]
    # In order of time: rank 1's of steps 5 and 10 and, with the latter, rank 0's
    assert first["episodes"][:5] == [(15.0, 5)] * 2 + [(10.0, 10)] + [(15.0, 5)] * 2
    assert len(first["episodes"]) == 3 * (2 + 8)
    with (two.folder / "log_0" / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["time/total_timesteps"]) for row in rows] == [60, 120, 180]
    assert float(rows[0]["rollout/ep_rew_mean"]) == pytest.approx(14)
    assert float(rows[0]["rollout/success_rate"]) == pytest.approx(0.2)
    assert (two.folder / "log_1" / "progress.csv").read_text() == ""


def test_statistics_of_vecnormalize_are_those_of_all_ranks(two: Two) -> None:
    first, second = two("normalized")
    # What rank 1 saw before the first rollout is not counted
    seen = np.concatenate([first["seen"], second["seen"][1:]])
    assert len(seen) == 1 + 2 * 96
    mean, var, count = first["obs"]
    assert count == pytest.approx(len(seen) + 1e-4)
    np.testing.assert_allclose(mean, seen.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(var, seen.var(axis=0), atol=1e-4)
    for ours, theirs in zip(first["obs"], second["obs"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert first["returns"] == second["returns"] != 1


@pytest.mark.parametrize("name", NORMALIZED)
def test_each_vecnormalize_has_the_statistics_of_all_ranks(name: str, two: Two) -> None:
    """The ranks' three environments make 64 steps each; of the first observations those of rank 0's one are counted."""
    first, second = (each[name] for each in two("normalized_in_part"))
    np.testing.assert_equal(first, second)
    if name == "frozen":
        assert first[0]["rewards"] == (0.0, 0.1, 3.0)
        np.testing.assert_array_equal(first[0]["observations"]["all"][0], 0.1)
        return
    keys = {"observations": [["all"]], "dict": [["returns"]], "two": [[], ["all"]]}
    assert [list(each["observations"]) for each in first] == keys.get(name, [[]])
    for each in first:
        assert each["rewards"][2] == pytest.approx(3 * 64 + 1e-4)
        assert [count for _, _, count in each["observations"].values()] == pytest.approx(
            [1 + 3 * 64 + 1e-4] * len(each["observations"])
        )


def test_a_callback_that_stops_training_stops_all_ranks(two: Two) -> None:
    first, second = two("stopping")
    # Rank 1 has made 40 steps of its own, rank 0 the whole second rollout
    assert (first["calls"], second["calls"]) == (64, 40)
    assert first["steps"] == second["steps"] == 104
    assert first["updates"] == second["updates"] == 3
    assert alike(first["state"], second["state"])


@pytest.mark.parametrize(
    ("reward", "found"), [("no number", "'rewards', 'returns'"), ("too large", "whose square is too large")]
)
def test_numbers_that_are_not_finite_on_one_rank_undo_the_update_on_all(reward: str, found: str, two: Two) -> None:
    first, second = (each[reward] for each in two("not_finite"))
    for each in (first, second):
        assert each["message"].startswith("FloatingPointError: an update of PPOPenalty after 128 steps is not finite")
        assert each["undone"]
    assert found in second["message"]
    assert "all finite (it went wrong within the update, or on another rank than this, 0" in first["message"]
    assert alike(first["state"], second["state"])


@pytest.mark.parametrize("name", ["minibatch", "drift"])
def test_an_error_on_one_rank_undoes_the_update_on_all(name: str, two: Two) -> None:
    first, second = (each[name] for each in two("failing"))
    assert f"JointError: ArithmeticError: {name} is broken" in second["message"]
    assert "JointError: another rank failed" in first["message"]
    assert first["undone"]
    assert second["undone"]


def test_ranks_that_do_not_fit_together_are_told_so(two: Two) -> None:
    for each in two("unlike"):
        assert each["n_epochs"] == "ArgumentError: `n_epochs` must be the same on all ranks, got ['2', '3']"
        assert each["kl_coef"] == "ArgumentError: `kl_coef` must be the same on all ranks, got ['1.0', '2.0']"
        assert "`kl_penalty` must be one with `per_state=True` on several ranks" in each["cutoff"]
        for name, message in zip(("rollout_buffer_class", "rollout_buffer"), each["buffer"], strict=True):
            assert message.startswith(
                f"ArgumentError: `{name}` must be one with SB3's own `get` and `_get_samples` on several"
            )
        assert each["memory"].startswith("ArgumentError: RecurrentPPOPenalty trains in a single process: sb3-contrib's buffer")
        assert "ranks hold different weights" in each["meddled"]
        assert each["meddled"].startswith("RankError")
        for problem in each["VecNormalize"]:
            assert problem.startswith("ArgumentError: `env (VecNormalize)` must be the same on all ranks, got [")
        assert each["VecNormalize"][1].startswith(
            "ArgumentError: `env (VecNormalize)` must be the same on all ranks, got ['None', "
        )
        assert each["n_steps"].startswith("ArgumentError: `batch_size` must be such that every rank has a transition for each")


def test_every_environment_has_a_seed_of_its_own(two: Two) -> None:
    for rank, each in enumerate(two("first_observations")):
        for place in range(2):
            expected = gym.make("Pendulum-v1").reset(seed=5 + 2**20 * rank + place)[0]
            np.testing.assert_allclose(each["first"][place], expected, rtol=1e-6)


def three_unequal(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """2, 4 and 2 minibatches, the last of rank 2's smaller."""
    n_envs, n_steps, batch_size = [(1, 32, 16), (2, 32, 16), (1, 37, 20)][ranks.rank]
    sizes: list[list[int]] = []
    minibatches = ranks.minibatches

    options = {**SMALL, "n_steps": n_steps, "batch_size": batch_size}
    model = PPOPenalty("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), guard="rollback", policy_kwargs=TINY, **options)

    def noted(rollout: Transitions, batch_size: int, normalize: bool) -> Any:
        sizes.append([])
        for batch in minibatches(rollout, batch_size, normalize):
            sizes[-1].append(len(batch.actions))
            yield batch

    object.__setattr__(model._ranks, "minibatches", noted)
    model.learn(10 * 133)
    return {"sizes": sizes, "end": state_of(model), "steps": model.num_timesteps, "figures": figures_of(model)}


def test_three_ranks_with_unequal_rollouts(tmp_path: Path) -> None:
    ranks = on_ranks(three_unequal, 3, tmp_path)
    assert [each["sizes"][0] for each in ranks] == [[8] * 4, [16] * 4, [10, 9, 9, 9]]
    assert {each["steps"] for each in ranks} == {1330}
    assert alike(ranks[0]["end"], ranks[1]["end"])
    assert alike(ranks[0]["end"], ranks[2]["end"])
    assert ranks[0]["figures"]["train/kl"] == ranks[2]["figures"]["train/kl"] > 0


# Ranks that die


class Signal(BaseCallback):
    """Sends this process a signal in the middle of a rollout."""

    def __init__(self, at: int, which: signal.Signals) -> None:
        super().__init__()
        self.at, self.which = at, which

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            os.kill(os.getpid(), self.which)
        return True


def resumable(ranks: Ranks, folder: Path, how: str) -> dict[str, Any]:
    """Six iterations; rank 1 gets a signal in the fifth, where two checkpoints have been written."""
    callback = ResumableCheckpointCallback(32 * 2, folder / "checkpoints", ranks.name_prefix)
    path = latest_checkpoint(folder / "checkpoints", ranks=ranks)
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_obs=False)
    if path is None:
        model: Any = PPOPenalty("MlpPolicy", env, policy_kwargs=TINY, **SMALL)
        left, callbacks = 6 * 128, [callback]
        if not ranks.is_main_process and how != "whole":
            callbacks.append(Signal(4 * 32 + 10, signal.SIGKILL if how == "killed" else signal.SIGSTOP))
    else:
        model, left = resume(path, env, callback)
        callbacks = [callback]
    begun, states = time.monotonic(), []

    class Keep(BaseCallback):
        def _on_rollout_start(self) -> None:
            states.append(state_of(self.model))

        def _on_step(self) -> bool:
            return True

    message = outcome_of(lambda: model.learn(left, [*callbacks, Keep()], reset_num_timesteps=path is None))
    end = state_of(model)
    model.save(folder / f"after_{ranks.rank}")
    found = {
        "returns": numbers_of(env.ret_rms),
        "message": message,
        "seconds": time.monotonic() - begun,
        "end": end,
        "good": alike(states[-1], end),
        "left": left,
    }
    return {**found, "path": path and path.name, "steps": model.num_timesteps, "noise": th.rand(3), "numpy": np.random.rand(3)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(resumable, 2, tmp_path_factory.mktemp("whole"), "whole")


def test_a_killed_rank_fails_the_others_and_the_last_checkpoint_resumes(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    assert ended(started(resumable, 2, tmp_path, "killed")) == [0, -signal.SIGKILL]
    survivor = th.load(tmp_path / "rank_0.pt", weights_only=False)
    assert survivor["message"].startswith("RankError: rank 0 of 2 cannot go on: another rank has ended")
    # It is left with the last good policy, and has saved it
    assert survivor["good"]
    assert PPOPenalty.load(tmp_path / "after_0").num_timesteps > 512
    # One rank may have written a checkpoint that the other has not: it is passed over
    surplus = tmp_path / "checkpoints" / "rl_model_rank0of2_512_steps.zip"
    assert surplus.exists()
    (tmp_path / "checkpoints" / "rl_model_rank1of2_512_steps.zip").unlink()
    resumed = on_ranks(resumable, 2, tmp_path, "resumed")
    assert [each["path"] for each in resumed] == [f"rl_model_rank{rank}of2_256_steps.zip" for rank in (0, 1)]
    for found, expected in zip(resumed, whole, strict=True):
        assert found["message"] == "nothing was raised"
        assert found["left"] == 4 * 128
        assert found["steps"] == expected["steps"] == 6 * 128
        assert alike(found["end"], expected["end"])
        assert th.equal(found["noise"], expected["noise"])
        np.testing.assert_array_equal(found["numpy"], expected["numpy"])
        assert found["returns"] == expected["returns"] != (0.0, 1.0, 1e-4)
    assert not th.equal(whole[0]["noise"], whole[1]["noise"])


def test_a_rank_that_does_not_answer_fails_the_others_within_the_timeout(tmp_path: Path) -> None:
    processes = started(resumable, 2, tmp_path, "stopped", timeout=5)
    processes[0].join(PATIENCE)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert ended(processes) == [0, -signal.SIGKILL]
    survivor = th.load(tmp_path / "rank_0.pt", weights_only=False)
    assert "has not answered within the session's timeout" in survivor["message"]
    assert survivor["good"]


def lonely(port: int, queue: Any) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    with pytest.raises(RankError, match="the ranks did not find each other within 2 s"), session(timeout=2):
        pass
    queue.put(dist.is_initialized())


def test_a_rank_that_nobody_joins_says_so() -> None:
    queue = CHILDREN.SimpleQueue()
    process = CHILDREN.Process(target=lonely, args=(free_port(), queue))
    process.start()
    assert ended([process]) == [0]
    assert queue.get() is False


# How a session ends

BEGIN = """
import atexit, sys, weakref
import torch.distributed as dist
from sb3_ppo_penalty import PPOPenalty
from sb3_ppo_penalty.distributed import session

groups = []

def train():
    groups.append(weakref.ref(dist.group.WORLD))
    return PPOPenalty("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(32)

atexit.register(lambda: print([group() is None for group in groups], flush=True))
"""
#: The rest of the script, and the exit codes of two ranks
ENDINGS = {
    "model and cycle remain": (
        """
with session():
    model = train()
    cycle = [dist.group.WORLD]
    cycle.append(cycle)
    del cycle
""",
        [0, 0],
    ),
    "one exits": (
        """
with session(timeout=60) as ranks:
    model = train()
    if not ranks.is_main_process:
        sys.exit(3)
    model.learn(32)
""",
        [1, 3],
    ),
    "joined": (
        """
dist.init_process_group("gloo")
with session():
    model = train()
assert dist.is_initialized()
dist.destroy_process_group()
""",
        [0, 0],
    ),
}


@pytest.mark.parametrize("ending", ["one exits", *(pytest.param(each, marks=SLOW) for each in ENDINGS if each != "one exits")])
def test_no_process_group_outlives_its_session(ending: str) -> None:
    """Its threads would abort the process if they let go of a tensor while the interpreter ends."""
    script, codes = ENDINGS[ending]
    # New interpreters: what a child of this process would have imported already is part of what went wrong
    command = [sys.executable, "-c", BEGIN + script]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": f"{rank}"}, **pipes) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes, outputs
    assert [output for output, _ in outputs] == ["[True]\n"] * 2


# Without other ranks


def test_alone_nothing_is_initialised_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL).learn(96)
    for environ in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with session() as ranks:
            assert ranks is ALONE
            assert ranks.is_main_process
            assert not dist.is_initialized()
            inside = PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL).learn(96)
        assert alike(state_of(outside), state_of(inside))
    inside.learn(32, reset_num_timesteps=False)


def test_the_timeout_is_a_number() -> None:
    with pytest.raises(ValueError, match="`timeout` must be a finite number above 0, got 0"), session(timeout=0):
        pass


def test_a_model_is_trained_in_the_session_it_was_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOPenalty("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY, **SMALL)
    monkeypatch.setattr(ranks_module, "_current", Team(0, 2))
    with pytest.raises(RuntimeError, match=r"trained where it was made or loaded: inside the same `distributed\.session`"):
        model.learn(32)


# As a user starts it


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 2])
def test_the_example(size: int, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{size}"] if size > 1 else []
    options = "--n-timesteps 256 --n-envs 2 --n-steps 32 --batch-size 16 --save-freq 32 --eval-freq 32 --out out"
    command = [sys.executable, *launcher, str(EXAMPLES / "train_distributed.py"), *shlex.split(options)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"{size} process(es), 256 steps: mean return -") == 1
    assert run.stdout.count("Using cpu device") == 1
    assert run.stdout.count("fps") == 256 // (64 * size)
    names = {path.name for path in (tmp_path / "out").rglob("*.*")}
    prefixes = ["rl_model"] if size == 1 else ["rl_model_rank0of2", "rl_model_rank1of2"]
    saved = {f"{prefix}_{steps}_steps.zip" for prefix in prefixes for steps in range(64 * size, 257, 64 * size)}
    assert {name for name in names if name.startswith("rl_model")} <= saved
    assert names >= {"model.zip", "evaluations.npz", *(f"{prefix}_256_steps.zip" for prefix in prefixes)}
    assert PPOPenalty.load(tmp_path / "out" / "model").num_timesteps == 256
