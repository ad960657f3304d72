"""The guard: stop, roll back or repair an update whose KL exceeds a bound."""

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.arguments import require, require_integer, require_number
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.step import ActorCriticWeights, Descent, Stepper
from sb3_ppo_penalty.updates.update import Update

#: What a guard may do
ACTIONS = ("stop", "rollback", "fixup")
#: What a guard may measure of the states' KL(old || new), with the field of :class:`~.Drift` that has it
MEASURES = {"mean": "kl", "p99": "kl_p99", "max": "kl_max_state"}


@dataclass(frozen=True)
class Guard:
    """
    Stop, roll back or repair an update whose KL exceeds a bound.

    After each epoch the exact KL(old || new) over the whole rollout is measured. Beyond ``max_kl_factor * target_kl`` the
    policy's part of the update ends, while the critic's epochs go on.

    :param action: ``"stop"``: the policy stays where it is. ``"rollback"``: it goes back to where it was after its last epoch
        inside the bound, or before the update, with the optimizer's moments of then. ``"fixup"``: steps that only lower the
        divergence, on the minibatches that are beyond the bound, bring it inside (as FixPO,
        https://arxiv.org/abs/2312.05405, does after every update), or a rollback if ``max_passes`` do not suffice
    :param max_kl_factor: multiple of ``target_kl`` that may not be exceeded; 4, as in Heess et al. 2017
        (https://arxiv.org/abs/1707.02286)
    :param measure: figure of the states' divergences that is compared with the bound: ``"mean"``, the 99th percentile
        ``"p99"``, or the largest ``"max"``
    :param max_passes: largest number of passes over the rollout for ``"fixup"``
    :raises ValueError: naming the field
    """

    action: str
    max_kl_factor: float = 4.0
    measure: str = "mean"
    max_passes: int = 10

    def __post_init__(self) -> None:
        for name, known in (("action", ACTIONS), ("measure", MEASURES)):
            value = getattr(self, name)
            require(isinstance(value, str) and value in known, f"guard.{name}", value, f"one of {list(known)}")
        require_number("guard.max_kl_factor", self.max_kl_factor, 0, open_below=True)
        require_integer("guard.max_passes", self.max_passes, 1)

    @classmethod
    def of(cls, choice: Any) -> "Guard | None":
        """
        Make the guard that a user asked for.

        :param choice: None, a :class:`Guard`, the name of an action, or a mapping of its fields, as a YAML file has it
        :raises ValueError: naming ``guard`` or the field
        """
        if choice is None or isinstance(choice, cls):
            return choice
        if isinstance(choice, str):
            return cls(choice)
        own = [field.name for field in fields(cls)]
        known = isinstance(choice, Mapping) and "action" in choice and set(choice) <= set(own)
        require(known, "guard", choice, f"None, a Guard, one of {list(ACTIONS)}, or a dict of {own} with an `action`")
        return cls(**choice)


@dataclass
class GuardReport:
    """
    What a guard measured and did in one update.

    :param kl: the guard's measure of the states' KL(old || new), as it was last before the guard acted, or after the last
        epoch, in nats
    :param mean_kl: the mean over the same states then, whatever the measure: what a controller is told of an update in which
        the guard acted
    :param epochs: number of the policy's epochs that remain in force
    :param acted: whether the bound was exceeded
    :param passes: over the rollout, with steps that do nothing but lower the divergence
    :param rolled_back: whether the policy was set back to an earlier one
    """

    kl: float = math.nan
    mean_kl: float = math.nan
    epochs: int = 0
    acted: bool = False
    passes: int = 0
    rolled_back: bool = False


class PolicySnapshot:
    """
    A copy of a part of a policy, with the optimizer's moments of it.

    :param policy: is left as it is
    :param names: of weights. The policy's buffers are always part of it: a batch norm's running means move it too
    """

    def __init__(self, policy: ActorCriticPolicy, names: Iterable[str]) -> None:
        weights = dict(policy.named_parameters())
        self.optimizer = policy.optimizer
        self.weights = [weights[name] for name in names]
        self.tensors = [*self.weights, *policy.buffers()]
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.moments = [deepcopy(self.optimizer.state.get(weight, {})) for weight in self.weights]

    @th.no_grad()
    def restore(self) -> None:
        """Set the policy back to the copy, in place."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)
        for weight, moments in zip(self.weights, self.moments, strict=True):
            # Not an empty entry: a weight that the optimizer does not hold could not be saved with it
            self.optimizer.state.pop(weight, None)
            if moments:
                self.optimizer.state[weight] = deepcopy(moments)


class GuardedUpdate:
    """
    One update under a guard.

    :param guard: what is measured and done
    :param update: that is guarded
    :param weights: of the actor and of the critic
    :param target_kl: in nats
    """

    def __init__(self, guard: Guard, update: Update, weights: ActorCriticWeights, target_kl: float) -> None:
        self.guard = guard
        self.update = update
        self.policy = update.policy
        self.weights = weights
        self.bound = guard.max_kl_factor * target_kl
        self.report = GuardReport()

    def steppers(self, n_epochs: int) -> Iterator[Stepper]:
        """
        Give what makes the steps of each epoch; between two of them the policy is measured.

        :param n_epochs: of the update
        """
        # In this order: what a compiled step adds to the optimizer is no part of what was before
        inside, step = self._last_good(), self.update.stepper(self.update.settings)
        for epoch in range(1, n_epochs + 1):
            yield step
            self.report.epochs = epoch
            self.report.kl, self.report.mean_kl = self._measured()
            if not self.report.kl <= self.bound:
                self._act(inside)
                self.update.policy_was_moved()
                yield from self._critic_alone(n_epochs - epoch)
                return
            if epoch < n_epochs:
                inside = self._last_good()

    def _act(self, inside: PolicySnapshot) -> None:
        """
        Stop, roll back or repair.

        :param inside: the last policy inside the bound
        """
        self.report.acted = True
        if self.guard.action == "stop" or (self.guard.action == "fixup" and self._fix_up()):
            return
        inside.restore()
        self.report.rolled_back = True
        self.report.epochs -= 1

    def _fix_up(self) -> bool:
        """
        Go downhill in the divergence alone, on the minibatches that are beyond the bound.

        :return: whether that brought the policy inside
        """
        settings = self.update.settings._replace(learning=self.weights.actor)
        descent = Descent(self.policy, settings, self.update.ranks)
        for passes in range(1, self.guard.max_passes + 1):
            self.report.passes = passes
            for batch in self.update.minibatches(normalize=False):
                if not self._measured(batch)[0] <= self.bound:
                    descent.differentiate(self.update.evaluator.divergence(batch).mean())
                    descent.step(batch.size)
            self.update.policy_was_moved()
            if self._measured()[0] <= self.bound:
                return True
        return False

    def _critic_alone(self, n_epochs: int) -> Iterator[Stepper]:
        """
        Give steps that move nothing that the action distribution depends on.

        :param n_epochs: that are left
        """
        names = [name for name, weight in self.policy.named_parameters() if weight.requires_grad]
        own = tuple(name for name in names if name not in self.weights.actor)
        if not own:
            return
        held = PolicySnapshot(self.policy, self.weights.actor)
        step = self.update.stepper(self.update.settings._replace(learning=own))
        for _ in range(n_epochs):
            yield step
            # No gradient reached the weights; the buffers of what actor and critic share may have moved
            held.restore()

    def _last_good(self) -> PolicySnapshot:
        """Copy the actor; with the critic where they share weights, because it is none on another trunk than its own."""
        actor, critic = self.weights
        return PolicySnapshot(self.policy, dict.fromkeys(actor + critic) if set(actor) & set(critic) else actor)

    def _measured(self, transitions: Transitions | None = None) -> tuple[float, float]:
        """
        Measure how far the policy is from the old one.

        :param transitions: a part of the rollout; default: all of it
        :return: the guard's measure of KL(old || new), and its mean, in nats; infinity where the policy cannot be evaluated
            any more
        """
        if not th.isfinite(nn.utils.get_total_norm(self.policy.parameters())).item():
            return math.inf, math.inf
        drift = self.update.drift() if transitions is None else self.update.drift_of(transitions)
        assert drift.kl is not None, "a policy without a known divergence is refused"
        return float(getattr(drift, MEASURES[self.guard.measure])), drift.kl
