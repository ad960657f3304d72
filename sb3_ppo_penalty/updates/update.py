"""One update of a policy: what it learns from, how its steps are made, and how far they move the policy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_penalty.objectives.drift import Drift
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.evaluation import Evaluator
from sb3_ppo_penalty.updates.ranks import Ranks
from sb3_ppo_penalty.updates.step import LossSettings, Step, Stepper, StepSettings, stacked


@dataclass
class Update:
    """
    One update of a policy.

    :param policy: being trained
    :param rollout: that it collected, with the distributions it had then
    :param sampled: gives the minibatches of an epoch, where the rollout buffer makes them by itself; None to cut the rollout
    :param loss: settings of the loss
    :param settings: of the optimizer's steps
    :param batch_size: of the minibatches
    :param evaluator: asks the policy about transitions
    :param ranks: the processes that train the policy, and do all of this alike
    :param stepper: makes the steps that settings ask for
    :param epochs: the steps that were made, by epoch, see :func:`~sb3_ppo_penalty.updates.step.stacked`
    """

    policy: ActorCriticPolicy
    rollout: Transitions
    sampled: Callable[[], Iterator[Transitions]] | None
    loss: LossSettings
    settings: StepSettings
    batch_size: int
    evaluator: Evaluator
    ranks: Ranks
    stepper: Callable[[StepSettings], Stepper]
    epochs: list[list[Step]] = field(default_factory=list)
    _drift: Drift | None = None

    def __post_init__(self) -> None:
        """Prepare for the minibatches."""
        self.rollout.keep_freed_memory(self.batch_size)

    def minibatches(self, normalize: bool) -> Iterator[Transitions]:
        """
        Go once over the rollout.

        :param normalize: whether the advantages of a minibatch that spans ranks are normalised
        """
        if self.sampled is not None:
            return self.sampled()
        return self.ranks.minibatches(self.rollout, self.batch_size, normalize)

    def run_epoch(self, step: Stepper, normalize: bool) -> bool:
        """
        Learn from each minibatch once, up to where the update stops.

        :param step: makes the optimizer's steps
        :param normalize: see :meth:`minibatches`
        :return: whether another epoch may follow
        """
        self._drift = None
        made: list[Step] = []
        try:
            for batch in self.minibatches(normalize):
                made.append(step(batch))
                if made[-1].stopped:
                    return False
            return True
        finally:
            self.epochs.append(stacked(made))

    @property
    def steps(self) -> list[Step]:
        """The steps of all epochs, stacked."""
        return [step for epoch in self.epochs for step in epoch]

    def drift_of(self, transitions: Transitions) -> Drift:
        """
        Measure how far the policy is from the one that acted.

        :param transitions: the whole rollout or a part of it
        """
        return self.ranks.drift(self.policy, lambda: self.evaluator.moved(transitions))

    def drift(self) -> Drift:
        """Measure how far the policy has moved over the whole rollout; asked again, nothing is measured anew."""
        if self._drift is None:
            self._drift = self.drift_of(self.rollout)
        return self._drift

    def policy_was_moved(self) -> None:
        """Note that something else than :meth:`run_epoch` has changed the policy."""
        self._drift = None
