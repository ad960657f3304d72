"""Training on several ranks: real processes that talk over gloo on the loopback, and really die."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_penalty import PPOClip, PPOPenalty
from sb3_ppo_penalty.distributed import Ranks, session
from sb3_ppo_penalty.rollout import Rollout

EXAMPLES = Path(__file__).parents[1] / "examples"
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["sb3_ppo_penalty.maskable", "sb3_contrib", "pytest", "torch._dynamo"])
#: Seconds after which a test that hangs is one that failed
PATIENCE = 300
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
        | {"kl_penalty": {"cutoff_coef": 10.0, "per_state": True, "max_ratio": 2.0}, "target_kl": 0.001},
    ),
    "clip, early stop": (PPOClip, "CartPole-v1", Case(target_kl=0.0005, n_epochs=6)),
    "rollback": (PPOPenalty, "Pendulum-v1", Case(guard="rollback", target_kl=0.0003, n_epochs=5)),
    "fixup": (PPOPenalty, "Pendulum-v1", Case(guard={"action": "fixup", "measure": "p99"}, target_kl=0.001, n_epochs=5)),
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
        drawn = Rollout.drawn_order

        def noted(rollout: Rollout) -> th.Tensor:
            self.orders.append(drawn(rollout))
            return self.orders[-1]

        Rollout.drawn_order = noted

        def back() -> None:
            Rollout.drawn_order = drawn

        self.back = back

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        self.rollout = {name: getattr(buffer, name).copy() for name in names}

    def _on_step(self) -> bool:
        return True


def one_update(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Every case once, one after the other in the same two processes."""
    found = {}
    for case in PARITY:
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
def updates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(one_update, 2, tmp_path_factory.mktemp("updates"))


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
    monkeypatch.setattr(Rollout, "drawn_order", lambda rollout: orders.pop(0))
    model.train()
    assert orders == []
    return model


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
@pytest.mark.parametrize("case", PARITY)
def test_two_ranks_update_as_one_process_with_both_rollouts(
    case: str, updates: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [each[case] for each in updates]
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
