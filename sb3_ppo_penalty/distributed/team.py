"""
One training on several processes (ranks), each with environments of its own; the engine is torch.distributed.

A script trains on as many ranks as ``torchrun`` starts, and on one without it::

    with sb3_ppo_penalty.distributed.team.session() as ranks:
        model = PPOPenalty("MlpPolicy", "Pendulum-v1", seed=0)
        model.learn(100_000)
        if ranks.leads:
            model.save("pendulum")

``n_steps``, ``batch_size`` and the environments are each rank's own. The k-th minibatch of an epoch is that of all ranks' k-th
together, in which every transition counts the same: R ranks with ``batch_size`` B/R do what one process with B does. A rank
with fewer transitions cuts them into as many minibatches as the rank with most. ``num_timesteps`` and ``total_timesteps``
count the steps of all ranks. Rank 0 alone logs.
"""

import gc
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar

import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_penalty.arguments import require, require_number
from sb3_ppo_penalty.objectives.losses import Drift, drift, importance_ratio, k3_estimate, rank_of_p99
from sb3_ppo_penalty.rollouts.rollout import Minibatch, Rollout
from sb3_ppo_penalty.saving.checkpoints import complete_checkpoints
from sb3_ppo_penalty.updates.step import (
    Descent,
    EagerStepper,
    Evaluate,
    JointError,
    Settings,
    SharedDescent,
    SharedStepper,
)

Result = TypeVar("Result")
#: Gives KL(old || new) of some transitions, or None where it is not known, and the log of their importance ratio
Measure = Callable[[], tuple[th.Tensor | None, th.Tensor]]

#: Integers of as many bits as a number of so many bytes
BITS = {1: th.int8, 2: th.int16, 4: th.int32, 8: th.int64}
#: Between two ranks: each of a rank's environments takes one
SEEDS_APART = 2**20
#: Settings of ``VecNormalize`` that decide what policy and critic see
NORMALIZATION = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")
#: torch's own for gloo, in seconds
DEFAULT_TIMEOUT = 1800.0


class RankError(RuntimeError):
    """Another rank has ended or does not answer: this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """
    The processes that train one policy: here, a single one, which has nobody to ask.

    :param rank: number of this process, from 0
    :param size: number of processes
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that logs and should evaluate and save."""
        return self.rank == 0

    @property
    def name_prefix(self) -> str:
        """Of this rank's checkpoints: every rank needs its own to go on exactly."""
        return "rl_model"

    def latest_checkpoint(self, folder: str | Path) -> Path | None:
        """
        Find the checkpoint to go on from; to be called by all ranks.

        :param folder: where every rank's ``ResumableCheckpointCallback(..., name_prefix=ranks.name_prefix)`` writes
        :return: this rank's checkpoint of the latest moment of which every rank has a complete one; None if there is none
        """
        return next(complete_checkpoints(folder, self.name_prefix), None)

    def seed(self, seed: int | None) -> int | None:
        """
        :param seed: of the whole training
        :return: of this rank
        """
        return seed

    def enter(self, model: OnPolicyAlgorithm) -> None:
        """
        Before ``learn`` sets anything up.

        :param model: to be trained
        """

    def begin(self, model: OnPolicyAlgorithm, facts: Callable[[], Mapping[str, Any]]) -> None:
        """
        Before the first rollout: the ranks find out whether they fit together, and all take rank 0's weights.

        :param model: to be trained
        :param facts: gives what has to be alike on all ranks, by name
        :raises ValueError: naming what is not alike
        """

    def collect(self, model: OnPolicyAlgorithm, callback: BaseCallback, collect: Callable[[BaseCallback], bool]) -> bool:
        """
        :param model: being trained
        :param callback: of ``learn``
        :param collect: collects this rank's rollout, with a callback
        :return: False if a callback ended training, on whichever rank
        """
        return collect(callback)

    def minibatches(self, rollout: Rollout, batch_size: int, normalize: bool) -> Iterator[Minibatch]:
        """
        Go once over the rollout.

        :param rollout: of this rank
        :param batch_size: of this rank's minibatches
        :param normalize: whether their advantages are to be normalised, if they span ranks; what does not is left to the loss
        """
        return rollout.minibatches(batch_size)

    def stepper(self, policy: ActorCriticPolicy, evaluate: Evaluate, settings: Settings) -> EagerStepper | SharedStepper:
        """
        :param policy: whose weights move
        :param evaluate: the loss
        :param settings: of an update
        :return: makes the optimizer's steps
        """
        return EagerStepper(policy, evaluate, settings)

    def descent(self, policy: ActorCriticPolicy, settings: Settings) -> Callable[[th.Tensor, int], Any]:
        """
        :param policy: whose weights move
        :param settings: of an update
        :return: makes a step from a loss, a mean over some transitions, and their number
        """
        descend = Descent(policy, settings)
        return lambda loss, count: descend(loss)

    def drift(self, policy: ActorCriticPolicy, measure: Measure) -> Drift:
        """
        :param policy: that is measured
        :param measure: of this rank's transitions
        :return: how far the policy moved, over the transitions of all ranks
        """
        return drift(*measure())

    def agree(self, fine: bool, failure: Exception | None) -> bool:
        """
        :param fine: whether this rank's update is finite
        :param failure: what ended this rank's update, if anything did
        :return: whether every rank's is
        """
        return fine

    def mean(self, figures: dict[str, float], count: int) -> dict[str, float]:
        """
        :param figures: means over some transitions, by name
        :param count: number of these transitions
        :return: means over the transitions of all ranks
        """
        return figures

    def check_alike(self, model: OnPolicyAlgorithm) -> None:
        """
        After an update: every rank must hold the same policy, optimizer and coefficient, to the last bit.

        :param model: being trained
        :raises RankError: if that is not so
        """


#: A training that is not distributed
ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """:return: the ranks of the session that is open, or a single process."""
    return _current


def _asked_for() -> bool:
    """:return: whether a launcher has told this process that it is one of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def session(timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """
    Train on all processes that ``torchrun``, or any launcher that sets the same variables, has started.

    Models that are made inside are trained by all ranks together: each must make the same model and call the same ``learn``.
    Tensors on the CPU travel by gloo, on a GPU by nccl; a rank takes the GPU that ``LOCAL_RANK`` names. A process group that
    there is already is joined as it is, and outlives the session. In a process that was started by itself nothing is
    initialised, and models are trained as ever.

    :param timeout: how long a rank waits for the others before it fails, in seconds. They wait for the slowest at the end of
        every rollout, also while rank 0 evaluates or a rank compiles
    :return: which of the processes this is
    :raises ValueError: for a timeout that is not above 0
    :raises RankError: if the ranks do not find each other in time
    """
    global _current
    require_number("timeout", timeout, 0, open_below=True)
    if not _asked_for():
        yield ALONE
        return
    own, before = not dist.is_initialized(), _current
    _import_dynamo()
    if own:
        _initialise(timeout)
    try:
        _current = Team(dist.get_rank(), dist.get_world_size())
        yield _current
    finally:
        _current = before
        if own:
            # Also after an error: the others learn at once that nobody will answer
            dist.destroy_process_group()
            # A cycle of references that holds the group would hold its threads as well
            gc.collect()


def _import_dynamo() -> None:
    """
    Import torch._dynamo as if there were no process group yet.

    Making an optimizer imports it, and with it ``torch.distributed.nn``, whose functions take the process group of that
    moment as a default argument. They would keep the group and gloo's threads beyond ``destroy_process_group``, and a thread
    that releases a tensor while the interpreter ends aborts the process.
    """
    group, dist.group.WORLD = dist.group.WORLD, None
    try:
        import_module("torch._dynamo")
    finally:
        dist.group.WORLD = group


def _initialise(timeout: float) -> None:
    """
    :param timeout: in seconds
    :raises RankError: if the ranks do not find each other in time
    """
    backend = "gloo"
    if th.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % th.cuda.device_count())
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise RankError(f"the ranks did not find each other within {timeout:g} s: {error}") from error


class Report(NamedTuple):
    """
    What a rank tells the others about its rollout.

    :param steps: of its environments
    :param goes_on: whether no callback ended training
    :param episodes: that ended, with the number of the step
    :param successes: likewise, whether they succeeded
    :param statistics: of ``VecNormalize``, by name
    """

    steps: int
    goes_on: bool
    episodes: list[tuple[int, dict[str, Any]]]
    successes: list[tuple[int, Any]]
    statistics: dict[str, RunningMeanStd]


class Tally(BaseCallback):
    """
    Comes before the user's callbacks: counts the steps of all ranks, and notes what ends.

    :param others: number of the other ranks' environments
    """

    def __init__(self, others: int) -> None:
        super().__init__()
        self.others = others
        self.episodes: list[tuple[int, dict[str, Any]]] = []
        self.successes: list[tuple[int, Any]] = []

    def _on_step(self) -> bool:
        """:return: True: go on."""
        self.model.num_timesteps += self.others
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            if "episode" in info:
                self.episodes.append((self.n_calls, info["episode"]))
            if done and "is_success" in info:
                self.successes.append((self.n_calls, info["is_success"]))
        return True


@dataclass(frozen=True)
class Team(Ranks):
    """Several processes. Every method is called by all of them, or they wait for each other until the timeout."""

    @property
    def name_prefix(self) -> str:
        """Of this rank's checkpoints: every rank needs its own to go on exactly."""
        return f"rl_model_rank{self.rank}of{self.size}"

    def latest_checkpoint(self, folder: str | Path) -> Path | None:
        """
        Find the checkpoint to go on from; to be called by all ranks.

        :param folder: where every rank's ``ResumableCheckpointCallback(..., name_prefix=ranks.name_prefix)`` writes
        :return: this rank's checkpoint of the latest moment of which every rank has a complete one; None if there is none
        """
        paths = {path.name.removeprefix(self.name_prefix): path for path in complete_checkpoints(folder, self.name_prefix)}
        found = self._gathered(list(paths))
        # Rank 0's order: the latest first
        common = [moment for moment in found[0] if all(moment in each for each in found)]
        return paths[common[0]] if common else None

    def seed(self, seed: int | None) -> int | None:
        """
        :param seed: of the whole training
        :return: of this rank
        """
        return None if seed is None else (seed + self.rank * SEEDS_APART) % 2**32

    def enter(self, model: OnPolicyAlgorithm) -> None:
        """
        Rank 0 alone logs.

        :param model: to be trained
        """
        if not self.leads:
            model.set_logger(Logger(folder=None, output_formats=[]))

    def begin(self, model: Any, facts: Callable[[], Mapping[str, Any]]) -> None:
        """
        The ranks find out whether they fit together, and all take rank 0's weights and statistics.

        :param model: to be trained
        :param facts: gives what has to be alike on all ranks, by name
        :raises ValueError: naming what is not alike
        """
        policy, statistics = model.policy, _statistics(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
        own = {**facts(), "policy": shapes, "env (VecNormalize)": _normalization(model)}
        gathered = self._gathered({name: repr(value) for name, value in own.items()})
        for name in own:
            values = [each.get(name) for each in gathered]
            require(len(set(values)) == 1, name, values, "the same on all ranks")
        rollouts = self._gathered((model.n_steps * model.n_envs, model.batch_size))
        count = max(math.ceil(length / batch_size) for length, batch_size in rollouts)
        allowed = f"such that every rank has a transition for each of the {count} minibatches (transitions, batch_size)"
        require(all(length >= count for length, _ in rollouts), "batch_size", rollouts, allowed)
        state = policy.state_dict(), policy.optimizer.state_dict(), {name: vars(each) for name, each in statistics.items()}
        state = self._from_rank_0(state, model.device)
        policy.load_state_dict(state[0])
        policy.optimizer.load_state_dict(state[1])
        for name, each in statistics.items():
            vars(each).update(state[2][name])

    def collect(self, model: OnPolicyAlgorithm, callback: BaseCallback, collect: Callable[[BaseCallback], bool]) -> bool:
        """
        Each rank collects by itself; they meet afterwards, also one whose callback has ended training.

        :param model: being trained
        :param callback: of ``learn``
        :param collect: collects this rank's rollout, with a callback
        :return: False if a callback ended training, on whichever rank
        """
        tally = Tally(int(self._sum([model.n_envs])[0]) - model.n_envs)
        both = CallbackList([tally, callback])
        tally.model = both.model = model
        episodes, successes = deepcopy((model.ep_info_buffer, model.ep_success_buffer))
        steps, statistics = model.num_timesteps, deepcopy(_statistics(model))
        goes_on = collect(both)
        own = tally.n_calls * model.n_envs
        reports = self._gathered(Report(own, goes_on, tally.episodes, tally.successes, _statistics(model)))
        # As counted, where it was estimated on the way: the others may have collected more, or fewer
        model.num_timesteps = steps + sum(report.steps for report in reports)
        for recent, name in ((episodes, "episodes"), (successes, "successes")):
            assert recent is not None
            # In the order of time, as one process with all the environments would have seen them
            ended = sorted((each for report in reports for each in getattr(report, name)), key=lambda each: each[0])
            recent.extend(what for _, what in ended)
        model.ep_info_buffer, model.ep_success_buffer = episodes, successes
        for name, each in _statistics(model).items():
            _merge(each, statistics[name], [report.statistics[name] for report in reports])
        return all(report.goes_on for report in reports)

    def minibatches(self, rollout: Rollout, batch_size: int, normalize: bool) -> Iterator[Minibatch]:
        """
        Go once over the rollout, in as many minibatches as the rank with most of them makes.

        :param rollout: of this rank
        :param batch_size: of this rank's minibatches, unless it has to make more
        :param normalize: whether their advantages are to be normalised: with mean and deviation over all ranks' minibatch
        """
        length = len(rollout)
        own = math.ceil(length / batch_size)
        count = -int(self._least([-own])[0])
        full = [batch_size] * (own - 1)
        sizes = [*full, length - sum(full)] if own == count else [length // count + (k < length % count) for k in range(count)]
        order = rollout.drawn_order()
        if normalize:
            rollout = replace(rollout, advantages=self._normalized(rollout.advantages, order, sizes))
        yield from rollout.cut(order, sizes)

    def _normalized(self, advantages: th.Tensor, order: th.Tensor, sizes: list[int]) -> th.Tensor:
        """
        See :func:`~.normalize_advantages`; in one sum for all minibatches of an epoch.

        :param advantages: of this rank's transitions, shape (n_transitions,)
        :param order: in which they are cut into minibatches, shape (n_transitions,)
        :param sizes: of the minibatches
        :return: in the order of ``advantages``, each normalised over the minibatch that it falls into, shape (n_transitions,)
        """
        device = advantages.device
        values = advantages[order].double()
        batch = th.repeat_interleave(th.arange(len(sizes), device=device), th.tensor(sizes, device=device))
        moments = th.stack([th.ones_like(values), values, values.square()])
        sums = th.zeros(3, len(sizes), dtype=values.dtype, device=device).index_add_(1, batch, moments)
        self._add_up(sums)
        count, total, squares = sums
        mean = total / count
        deviation = ((squares - total * mean).clamp(min=0) / (count - 1)).sqrt()
        shifted = ((values - mean[batch]) / (deviation[batch] + 1e-8)).to(advantages.dtype)
        # A single advantage has no deviation
        normalized = th.empty_like(advantages)
        normalized[order] = th.where(count[batch] > 1, shifted, advantages[order])
        return normalized

    def stepper(self, policy: ActorCriticPolicy, evaluate: Evaluate, settings: Settings) -> EagerStepper | SharedStepper:
        """
        :param policy: whose weights move
        :param evaluate: the loss
        :param settings: of an update
        :return: makes the optimizer's steps, from the gradients of all ranks
        """
        return SharedStepper(policy, evaluate, settings, self._add_up)

    def descent(self, policy: ActorCriticPolicy, settings: Settings) -> Callable[[th.Tensor, int], Any]:
        """
        :param policy: whose weights move
        :param settings: of an update
        :return: makes a step from this rank's loss, a mean over some transitions, and their number
        """
        return SharedDescent(policy, settings, self._add_up)

    def drift(self, policy: ActorCriticPolicy, measure: Measure) -> Drift:
        """
        :param policy: that is measured; its buffers, such as a batch norm's, become rank 0's
        :param measure: of this rank's transitions
        :return: how far the policy moved, over the transitions of all ranks: sums, maxima and counts of them travel
        """
        for buffer in policy.buffers():
            with self._answered():
                dist.broadcast(buffer, src=0)
        kl, log_ratio = self._attempt(measure)
        log_ratio = log_ratio.double()
        largest = -self._least([-float(log_ratio.max())])[0]
        weights = importance_ratio(log_ratio, float(largest))
        own = len(log_ratio)
        k3_sum, weight_sum, square_sum, count = self._sum(
            [float(k3_estimate(log_ratio)) * own, float(weights.sum()), float(weights.square().sum()), own]
        ).tolist()
        effective = weight_sum**2 / (count * square_sum) if square_sum else math.nan
        mean, most, p99 = (None, None, None) if kl is None else self._exact_drift(kl, int(count))
        return Drift(mean, k3_sum / count, effective, float(importance_ratio(largest, 0.0)), most, p99)

    def _exact_drift(self, kl: th.Tensor, count: int) -> tuple[float, float, float]:
        """
        Mean, maximum and 99th percentile of the states' divergences over all ranks.

        :param kl: of this rank's states, in nats, shape (n,)
        :param count: of all ranks' states
        :return: all three in nats
        """
        mean = float(self._sum([float(kl.double().sum())])[0]) / count
        return mean, -float(self._least([-float(kl.max())])[0]), self._at_place(kl.float(), rank_of_p99(count))

    def _at_place(self, values: th.Tensor, place: int) -> float:
        """
        Select by radix: byte by byte the ranks count how many of them have each, so that no value travels.

        :param values: of this rank, float32, shape (n,)
        :param place: in rising order among the values of all ranks, from 1
        :return: the value there
        """
        bits = values.view(th.int32).long()
        # Bit patterns of floats rise as the floats do, those of negative ones the other way round
        keys = th.where(bits < 0, ~bits, bits + 2**31)
        found = 0
        for shift in (24, 16, 8, 0):
            within = keys[keys >> (shift + 8) == found]
            counts = th.bincount((within >> shift) & 0xFF, minlength=256)
            self._add_up(counts)
            up_to = counts.cumsum(0)
            byte = int((up_to < place).sum())
            place -= int(up_to[byte] - counts[byte])
            found = (found << 8) | byte
        pattern = found - 2**31 if found >= 2**31 else ~found
        return float(th.tensor(pattern, dtype=th.int32).view(th.float32))

    def agree(self, fine: bool, failure: Exception | None) -> bool:
        """
        :param fine: whether this rank's update is finite
        :param failure: what ended this rank's update, if anything did
        :return: whether every rank's is; after a failure that the others do not share, nobody is asked
        """
        if failure is not None and not isinstance(failure, JointError):
            return fine
        return bool(self._least([float(fine)])[0])

    def mean(self, figures: dict[str, float], count: int) -> dict[str, float]:
        """
        :param figures: means over some transitions, by name
        :param count: number of these transitions
        :return: means over the transitions of all ranks
        """
        *sums, total = self._sum([*(figure * count for figure in figures.values()), count]).tolist()
        return {name: each / total for name, each in zip(figures, sums, strict=True)}

    def check_alike(self, model: OnPolicyAlgorithm) -> None:
        """
        After an update: every rank must hold the same policy, optimizer and coefficient, to the last bit.

        :param model: being trained
        :raises RankError: if that is not so
        """
        moments = [value for state in model.policy.optimizer.state.values() for value in state.values()]
        tensors = [*model.policy.state_dict().values(), *(each for each in moments if isinstance(each, th.Tensor))]
        tensors.append(th.tensor(getattr(model, "kl_coef", 0.0), dtype=th.float64))
        # Sums of bit patterns: one bit of one number changes them
        sums = [each.detach().reshape(-1).view(BITS[each.element_size()]).sum(dtype=th.int64).cpu() for each in tensors]
        marks = th.stack(sums)
        both = th.cat([marks, -marks])
        with self._answered():
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        if bool((both[: len(marks)] + both[len(marks) :]).any()):
            raise RankError(
                f"after the update at {model.num_timesteps} steps the ranks hold different weights, moments or coefficients: "
                "something changes them on one rank alone (a callback?), or their processors round differently"
            )

    def _attempt(self, work: Callable[[], Result]) -> Result:
        """
        :param work: of this rank alone, which may fail
        :return: what came of it
        :raises JointError: on all ranks, if it failed on one
        """
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self._sum([float(failure is not None)])[0] > 0:
            raise JointError.of(failure) from failure
        return result

    def _add_up(self, tensor: th.Tensor) -> None:
        """
        :param tensor: replaced by the sum of all ranks'
        """
        with self._answered():
            dist.all_reduce(tensor)

    def _sum(self, values: Iterable[float]) -> th.Tensor:
        """
        :param values: of this rank
        :return: their sums over all ranks, float64
        """
        sums = th.tensor(list(values), dtype=th.float64)
        self._add_up(sums)
        return sums

    def _least(self, values: Iterable[float]) -> th.Tensor:
        """
        :param values: of this rank
        :return: their minima over all ranks, float64
        """
        least = th.tensor(list(values), dtype=th.float64)
        with self._answered():
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least

    def _gathered(self, own: Result) -> list[Result]:
        """
        :param own: of this rank; is pickled
        :return: every rank's
        """
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, own)
        return found

    def _from_rank_0(self, state: Result, device: th.device) -> Result:
        """
        :param state: tensors and plain values
        :param device: to put tensors on
        :return: rank 0's
        """
        file = io.BytesIO()
        th.save(state, file)
        box: list[Any] = [file.getvalue() if self.leads else None]
        with self._answered():
            dist.broadcast_object_list(box, src=0)
        received: Result = th.load(io.BytesIO(box[0]), map_location=device, weights_only=False)
        return received

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """:raises RankError: in one sentence, for whatever torch says when another rank does not answer."""
        try:
            yield
        except RuntimeError as error:
            # Whoever keeps the error would keep the process group, a local variable of torch's functions
            clear_frames(error.__traceback__)
            raise RankError(
                f"rank {self.rank} of {self.size} cannot go on: another rank has ended, or has not answered within the "
                f"session's timeout; its own output says why ({str(error).splitlines()[0]})"
            ) from error


def _normalizers(model: OnPolicyAlgorithm) -> Iterator[VecNormalize]:
    """
    Find every ``VecNormalize`` around the training environments, from the outside in.

    :param model: to be trained
    :return: none, one or, where one normalises what another has stacked, several
    """
    env = model.env
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            yield env
        env = env.venv


def _normalization(model: OnPolicyAlgorithm) -> list[dict[str, Any]] | None:
    """
    Describe how observations and rewards are normalised, which has to be alike on all ranks.

    :param model: to be trained
    :return: settings and normalised keys of each ``VecNormalize``; None if there is none
    """
    return [
        {**{name: vars(env)[name] for name in NORMALIZATION}, "statistics": sorted(_statistics_of(env))}
        for env in _normalizers(model)
    ] or None


def _statistics_of(env: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    Name the running means and variances of one ``VecNormalize``.

    :param env: which has no statistics of observations if it was made with ``norm_obs=False``
    :return: those of returns and those of observations, by key if they are dicts
    """
    # The attribute of this wrapper: `getattr` would find one further in
    seen = vars(env).get("obs_rms", {})
    observations = seen if isinstance(seen, dict) else {"": seen}
    return {"returns": env.ret_rms, **{f"observations {key}": each for key, each in observations.items()}}


def _statistics(model: OnPolicyAlgorithm) -> dict[str, RunningMeanStd]:
    """
    Name the running means and variances of every ``VecNormalize``.

    :param model: with or without ``VecNormalize``
    :return: by place of the wrapper, and name
    """
    layers = enumerate(_normalizers(model))
    return {f"{place} {name}": each for place, env in layers for name, each in _statistics_of(env).items()}


def _merge(live: RunningMeanStd, before: RunningMeanStd, after: list[RunningMeanStd]) -> None:
    """
    Merge running statistics as if one process had seen all data.

    :param live: is changed, unless nobody saw anything: rounding would move statistics that are not in training
    :param before: the rollout, the same on all ranks
    :param after: the rollout, of every rank
    """
    if all(each.count == before.count for each in after):
        return
    count = sum(each.count for each in after) - (len(after) - 1) * before.count
    # Moments about the old mean add up; the old ones are in every rank's
    first = sum(each.count * (each.mean - before.mean) for each in after)
    second = sum(each.count * (each.var + (each.mean - before.mean) ** 2) for each in after)
    second = second - (len(after) - 1) * before.count * before.var
    live.mean = before.mean + first / count
    live.var = second / count - (first / count) ** 2
    live.count = count
