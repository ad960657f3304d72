"""The filled SB3 buffer as one set of tensors on the device, and the document's reward-to-go buffer."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

Observations = th.Tensor | dict[str, th.Tensor]

#: What one pass over a part of the rollout may hold of observations, as float32
CHUNK_BYTES = 8 * 2**20
#: Up to this size the observations are put in each epoch's order as a whole; larger ones (images) minibatch by minibatch
SHUFFLED_BYTES = 32 * 2**20
#: However small the observations are: the networks' activations take memory too
CHUNK_ROWS = 4096


#: What SB3's buffers make minibatches with
SAMPLING = ("get", "_get_samples", "swap_and_flatten", "to_torch")


def draws_rows(buffer: RolloutBuffer | type[RolloutBuffer], plain: Sequence[type[RolloutBuffer]]) -> bool:
    """
    Tell whether a buffer's minibatches are rows of its arrays in a random order, as those of SB3's buffers are.

    :param buffer: a buffer, or the class of one
    :param plain: classes whose minibatches are just that
    :return: False if ``get`` or something that it calls is the buffer's own
    """

    def method(owner: Any, name: str) -> Any:
        found = getattr(owner, name, None)
        return getattr(found, "__func__", found)

    return all(method(buffer, name) in [method(each, name) for each in plain] for name in SAMPLING)


class Minibatch(NamedTuple):
    """
    Some of the rollout's transitions.

    :param observations: shape (batch, *obs_shape), or one such tensor per key
    :param actions: as the policy's ``evaluate_actions`` takes them; shape (batch, action_dim), (batch,) if Discrete
    :param old_values: the critic's predictions during the rollout, shape (batch,)
    :param old_log_prob: log-probabilities of the actions when they were taken, shape (batch,)
    :param advantages: shape (batch,)
    :param returns: the critic's targets, shape (batch,)
    :param old: the policy's distributions when it acted (:class:`~.ActionParameters`), or None
        before they are frozen
    """

    observations: Observations
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old: Any

    @property
    def columns(self) -> list[th.Tensor]:
        """The tensors with a row for every transition."""
        observations = self.observations.values() if isinstance(self.observations, dict) else (self.observations,)
        return [*observations, *self[1:6], *(self.old.per_state if self.old else ())]

    @property
    def shared(self) -> tuple[th.Tensor, ...]:
        """The tensors that are the same for all transitions."""
        return self.old.shared if self.old else ()

    def with_columns(self, columns: Sequence[th.Tensor], shared: tuple[th.Tensor, ...] | None = None) -> "Minibatch":
        """
        :param columns: in place of :attr:`columns`
        :param shared: in place of :attr:`shared`; default: the same
        """
        count = len(self.observations) if isinstance(self.observations, dict) else 1
        observations = (
            dict(zip(self.observations, columns, strict=False)) if isinstance(self.observations, dict) else columns[0]
        )
        actions, old_values, old_log_prob, advantages, returns = columns[count : count + 5]
        old = self.old
        if old is not None:
            old = old._replace(per_state=tuple(columns[count + 5 :]), shared=old.shared if shared is None else shared)
        return Minibatch(observations, actions, old_values, old_log_prob, advantages, returns, old)


@dataclass(frozen=True)
class Rollout:
    """
    A rollout on the device; the fields are those of :class:`Minibatch`, with a row for every transition.

    On the CPU the tensors share the buffer's memory. Observations keep the type that the environment gave them.
    """

    observations: Observations
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old: Any = None

    @classmethod
    def of(cls, buffer: RolloutBuffer) -> "Rollout":
        """
        Take over what a buffer holds.

        :param buffer: full; its arrays are flattened in place to one row per transition, as its own ``get`` does
        :raises RuntimeError: if the buffer is not full
        """
        if not buffer.full:
            raise RuntimeError(
                f"there is no full rollout to learn from ({buffer.pos} of {buffer.buffer_size} steps): `train` is called by "
                "`learn`, after it has collected `n_steps`, which have to fill the buffer"
            )
        _flatten(buffer)
        device = buffer.device
        observations = (
            {key: as_tensor(array, device) for key, array in buffer.observations.items()}
            if isinstance(buffer.observations, dict)
            else as_tensor(buffer.observations, device)
        )
        # float32 like SB3's samples: a Bernoulli's log-probability does not take int8
        actions = as_tensor(buffer.actions, device).float()
        if isinstance(buffer.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        values, log_probs, advantages, returns = (as_tensor(array, device).flatten() for array in columns)
        return cls(observations, actions, values, log_probs, advantages, returns)

    def __len__(self) -> int:
        """:return: the number of transitions."""
        return len(self.actions)

    @property
    def whole(self) -> Minibatch:
        """All transitions."""
        return Minibatch(*(getattr(self, name) for name in Minibatch._fields))

    def first(self, rows: int) -> Minibatch:
        """
        :param rows: how many
        :return: the first transitions, or all if there are fewer
        """
        whole = self.whole
        return whole.with_columns([column[:rows] for column in whole.columns])

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """
        Go once over the rollout in an order drawn from numpy's global generator, as SB3's buffer does.

        :param batch_size: the last minibatch is smaller if this does not divide the rollout
        """
        # torch takes no length beyond 64 bits
        yield from self.cut(self.drawn_order(), min(batch_size, len(self)))

    def drawn_order(self) -> th.Tensor:
        """:return: the transitions' numbers in an order drawn from numpy's global generator, shape (n_transitions,)."""
        return th.from_numpy(np.random.permutation(len(self))).to(self.actions.device)  # noqa: NPY002 (SB3's stream)

    def cut(self, order: th.Tensor, sizes: int | list[int]) -> Iterator[Minibatch]:
        """
        Go once over the rollout.

        :param order: the transitions' numbers, shape (n_transitions,)
        :param sizes: of the minibatches, or the one size of all but the last
        """
        whole = self.whole
        indices = th.split(order, sizes)
        pieces = [
            map(column.__getitem__, indices) if column.nbytes > SHUFFLED_BYTES else th.split(column[order], sizes)
            for column in whole.columns
        ]
        for columns in zip(*pieces, strict=True):
            yield whole.with_columns(columns)

    def chunks(self) -> Iterator[Minibatch]:
        """Go once over the rollout in order, in parts that bound the memory of a pass without gradient."""
        tensors = self.observations.values() if isinstance(self.observations, dict) else [self.observations]
        row_bytes = 4 * sum(tensor[0].numel() for tensor in tensors)
        rows = min(max(CHUNK_BYTES // max(row_bytes, 1), 1), CHUNK_ROWS)
        whole = self.whole
        for columns in zip(*(th.split(column, rows) for column in whole.columns), strict=True):
            yield whole.with_columns(columns)


@dataclass(frozen=True)
class SampledRollout(Rollout):
    """
    A rollout whose buffer makes the minibatches by a ``get`` of its own.

    Where the policy moved is still measured in the states of the buffer's arrays, those that the policy acted in.

    :param samples: the buffer's ``get``
    :param minibatch: makes a :class:`Minibatch` of what that gives
    """

    samples: Callable[[int], Iterator[Any]] = field(kw_only=True)
    minibatch: Callable[[Any], Minibatch] = field(kw_only=True)

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """
        Ask the buffer for the minibatches of an epoch.

        :param batch_size: handed on to the buffer
        :raises RuntimeError: if there are none
        """
        sampled = None
        for sampled in self.samples(batch_size):
            yield self.minibatch(sampled)
        if sampled is None:
            raise RuntimeError("the `get` of the rollout buffer gave no minibatch")


def as_tensor(array: Any, device: th.device | str) -> th.Tensor:
    """
    Bring an array to a device.

    :param array: an array or a tensor
    :param device: where to
    :return: on the CPU in the same memory, unless torch cannot write to it there or cannot follow its strides
    """
    array = array if isinstance(array, th.Tensor) else np.require(array, requirements=["C", "W"])
    return th.as_tensor(array, device=device)


def flat_copy(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    Flatten a buffer's arrays and leave the buffer as it is, so that its own ``get`` finds what it expects.

    :param buffer: full
    :return: a buffer with the same attributes but for the arrays that :meth:`Rollout.of` reads
    """
    copied = copy.copy(buffer)
    _flatten(copied)
    return copied


def _flatten(buffer: RolloutBuffer) -> None:
    """
    Bring a buffer's arrays from (n_steps, n_envs, ...) to (n_steps * n_envs, ...), once per rollout.

    :param buffer: full
    """
    if buffer.generator_ready:
        return
    arrays: Any = buffer.observations
    several = isinstance(arrays, dict)
    flat = {key: buffer.swap_and_flatten(array) for key, array in (arrays if several else {"": arrays}).items()}
    buffer.observations = flat if several else flat[""]  # type: ignore[assignment]
    names = ["actions", "values", "log_probs", "advantages", "returns"]
    # sb3-contrib's, whose own `get` has to find them as flat as the rest
    names += ["action_masks"] if hasattr(buffer, "action_masks") else []
    for name in names:
        setattr(buffer, name, buffer.swap_and_flatten(getattr(buffer, name)))
    buffer.generator_ready = True


class RewardToGoMixin(RolloutBuffer):
    """
    Targets and advantages as the document has them (section 5), instead of SB3's lambda-returns.

    The target of a step is the discounted sum of the rewards from there to the end of its episode, with no bootstrapping;
    its advantage is the target minus the critic's prediction, normalised once over the whole rollout with 1e-10 in the
    denominator. ``gae_lambda`` is not used, and episodes that a time limit ends are not bootstrapped either.

    An episode that the rollout cuts short is taken as if it had ended there: its targets hold only the rewards seen, and
    are too small in size. Its remaining steps come at the start of the next rollout, as the document's own loop, which
    collects whole episodes, never does. Choose ``n_steps`` as a multiple of the episodes' length to cut none.
    """

    #: Asked by the algorithm: SB3 adds the value of the last observation to the reward at a time limit unless told not to
    bootstrap_timeouts = False
    #: Each class's name in saved files, which stays: SB3 writes a class's own attributes beside its pickle, but not its name
    saved_as: ClassVar[str]

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray[Any, Any]) -> None:
        """
        Fill ``returns`` and ``advantages``, both of shape (n_steps, n_envs).

        :param last_values: not used: nothing is bootstrapped
        :param dones: not used: the last step of the rollout ends every episode in it
        """
        to_go = np.zeros(self.n_envs)
        for step in reversed(range(self.buffer_size)):
            to_go = self.rewards[step] + self.gamma * to_go
            self.returns[step] = to_go
            # Where a step starts an episode, nothing of it belongs to the step before
            to_go = to_go * (1 - self.episode_starts[step])
        advantages = self.returns - self.values
        if advantages.size > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-10)
        self.advantages = advantages


class RewardToGoRolloutBuffer(RewardToGoMixin):
    """For ``rollout_buffer_class``, where observations are arrays: see :class:`RewardToGoMixin`."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.RewardToGoRolloutBuffer"


class RewardToGoDictRolloutBuffer(RewardToGoMixin, DictRolloutBuffer):
    """For ``rollout_buffer_class``, where observations are dicts: see :class:`RewardToGoMixin`."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.RewardToGoDictRolloutBuffer"


class IgnoreTimeLimits(VecEnvWrapper):
    """Environments that do not tell whether a time limit ended the episode, so that SB3 bootstraps none."""

    def reset(self) -> VecEnvObs:
        """:return: the first observations."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """:return: observations, rewards, dones, and infos without the time limit."""
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards, dones, [{**info, "TimeLimit.truncated": False} for info in infos]
