"""The filled SB3 buffer as one set of tensors on the device, cut into minibatches."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

Observations = th.Tensor | dict[str, th.Tensor]

#: Bytes of observations, as float32, that one pass without gradient may take at a time
CHUNK_BYTES = 8 * 2**20
#: Up to this size the observations are put in each epoch's order as a whole; larger ones (images) minibatch by minibatch
SHUFFLED_BYTES = 32 * 2**20
#: From this size on, the float32 observations of a minibatch make the C library's heap grow and shrink with each minibatch
LARGE_MINIBATCH_BYTES = 2**20
#: Just below 32 MiB, the largest block that glibc's thresholds follow
KEPT_BYTES = 2**25 - 2**13
#: However small the observations are: the networks' activations take memory too
CHUNK_ROWS = 1024
#: The methods with which SB3's buffers make minibatches
SAMPLING = ("get", "_get_samples", "swap_and_flatten", "to_torch")
#: Arrays of sb3-contrib's recurrent buffers: the states of actor's and critic's memory before each step
MEMORY = ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf")


class Transitions(NamedTuple):
    """
    A rollout, a minibatch of it, or any other part, with a row for every transition.

    On the CPU the tensors of a whole rollout share the buffer's memory. Observations keep the type that the environment gave
    them.

    :param observations: shape (n_transitions, *obs_shape), or one such tensor per key
    :param actions: as the policy's ``evaluate_actions`` takes them; shape (n_transitions, action_dim), (n_transitions,) if
        Discrete
    :param old_values: the critic's predictions during the rollout, shape (n_transitions,)
    :param old_log_prob: log-probabilities of the actions when they were taken, shape (n_transitions,)
    :param advantages: shape (n_transitions,)
    :param returns: the critic's targets, shape (n_transitions,)
    :param old: parameters of the action distributions of the policy that acted
        (:class:`~sb3_ppo_penalty.objectives.divergence.ActionParameters`), or None before they are known
    """

    observations: Observations
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old: Any = None

    @classmethod
    def of(cls, buffer: RolloutBuffer) -> "Transitions":
        """
        Take over what a full buffer holds.

        :param buffer: its arrays are flattened in place to one row per transition, as its own ``get`` does
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

    @property
    def size(self) -> int:
        """The number of transitions; ``len`` is that of the tuple."""
        return len(self.actions)

    @property
    def observed(self) -> list[th.Tensor]:
        """The tensors of the observations, one per key of a dict."""
        return [*self.observations.values()] if isinstance(self.observations, dict) else [self.observations]

    @property
    def columns(self) -> list[th.Tensor]:
        """The tensors with a row for every transition."""
        return [*self.observed, *self[1:6], *(self.old.per_state if self.old else ())]

    @property
    def row_bytes(self) -> int:
        """The size of one transition's observations as float32."""
        return 4 * sum(tensor[0].numel() for tensor in self.observed)

    @property
    def chunk_rows(self) -> int:
        """The number of transitions that one pass without gradient may take at a time."""
        return min(max(CHUNK_BYTES // max(self.row_bytes, 1), 1), CHUNK_ROWS)

    @property
    def shared(self) -> tuple[th.Tensor, ...]:
        """The tensors that are the same for all transitions."""
        return self.old.shared if self.old else ()

    def with_columns(self, columns: Sequence[th.Tensor], shared: tuple[th.Tensor, ...] | None = None) -> "Transitions":
        """
        Exchange the tensors, for other transitions of the same kind.

        :param columns: in place of :attr:`columns`
        :param shared: in place of :attr:`shared`; default: the same
        """
        several = isinstance(self.observations, dict)
        count = len(self.observations) if several else 1
        observations = dict(zip(self.observations, columns, strict=False)) if several else columns[0]
        old = self.old
        if old is not None:
            old = old._replace(per_state=tuple(columns[count + 5 :]), shared=old.shared if shared is None else shared)
        return Transitions._make([observations, *columns[count : count + 5], old])

    def first(self, rows: int) -> "Transitions":
        """
        Take the first transitions.

        :param rows: how many; all if there are fewer
        """
        return self.with_columns([column[:rows] for column in self.columns])

    def keep_freed_memory(self, batch_size: int) -> None:
        """
        Let the C library keep what a minibatch of images frees, for the next one.

        glibc would give it back to the system and take it again, page by page, in a fifth of the update's time. It stops to do
        so once it has seen a block of 32 MB freed. This one is never touched, so it takes no memory.

        :param batch_size: of the minibatches
        """
        if batch_size * self.row_bytes > LARGE_MINIBATCH_BYTES and self.actions.device.type == "cpu":
            th.empty(KEPT_BYTES, dtype=th.uint8)

    def drawn_order(self) -> th.Tensor:
        """Draw an order of the transitions from numpy's global generator, as SB3 does; shape (n_transitions,)."""
        return th.from_numpy(np.random.permutation(self.size)).to(self.actions.device)  # noqa: NPY002 (SB3's stream)

    def cut(self, order: th.Tensor, sizes: list[int]) -> Iterator["Transitions"]:
        """
        Go once over the transitions in minibatches.

        :param order: the transitions' numbers, shape (n_transitions,)
        :param sizes: of the minibatches
        """
        indices = th.split(order, sizes)
        pieces = [
            map(column.__getitem__, indices) if column.nbytes > SHUFFLED_BYTES else th.split(column[order], sizes)
            for column in self.columns
        ]
        for columns in zip(*pieces, strict=True):
            yield self.with_columns(columns)

    def chunks(self) -> Iterator["Transitions"]:
        """Go once over the transitions in order, in parts that bound the memory of a pass without gradient."""
        for columns in zip(*(th.split(column, self.chunk_rows) for column in self.columns), strict=True):
            yield self.with_columns(columns)


def draws_rows(buffer: RolloutBuffer | type[RolloutBuffer], plain: Sequence[type[RolloutBuffer]]) -> bool:
    """
    Tell whether a buffer's minibatches are rows of its arrays in a random order, as those of SB3's buffers are.

    :param buffer: a buffer, or the class of one
    :param plain: classes whose minibatches are just that
    :return: False if ``get`` or a method that it calls is the buffer's own
    """

    def method(owner: Any, name: str) -> Any:
        found = getattr(owner, name, None)
        return getattr(found, "__func__", found)

    return all(method(buffer, name) in [method(each, name) for each in plain] for name in SAMPLING)


def sampled_minibatches(
    get: Callable[[int], Iterator[Any]], batch_size: int, take: Callable[[Any], Transitions]
) -> Iterator[Transitions]:
    """
    Ask a buffer for the minibatches of an epoch.

    :param get: of the buffer
    :param batch_size: handed on to the buffer
    :param take: makes transitions of the samples that the buffer gives
    :raises RuntimeError: if the buffer gives none
    """
    sampled = None
    for sampled in get(batch_size):
        yield take(sampled)
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
    :return: a buffer with the same attributes but for the arrays that :meth:`Transitions.of` reads
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
    # Also sb3-contrib's masks, which its own `get` has to find flattened
    names += ["action_masks"] if hasattr(buffer, "action_masks") else []
    # And the states of its memories, which come as (n_steps, n_layers, n_envs, width)
    states = [name for name in MEMORY if hasattr(buffer, name)]
    for name in states:
        setattr(buffer, name, getattr(buffer, name).swapaxes(1, 2))
    names += [*states, "episode_starts"] if states else []
    for name in names:
        setattr(buffer, name, buffer.swap_and_flatten(getattr(buffer, name)))
    buffer.generator_ready = True
