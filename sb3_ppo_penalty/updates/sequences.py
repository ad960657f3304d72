"""Ask a policy with a memory about transitions: it sees whole sequences, everybody else sees real steps only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

from sb3_ppo_penalty.objectives.divergence import ActionParameters, parameters_of
from sb3_ppo_penalty.rollouts.rollout import Observations, Transitions
from sb3_ppo_penalty.rollouts.sequences import real_steps, spread, whole_sequences, without_starts
from sb3_ppo_penalty.updates.evaluation import Evaluation, Evaluator


class OfRealSteps(NamedTuple):
    """
    An action distribution without what stands for padding.

    :param distribution: of padded sequences
    :param real: booleans, shape (n_sequences * longest,)
    """

    distribution: Any
    real: th.Tensor


# No distribution of SB3's: nothing but its parameters is asked for
@parameters_of.register
def _(distribution: OfRealSteps) -> ActionParameters:  # type: ignore[misc]
    padded = parameters_of(distribution.distribution)
    return padded._replace(per_state=tuple(each[distribution.real] for each in padded.per_state))


@dataclass(frozen=True)
class SequenceEvaluator(Evaluator):
    """
    Asks a policy with a memory, which is shown padded sequences; its answers about padding are left out.

    :param only_emptied: whether all that the start of an episode does to the policy is to empty its memory
    """

    only_emptied: bool

    def ask(self, observations: Observations, actions: th.Tensor) -> Evaluation:
        """
        Let the policy evaluate actions.

        :param observations: by steps or padded, see :mod:`~sb3_ppo_penalty.rollouts.sequences`
        :param actions: of the real steps
        :return: its answers about the real steps, with their gradient
        """
        real = real_steps(observations)
        if real is None:
            return super().ask(observations, actions)
        values, log_prob, entropy, distribution = super().ask(observations, spread(actions, real))
        entropy = None if entropy is None else entropy[real]
        return Evaluation(values[real], log_prob[real], entropy, lambda: OfRealSteps(distribution(), real))

    def parts(self, transitions: Transitions) -> Iterator[Transitions]:
        """
        Go once over transitions in whole sequences, from the states that were there when they began.

        :param transitions: a rollout, or a minibatch of padded sequences
        """
        if real_steps(transitions.observations) is not None:
            return iter([transitions])
        parts = whole_sequences(transitions)
        # Where no episode begins sb3-contrib makes one call of torch, and elsewhere one for each step
        return map(without_starts, parts) if self.only_emptied else parts
