"""Steps padded to sequences: where each step goes, which states come along, and how large a part may be."""

import pytest
import torch as th

from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.rollouts.sequences import (
    EPISODE_STARTS,
    OBSERVATION,
    REAL,
    SEQUENCE_STARTS,
    STATES,
    pad,
    real_steps,
    spread,
    whole_sequences,
    without_starts,
)


def rollout(starts: list[int]) -> Transitions:
    """Six steps, each of which observes ten times its number; its memory holds the number."""
    numbers = th.arange(6.0)
    observations = {
        OBSERVATION: 10 * numbers[:, None],
        EPISODE_STARTS: th.zeros(6),
        SEQUENCE_STARTS: th.tensor(starts) > 0,
        **{name: numbers.reshape(6, 1, 1) for name in STATES},
    }
    return Transitions(observations, numbers.long(), *(numbers for _ in range(4)))


def test_steps_are_spread_over_padded_sequences() -> None:
    padded = pad(rollout([1, 0, 0, 0, 1, 0]), [4, 2])
    assert padded.observations[REAL].tolist() == [True] * 4 + [True] * 2 + [False] * 2
    assert padded.observations[OBSERVATION].flatten().tolist() == [0, 10, 20, 30, 40, 50, 50, 50]
    assert [padded.observations[name].flatten().tolist() for name in STATES] == [[0, 4]] * 4
    assert SEQUENCE_STARTS not in padded.observations
    assert padded.actions.tolist() == list(range(6))
    assert real_steps(padded.observations) is padded.observations[REAL]
    assert spread(th.tensor([7, 8]), th.tensor([True, False, True])).tolist() == [7, 0, 8]


def test_memory_is_empty_where_an_episode_begins() -> None:
    steps = rollout([1, 0, 0, 0, 1, 0])
    starts = th.tensor([0.0, 0, 0, 0, 1, 0])
    begun = without_starts(pad(steps._replace(observations={**steps.observations, EPISODE_STARTS: starts}), [4, 2]))
    assert begun.observations[EPISODE_STARTS].tolist() == [0] * 8
    later = without_starts(pad(rollout([1, 0, 0, 0, 1, 0]), [4, 2]))
    assert [later.observations[name].flatten().tolist() for name in STATES] == [[0, 4]] * 4
    assert [begun.observations[name].flatten().tolist() for name in STATES] == [[0, 0]] * 4


@pytest.mark.parametrize(
    ("chunk_rows", "first_steps"), [(100, [[0, 3, 1, 4]]), (4, [[0, 3], [1, 4]]), (1, [[0], [3], [1], [4]])]
)
def test_parts_hold_whole_sequences_the_shortest_first(chunk_rows: int, first_steps: list, monkeypatch) -> None:
    """Sequences of 1, 2, 1 and 2 steps."""
    monkeypatch.setattr("sb3_ppo_penalty.rollouts.rollout.CHUNK_ROWS", chunk_rows)
    parts = list(whole_sequences(rollout([1, 1, 0, 1, 1, 0])))
    assert [part.observations["<cell_vf>"].flatten().tolist() for part in parts] == first_steps
    assert sorted(step for part in parts for step in part.actions.tolist()) == list(range(6))
    assert all(part.size <= len(part.observations[REAL]) <= max(chunk_rows, 2) for part in parts)
