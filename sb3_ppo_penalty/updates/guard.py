"""What becomes of an update that moves the policy too far all the same."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.arguments import require, require_integer, require_number
from sb3_ppo_penalty.distributed.team import Ranks
from sb3_ppo_penalty.rollouts.rollout import Minibatch, Rollout
from sb3_ppo_penalty.updates.step import Roles, Settings, Stepper

#: What may be done
ACTIONS = ("stop", "rollback", "fixup")
#: What may be measured of the states' KL(old || new): the fields of :class:`~.Drift`
MEASURES = {"mean": "kl", "p99": "kl_p99", "max": "kl_max_state"}


@dataclass(frozen=True)
class Guard:
    """
    After each epoch the exact KL(old || new) over the whole rollout is measured; beyond ``max_kl_factor * target_kl`` the
    policy's part of the update ends, while the critic's epochs go on.

    :param action: where the policy is left. ``"stop"``: where it is. ``"rollback"``: where it was after its last epoch inside
        the bound, or before the update, with the optimizer's moments of then. ``"fixup"``: inside the bound, brought there by
        steps that do nothing but lower the divergence of the minibatches that are beyond it (as FixPO,
        https://arxiv.org/abs/2312.05405, does after every update); by a rollback if ``max_passes`` do not suffice
    :param max_kl_factor: 4, as in Heess et al. 2017 (https://arxiv.org/abs/1707.02286), whose epochs end there
    :param measure: of the states' divergences: ``"mean"``, the 99th percentile ``"p99"``, or the largest ``"max"``
    :param max_passes: over the rollout, of ``"fixup"``
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
        The guard that was asked for.

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
class Report:
    """
    What a guard saw and did in one update.

    :param kl: the guard's measure of the states' KL(old || new), as it was last before the guard acted, or after the last
        epoch, in nats
    :param mean_kl: the mean over the same states then, whatever the measure: what a controller is told of an update in which
        the guard acted
    :param epochs: of the policy that remain
    :param acted: whether the bound was exceeded
    :param passes: over the rollout, with steps that do nothing but lower the divergence
    :param rolled_back: whether the policy is one of before
    """

    kl: float = math.nan
    mean_kl: float = math.nan
    epochs: int = 0
    acted: bool = False
    passes: int = 0
    rolled_back: bool = False


class Snapshot:
    """
    A part of a policy as it is now, with what the optimizer remembers of it.

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
        """Bring it back, in place."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)
        for weight, moments in zip(self.weights, self.moments, strict=True):
            # Not an empty entry: a weight that the optimizer does not hold could not be saved with it
            self.optimizer.state.pop(weight, None)
            if moments:
                self.optimizer.state[weight] = deepcopy(moments)


class Watch:
    """
    One update under a guard.

    :param guard: what is done
    :param policy: being trained
    :param roles: who uses which of its weights
    :param rollout: frozen
    :param settings: of the update, with ``target_kl``
    :param batch_size: of the minibatches
    :param drift: how far the policy moved in the states of a rollout, or of what stands for one
    :param divergence: KL(old || new) in the states of a minibatch, in nats, shape (batch,), with its gradient
    :param ranks: who train the policy, and do all of this alike
    """

    def __init__(
        self,
        guard: Guard,
        policy: ActorCriticPolicy,
        roles: Roles,
        rollout: Rollout,
        settings: Settings,
        batch_size: int,
        drift: Callable[[Rollout], Any],
        divergence: Callable[[Minibatch], th.Tensor],
        ranks: Ranks,
    ) -> None:
        self.guard = guard
        self.policy = policy
        self.roles = roles
        self.rollout = rollout
        self.settings = settings
        self.batch_size = batch_size
        self.drift = drift
        self.divergence = divergence
        self.ranks = ranks
        self.bound = guard.max_kl_factor * settings["target_kl"]
        self.report = Report()

    def steppers(self, n_epochs: int, stepper: Callable[[Settings], Stepper]) -> Iterator[Stepper]:
        """
        :param n_epochs: of the update
        :param stepper: makes the steps that the settings ask for
        :return: what makes the steps of each epoch; between two of them the guard looks at what was made
        """
        # In this order: what a compiled step adds to the optimizer is no part of what was before
        inside, step = self._last_good(), stepper(self.settings)
        for epoch in range(1, n_epochs + 1):
            yield step
            self.report.kl, self.report.mean_kl = self._measured(self.rollout)
            self.report.epochs = epoch
            if not self.report.kl <= self.bound:
                self._act(inside)
                yield from self._critic_alone(n_epochs - epoch, stepper)
                return
            inside = self._last_good()

    def _act(self, inside: Snapshot) -> None:
        """
        Do what the guard is for.

        :param inside: the last good policy
        """
        self.report.acted = True
        if self.guard.action == "stop" or (self.guard.action == "fixup" and self._fix_up()):
            return
        inside.restore()
        self.report.rolled_back = True
        self.report.epochs -= 1

    def _fix_up(self) -> bool:
        """
        Step by step downhill in the divergence alone, on the minibatches that are beyond the bound.

        :return: whether that brought the policy inside
        """
        descend = self.ranks.descent(self.policy, {**self.settings, "learning": self.roles.actor})
        for passes in range(1, self.guard.max_passes + 1):
            self.report.passes = passes
            for batch in self.ranks.minibatches(self.rollout, self.batch_size, normalize=False):
                if not self._measured(Rollout(*batch))[0] <= self.bound:
                    descend(self.divergence(batch).mean(), len(batch.actions))
            if self._measured(self.rollout)[0] <= self.bound:
                return True
        return False

    def _critic_alone(self, n_epochs: int, stepper: Callable[[Settings], Stepper]) -> Iterator[Stepper]:
        """
        :param n_epochs: that are left
        :param stepper: makes the steps that the settings ask for
        :return: steps that move nothing that the policy depends on
        """
        names = [name for name, weight in self.policy.named_parameters() if weight.requires_grad]
        own = tuple(name for name in names if name not in self.roles.actor)
        if not own:
            return
        held = Snapshot(self.policy, self.roles.actor)
        step = stepper({**self.settings, "learning": own})
        for _ in range(n_epochs):
            yield step
            # No gradient reached the weights; the buffers of what it shares with the critic may have moved
            held.restore()

    def _last_good(self) -> Snapshot:
        """
        :return: the policy as it is; with the critic's weights too where they share some, because a critic on another trunk
            than its own is none
        """
        actor, critic = self.roles
        return Snapshot(self.policy, dict.fromkeys(actor + critic) if set(actor) & set(critic) else actor)

    def _measured(self, rollout: Rollout) -> tuple[float, float]:
        """
        Measure how far the policy is from the old one.

        :param rollout: all of it, or what stands for one
        :return: the guard's measure of KL(old || new) in its states, and their mean, in nats; infinity where the policy
            cannot be evaluated any more
        """
        if not th.isfinite(nn.utils.get_total_norm(self.policy.parameters())).item():
            return math.inf, math.inf
        drift = self.drift(rollout)
        return float(getattr(drift, MEASURES[self.guard.measure])), float(drift.kl)
