"""Several processes that train one policy, through torch.distributed."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_penalty.arguments import require
from sb3_ppo_penalty.distributed.collection import collect_together, normalization_of, statistics_of
from sb3_ppo_penalty.updates.ranks import RankError, Ranks, Result


@dataclass(frozen=True)
class Team(Ranks):
    """Several processes; every method is called by all of them, or they wait for each other until the timeout."""

    def add_up(self, tensor: th.Tensor) -> None:
        """
        Replace a tensor by the sum of all ranks' tensors.

        :param tensor: the same shape and type on every rank
        """
        with self._answered():
            dist.all_reduce(tensor)

    def minimum(self, values: Iterable[float]) -> th.Tensor:
        """
        Find the minima over all ranks.

        :param values: of this rank, as many as on every other
        :return: float64, shape (number of values,)
        """
        least = super().minimum(values)
        with self._answered():
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least

    def gathered(self, own: Result) -> list[Result]:
        """
        Collect an object from every rank.

        :param own: this rank's; it is pickled
        :return: every rank's, in their order
        """
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, own)
        return found

    def from_rank_0(self, state: Result, device: th.device) -> Result:
        """
        Take over what rank 0 has.

        :param state: tensors and plain values
        :param device: to put tensors on
        :return: rank 0's
        """
        file = io.BytesIO()
        th.save(state, file)
        box: list[Any] = [file.getvalue() if self.is_main_process else None]
        with self._answered():
            dist.broadcast_object_list(box, src=0)
        received: Result = th.load(io.BytesIO(box[0]), map_location=device, weights_only=False)
        return received

    def enter(self, model: OnPolicyAlgorithm) -> None:
        """
        Leave the logging to rank 0.

        :param model: to be trained
        """
        if not self.is_main_process:
            model.set_logger(Logger(folder=None, output_formats=[]))

    def begin(self, model: Any, facts: Callable[[], Mapping[str, Any]]) -> None:
        """
        Compare the ranks before the first rollout, and start all of them from rank 0's weights and statistics.

        :param model: to be trained
        :param facts: gives what has to be the same on all ranks, by name
        :raises ValueError: naming what is not the same
        """
        policy, statistics = model.policy, statistics_of(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
        own = {**facts(), "policy": shapes, "env (VecNormalize)": normalization_of(model)}
        gathered = self.gathered({name: repr(value) for name, value in own.items()})
        for name in own:
            values = [each.get(name) for each in gathered]
            require(len(set(values)) == 1, name, values, "the same on all ranks")
        rollouts = self.gathered((model.n_steps * model.n_envs, model.batch_size))
        count = max(math.ceil(length / batch_size) for length, batch_size in rollouts)
        allowed = f"such that every rank has a transition for each of the {count} minibatches (transitions, batch_size)"
        require(all(length >= count for length, _ in rollouts), "batch_size", rollouts, allowed)
        state = policy.state_dict(), policy.optimizer.state_dict(), {name: vars(each) for name, each in statistics.items()}
        state = self.from_rank_0(state, model.device)
        policy.load_state_dict(state[0])
        policy.optimizer.load_state_dict(state[1])
        for name, each in statistics.items():
            vars(each).update(state[2][name])

    def collect(self, model: OnPolicyAlgorithm, callback: BaseCallback, collect: Callable[[BaseCallback], bool]) -> bool:
        """
        Collect a rollout, each rank its own; they meet afterwards.

        :param model: being trained
        :param callback: of ``learn``
        :param collect: collects this rank's rollout, with a callback
        :return: False if a callback ended training, on whichever rank
        """
        return collect_together(self, model, callback, collect)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """
        Turn whatever torch says when another rank does not answer into one sentence.

        :raises RankError: instead
        """
        try:
            yield
        except RuntimeError as error:
            # Whoever keeps the error would keep the process group, a local variable of torch's functions
            clear_frames(error.__traceback__)
            raise RankError(
                f"rank {self.rank} of {self.size} cannot go on: another rank has ended, or has not answered within the "
                f"session's timeout; its own output says why ({str(error).splitlines()[0]})"
            ) from error
