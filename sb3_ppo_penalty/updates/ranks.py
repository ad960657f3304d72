"""The processes that train one policy together, called ranks; a single process is a group of one whose sums are itself."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_penalty.objectives.drift import Drift, DriftPart, joined_drift
from sb3_ppo_penalty.rollouts.rollout import Transitions

Result = TypeVar("Result")
#: Gives KL(old || new) of some transitions, in nats, or None where it is not known, and the log of their importance ratios
Measure = Callable[[], tuple[th.Tensor | None, th.Tensor]]

#: Seed offset between two ranks; each environment of a rank uses one seed of the range
SEEDS_PER_RANK = 2**20
#: Integer types by their size in bytes
INTEGERS = {1: th.int8, 2: th.int16, 4: th.int32, 8: th.int64}


class RankError(RuntimeError):
    """Another rank has ended, does not answer, or holds another policy: this one cannot go on."""


class JointError(RuntimeError):
    """Raised on all ranks of a distributed training at the same place, because one of them failed there."""

    @classmethod
    def of(cls, own: Exception | None) -> "JointError":
        """
        Say what failed, or that it failed elsewhere.

        :param own: the failure of this rank, or None if it was on another one
        """
        elsewhere = "another rank failed in this update: its own message says why"
        return cls(elsewhere if own is None else f"{type(own).__name__}: {own}")


@dataclass(frozen=True)
class Ranks:
    """
    The processes that train one policy; this is the single-process case.

    What an update needs of all processes is written here once, in terms of four operations on the whole group:
    :meth:`add_up`, :meth:`minimum`, :meth:`gathered` and :meth:`from_rank_0`. Over a single process each of them is the
    identity; :class:`~sb3_ppo_penalty.distributed.team.Team` has those of several. Every method is called by all ranks.

    :param rank: number of this process, from 0
    :param size: number of processes
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the one that logs and should evaluate and save."""
        return self.rank == 0

    @property
    def name_prefix(self) -> str:
        """The file name prefix of this rank's checkpoints: every rank needs its own to go on exactly."""
        return f"rl_model_rank{self.rank}of{self.size}" if self.size > 1 else "rl_model"

    def add_up(self, tensor: th.Tensor) -> None:
        """
        Replace a tensor by the sum of all ranks' tensors.

        :param tensor: the same shape and type on every rank
        """

    def minimum(self, values: Iterable[float]) -> th.Tensor:
        """
        Find the minima over all ranks.

        :param values: of this rank, as many as on every other
        :return: float64, shape (number of values,)
        """
        return th.tensor(list(values), dtype=th.float64)

    def gathered(self, own: Result) -> list[Result]:
        """
        Collect an object from every rank.

        :param own: this rank's; it is pickled where there are several
        :return: every rank's, in their order
        """
        return [own]

    def from_rank_0(self, state: Result, device: th.device) -> Result:
        """
        Take over what rank 0 has.

        :param state: tensors and plain values
        :param device: to put tensors on
        :return: rank 0's
        """
        return state

    def enter(self, model: OnPolicyAlgorithm) -> None:
        """
        Prepare a model for ``learn``, before anything is set up.

        :param model: to be trained
        """

    def begin(self, model: OnPolicyAlgorithm, facts: Callable[[], Mapping[str, Any]]) -> None:
        """
        Compare the ranks before the first rollout, and start all of them from rank 0's weights.

        :param model: to be trained
        :param facts: gives what has to be the same on all ranks, by name
        :raises ValueError: naming what is not the same
        """

    def collect(self, model: OnPolicyAlgorithm, callback: BaseCallback, collect: Callable[[BaseCallback], bool]) -> bool:
        """
        Collect a rollout, each rank its own.

        :param model: being trained
        :param callback: of ``learn``
        :param collect: collects this rank's rollout, with a callback
        :return: False if a callback ended training, on whichever rank
        """
        return collect(callback)

    def seed(self, seed: int | None) -> int | None:
        """
        Derive the seed of this rank.

        :param seed: of the whole training
        :return: of this rank; rank 0 has the training's own
        """
        return None if seed is None else (seed + self.rank * SEEDS_PER_RANK) % 2**32

    def total(self, values: Iterable[float]) -> th.Tensor:
        """
        Sum numbers over all ranks.

        :param values: of this rank, as many as on every other
        :return: float64, shape (number of values,)
        """
        sums = th.tensor(list(values), dtype=th.float64)
        self.add_up(sums)
        return sums

    def mean(self, figures: dict[str, float], count: int) -> dict[str, float]:
        """
        Average means over the transitions of all ranks.

        :param figures: means over this rank's transitions, by name
        :param count: number of these transitions
        :return: means over all transitions, by name
        """
        share = count / self.total([count]).item()
        return dict(zip(figures, self.total(figure * share for figure in figures.values()).tolist(), strict=True))

    def minibatches(self, rollout: Transitions, batch_size: int, normalize: bool) -> Iterator[Transitions]:
        """
        Go once over the rollout, in as many minibatches as the rank with most of them makes.

        :param rollout: of this rank
        :param batch_size: of this rank's minibatches, unless it has to make more
        :param normalize: whether their advantages are to be normalised with mean and deviation over all ranks' minibatch; a
            single process leaves that to the loss, which does it as SB3 does
        """
        length = rollout.size
        own = math.ceil(length / batch_size)
        count = -int(self.minimum([-own])[0])
        full = [min(batch_size, length)] * (own - 1)
        sizes = [*full, length - sum(full)] if own == count else [length // count + (k < length % count) for k in range(count)]
        order = rollout.drawn_order()
        if normalize and self.size > 1:
            rollout = rollout._replace(advantages=self._normalized(rollout.advantages, order, sizes))
        yield from rollout.cut(order, sizes)

    def _normalized(self, advantages: th.Tensor, order: th.Tensor, sizes: list[int]) -> th.Tensor:
        """
        Normalise every minibatch's advantages over all ranks, with one sum for all minibatches of an epoch.

        The formula is that of :func:`~sb3_ppo_penalty.objectives.losses.normalize_advantages`.

        :param advantages: of this rank's transitions, shape (n_transitions,)
        :param order: in which they are cut into minibatches, shape (n_transitions,)
        :param sizes: of the minibatches
        :return: in the order of ``advantages``, shape (n_transitions,)
        """
        device = advantages.device
        values = advantages[order].double()
        batch = th.repeat_interleave(th.arange(len(sizes), device=device), th.tensor(sizes, device=device))
        moments = th.stack([th.ones_like(values), values, values.square()])
        sums = th.zeros(3, len(sizes), dtype=values.dtype, device=device).index_add_(1, batch, moments)
        self.add_up(sums)
        count, total, squares = sums
        mean = total / count
        deviation = ((squares - total * mean).clamp(min=0) / (count - 1)).sqrt()
        shifted = ((values - mean[batch]) / (deviation[batch] + 1e-8)).to(advantages.dtype)
        # A single advantage has no deviation
        normalized = th.empty_like(advantages)
        normalized[order] = th.where(count[batch] > 1, shifted, advantages[order])
        return normalized

    def average_gradients(
        self,
        weights: Sequence[th.Tensor],
        count: int,
        estimate: th.Tensor | None = None,
        failure: Exception | None = None,
    ) -> th.Tensor | None:
        """
        Replace each weight's gradient by that of the mean loss over all ranks' transitions, each of which counts the same.

        One sum is exchanged for all weights, and with it whether a rank failed: the others wait for nothing else. The
        gradients of a single process stay as they are, to the last bit.

        :param weights: those that move
        :param count: number of this rank's transitions
        :param estimate: of KL(old || new) on them, in nats; None where nobody asks
        :param failure: why this rank has no gradient, if it has none
        :return: the estimate over all ranks' transitions
        :raises JointError: on all of several ranks, if one of them failed; a single process raises its own failure
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return estimate
        vector = pack_gradients(weights, count, estimate, failed=failure is not None)
        self.add_up(vector)
        sizes = [weight.numel() for weight in weights]
        *present, total, estimated, failed = vector[sum(sizes) :].tolist()
        if failed:
            raise JointError.of(failure) from failure
        gradients = (vector[: sum(sizes)] / total).split(sizes)
        for weight, gradient, there in zip(weights, gradients, present, strict=True):
            weight.grad = gradient.view_as(weight) if there else None
        return None if estimate is None else th.tensor(estimated / total)

    def drift(self, policy: ActorCriticPolicy, measure: Measure) -> Drift:
        """
        Measure how far the policy moved over the transitions of all ranks.

        Sums, maxima and the largest hundredth of the divergences are exchanged.

        :param policy: that is measured; its buffers, such as a batch norm's, become rank 0's
        :param measure: measures this rank's transitions
        """
        if self.size > 1:
            buffers = list(policy.buffers())
            for own, shared in zip(buffers, self.from_rank_0(buffers, policy.device), strict=True):
                own.copy_(shared)
        kl, log_ratio = self.attempt(measure)
        total = int(self.total([len(log_ratio)])[0])
        return joined_drift(self.gathered(DriftPart.of(kl, log_ratio, total)))

    def agree(self, fine: bool, failure: Exception | None) -> bool:
        """
        Ask whether an update is finite on every rank.

        :param fine: whether this rank's is
        :param failure: what ended this rank's update, if anything did
        :return: whether every rank's is; after a failure that the others do not share, nobody is asked
        """
        if failure is not None and not isinstance(failure, JointError):
            return fine
        return bool(self.minimum([float(fine)])[0])

    def attempt(self, work: Callable[[], Result]) -> Result:
        """
        Do something that may fail on one rank alone.

        :param work: of this rank
        :return: its result
        :raises JointError: on all of several ranks, if it failed on one; a single process raises its own failure
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self.total([float(failure is not None)])[0] > 0:
            raise JointError.of(failure) from failure
        return result

    def check_same(self, model: OnPolicyAlgorithm) -> None:
        """
        Check after an update that every rank holds the same policy, optimizer and coefficient, to the last bit.

        :param model: being trained
        :raises RankError: if that is not so
        """
        if self.size == 1:
            return
        moments = [value for state in model.policy.optimizer.state.values() for value in state.values()]
        tensors = [*model.policy.state_dict().values(), *(each for each in moments if isinstance(each, th.Tensor))]
        tensors.append(th.tensor(getattr(model, "kl_coef", 0.0), dtype=th.float64))
        # Sums of bit patterns: one bit of one number changes them
        sums = [each.detach().reshape(-1).view(INTEGERS[each.element_size()]).sum(dtype=th.int64) for each in tensors]
        if len(set(self.gathered(tuple(int(each) for each in sums)))) > 1:
            raise RankError(
                f"after the update at {model.num_timesteps} steps the ranks hold different weights, moments or coefficients: "
                "something changes them on one rank alone (a callback?), or their processors round differently"
            )


def pack_gradients(weights: Sequence[th.Tensor], count: int, estimate: th.Tensor | None, failed: bool) -> th.Tensor:
    """
    Put all that ranks add up for one step into one vector, whose length depends on nothing but the weights.

    :param weights: those that move, with the gradient of this rank's mean loss or None
    :param count: number of this rank's transitions
    :param estimate: of KL(old || new) on them, in nats, or None
    :param failed: whether this rank has no gradient to add
    :return: ``count`` times the gradients; 1 or 0 for each weight that has one or none; ``count``; ``count`` times the
        estimate; 1 if the rank failed, else 0
    """
    gradients = [None if failed else weight.grad for weight in weights]
    pairs = zip(weights, gradients, strict=True)
    parts = [th.zeros_like(weight) if found is None else found * count for weight, found in pairs]
    estimated = weights[0].new_zeros(1) if estimate is None or failed else (estimate * count).reshape(1)
    known = weights[0].new_tensor([*(float(found is not None) for found in gradients), float(count)])
    return th.cat([*(part.reshape(-1) for part in parts), known, estimated, weights[0].new_tensor([float(failed)])])


#: A training in a single process
ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """Give the ranks of the session that is open, or the single process."""
    return _current


def set_current(ranks: Ranks) -> None:
    """
    Let models that are made from now on be trained by these ranks.

    :param ranks: of the session that opens or ends
    """
    global _current
    _current = ranks
