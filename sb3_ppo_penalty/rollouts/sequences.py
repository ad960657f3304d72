"""
Steps in sequences, for policies with a memory.

What such a policy needs besides observations travels in their place, in one of two layouts. *By steps*: a row for every step,
with the states of the memory before it, so that every step can be asked about alone. *Padded*: sequences of steps, each
filled up to the longest, with the states before their first steps, as recurrent networks take them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_penalty.rollouts.rollout import Observations, Transitions, flat_copy

#: Keys in the place of observations: none that an environment would use
OBSERVATION, EPISODE_STARTS, SEQUENCE_STARTS, REAL = "<observation>", "<episode_starts>", "<sequence_starts>", "<real>"
#: The memory's states before a step, shape (n_steps or n_sequences, n_layers, width): the actor's two, the critic's two
STATES = ("<hidden_pi>", "<cell_pi>", "<hidden_vf>", "<cell_vf>")


def by_name(observations: Observations) -> dict[str, th.Tensor]:
    """
    Give observations names, to which others can be added.

    :param observations: the environments'
    :return: one tensor per name
    """
    return dict(observations) if isinstance(observations, dict) else {OBSERVATION: observations}


def real_steps(observations: Observations) -> th.Tensor | None:
    """
    Tell which rows of padded sequences are steps that were made.

    :param observations: of some transitions
    :return: booleans, shape (n_sequences * longest,); None where nothing is padded
    """
    return observations.get(REAL) if isinstance(observations, dict) else None


def spread(column: th.Tensor, real: th.Tensor) -> th.Tensor:
    """
    Move rows to where padded sequences have their real steps; the rest is 0.

    :param column: a row for every real step
    :param real: see :func:`real_steps`
    :return: shape (n_sequences * longest, ...)
    """
    wide = column.new_zeros((len(real), *column.shape[1:]))
    wide[real] = column
    return wide


def shown_rows(first: th.Tensor, sizes: th.Tensor) -> th.Tensor:
    """
    Choose what a policy is shown of padded sequences: in the place of padding, the last step of the same sequence.

    What a policy makes of rows that no environment gave may be infinite or NaN; its gradient is 0 times that then, although
    nothing is made of the answer.

    :param first: number of each sequence's first row, shape (n_sequences,)
    :param sizes: number of steps of each sequence, shape (n_sequences,)
    :return: numbers of rows, shape (n_sequences * longest,)
    """
    place = th.arange(int(sizes.max()), device=sizes.device)
    return (first[:, None] + place.minimum(sizes[:, None] - 1)).flatten()


def pad(steps: Transitions, lengths: Sequence[int]) -> Transitions:
    """
    Bring steps from the layout by steps to the padded one.

    :param steps: whole sequences, one after the other
    :param lengths: number of steps of each
    :return: the same steps; only what is in the place of the observations is padded
    """
    assert isinstance(steps.observations, dict)
    sizes = th.tensor(lengths, device=steps.actions.device)
    real = (th.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]).flatten()
    first = sizes.cumsum(0) - sizes
    shown = shown_rows(first, sizes)
    columns = {key: column for key, column in steps.observations.items() if key != SEQUENCE_STARTS}
    padded = {key: column[first if key in STATES else shown] for key, column in columns.items()}
    starts = spread(steps.observations[EPISODE_STARTS], real)
    return steps._replace(observations={**padded, EPISODE_STARTS: starts, REAL: real})


def without_starts(padded: Transitions) -> Transitions:
    """
    Give memories empty where an episode begins with its sequence, so that the policy has none to empty.

    :param padded: sequences in which no episode begins but at the first step
    """
    assert isinstance(padded.observations, dict)
    starts = padded.observations[EPISODE_STARTS]
    kept = 1.0 - starts.view(len(padded.observations[STATES[0]]), -1)[:, :1, None]
    states = {name: kept * padded.observations[name] for name in STATES}
    return padded._replace(observations={**padded.observations, **states, EPISODE_STARTS: th.zeros_like(starts)})


def whole_sequences(rollout: Transitions) -> Iterator[Transitions]:
    """
    Go once over a rollout in padded sequences, the shortest first, in parts that bound the memory of a pass.

    :param rollout: in the layout by steps, environment after environment
    :return: parts of whole sequences; one that is longer than a part may be is a part of its own
    """
    assert isinstance(rollout.observations, dict)
    starts = rollout.observations[SEQUENCE_STARTS].nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([rollout.size]))
    order = lengths.argsort(stable=True)
    for part in _parts(lengths[order].tolist(), rollout.chunk_rows):
        chosen = order[part]
        rows = th.cat([th.arange(start, start + lengths[n]) for n, start in zip(chosen, starts[chosen], strict=True)])
        yield pad(rollout.with_columns([column[rows] for column in rollout.columns]), lengths[chosen].tolist())


def _parts(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """
    Group sequences so that a group, padded to its longest, stays below a size.

    :param lengths: of the sequences, ascending
    :param most: steps in a group, those of the padding included
    """
    begin = 0
    for end, length in enumerate(lengths):
        if end > begin and (end - begin + 1) * length > most:
            yield slice(begin, end)
            begin = end
    yield slice(begin, len(lengths))


def watched_get(buffer: RolloutBuffer) -> tuple[Callable[[int], Iterator[Any]], list[np.ndarray]]:
    """
    Look at which steps a buffer makes its minibatches of.

    :param buffer: full; one whose ``get`` calls ``_get_samples`` with the numbers of the steps
    :return: its ``get``, and a list that each minibatch's numbers are added to just before it is given
    """
    # Not the buffer itself, to which its own copy would lead back: a cycle keeps a whole rollout alive
    flat: Any = flat_copy(buffer)
    watched = copy.copy(flat)
    drawn: list[np.ndarray] = []

    def samples(batch_inds: np.ndarray, *others: Any) -> Any:
        drawn.append(batch_inds)
        return flat._get_samples(batch_inds, *others)

    vars(watched)["_get_samples"] = samples
    return watched.get, drawn
