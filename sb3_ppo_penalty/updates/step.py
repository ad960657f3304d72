"""One step of the optimizer on one minibatch, operation by operation; ``compiled`` has the same step as one graph."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.objectives.drift import k3_estimate
from sb3_ppo_penalty.objectives.kl_penalty import KLPenalty
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.ranks import Ranks


class LossSettings(NamedTuple):
    """
    What the loss of one update depends on besides the weights and the minibatch.

    Floats may change from update to update; any other value shapes the computation, so a compiled graph is made for each.

    :param clip_range: how far the importance ratio may go from 1 before it stops to pay; None for no clip
    :param clip_range_vf: how far the critic's prediction may leave the old one; None for no clip
    :param normalize_advantage: whether each minibatch's advantages are shifted and scaled to mean 0 and deviation 1
    :param ent_coef: coefficient of the entropy; None where it is 0 and not worked out
    :param vf_coef: coefficient of the critic's squared error
    :param distribution: where the action distribution of an evaluation is found, see
        :func:`~sb3_ppo_penalty.updates.evaluation.find_source`; None where its divergence is not known
    :param kl_coef: coefficient of the KL penalty; None where there is none
    :param target_kl: KL(old || new) that the penalty's coefficient aims at, in nats; None where there is no penalty
    :param kl_penalty: which divergence is charged and how; None where there is no penalty
    :param max_ratio: where single importance ratios are truncated; None for nowhere
    """

    clip_range: float | None
    clip_range_vf: float | None
    normalize_advantage: bool
    ent_coef: float | None
    vf_coef: float
    distribution: str | None
    kl_coef: float | None = None
    target_kl: float | None = None
    kl_penalty: KLPenalty | None = None
    max_ratio: float | None = None


class StepSettings(NamedTuple):
    """
    What an optimizer step of one update depends on besides the gradient.

    :param max_grad_norm: the largest length of the gradient, or one for the actor's and one for the critic's
    :param actor: names of the actor's weights; None where the gradient is clipped as a whole
    :param learning: names of the weights that move; None for all that the loss depends on
    :param stop_kl: estimate of KL(old || new) on a minibatch, in nats, beyond which the update ends; None for never
    """

    max_grad_norm: float | tuple[float, float]
    actor: tuple[str, ...] | None = None
    learning: tuple[str, ...] | None = None
    stop_kl: float | None = None


class Terms(NamedTuple):
    """
    The parts of a minibatch's loss; scalar tensors but for the last two.

    :param loss: the sum of all parts with their coefficients, which is minimised
    :param surrogate: the policy's objective before any penalty, negated
    :param policy: the policy's objective with the penalty, negated
    :param value: the critic's squared error
    :param log_ratio: log of the importance ratio of every action, shape (batch,)
    :param entropy: of the policy in every state, or an estimate of it, in nats, shape (batch,)
    """

    loss: th.Tensor
    surrogate: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    log_ratio: th.Tensor
    entropy: th.Tensor

    def detached(self) -> "Terms":
        """Return the same terms without their graph."""
        return Terms(*(term.detach() for term in self))


class Step(NamedTuple):
    """
    The record of one minibatch's step. Everything is detached and still on the device: nothing waits for it.

    :param terms: of the loss before the step
    :param grad_norms: length of the gradient before it was clipped, or the actor's and the critic's, scalars; empty if no
        step was made
    :param stopped: whether the update ends here, and no step was made
    """

    terms: Terms
    grad_norms: tuple[th.Tensor, ...]
    stopped: bool


def stacked(steps: Sequence[Step]) -> list[Step]:
    """
    Put the records of steps together, where as many small tensors would take more memory than the networks.

    :param steps: in their order
    :return: a record for each run of steps whose minibatches have one size; its tensors have the steps as first axis
    """

    def shapes(step: Step) -> tuple[th.Size, ...]:
        return tuple(tensor.shape for tensor in (*step.terms, *step.grad_norms))

    stacks = []
    for _, run in itertools.groupby(steps, shapes):
        terms, grad_norms, stopped = zip(*run, strict=True)
        stacks.append(
            Step(
                Terms(*map(th.stack, zip(*terms, strict=True))),
                tuple(map(th.stack, zip(*grad_norms, strict=True))),
                stopped[-1],
            )
        )
    return stacks


#: Evaluates the loss of a minibatch
Evaluate = Callable[[Transitions, LossSettings], Terms]


class Stepper(Protocol):
    """Makes the optimizer's steps of one update."""

    def __call__(self, batch: Transitions) -> Step:
        """
        Make one step.

        :param batch: the minibatch to learn from
        """


class ActorCriticWeights(NamedTuple):
    """
    Names of the weights behind a policy's two outputs; a weight of a shared trunk stands in both.

    :param actor: weights that the action distribution depends on
    :param critic: weights that the value depends on
    """

    actor: tuple[str, ...]
    critic: tuple[str, ...]


def weights_behind(policy: nn.Module, outputs: Iterable[th.Tensor]) -> tuple[str, ...]:
    """
    Find the weights that some outputs depend on, by differentiation: it holds for networks of any make.

    :param policy: whose weights are searched
    :param outputs: computed by it, with their graph
    :return: names of the weights
    """
    weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    sums = [output.sum() for output in outputs if output.requires_grad]
    # Kept: outputs of one evaluation share their graph
    gradients = th.autograd.grad(sums, list(weights.values()), allow_unused=True, retain_graph=True)
    return tuple(name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None)


def clipped_together(names: Iterable[str], settings: StepSettings) -> list[tuple[list[str], Any]]:
    """
    Group the weights whose gradient is clipped as one: all of them, or the actor's and the critic's.

    :param names: of weights
    :param settings: of the step
    :return: names of each group's weights with the largest length of their gradient
    """
    limits = settings.max_grad_norm
    if not isinstance(limits, tuple):
        return [(list(names), limits)]
    actor = settings.actor or ()
    groups = [name for name in names if name in actor], [name for name in names if name not in actor]
    return list(zip(groups, limits, strict=True))


class Descent:
    """
    Step downhill with the policy's own optimizer, by the gradient of all ranks' transitions together.

    :param policy: whose weights move
    :param settings: of the steps
    :param ranks: the processes that train the policy, each of which makes the same step
    """

    def __init__(self, policy: ActorCriticPolicy, settings: StepSettings, ranks: Ranks) -> None:
        weights = dict(policy.named_parameters())
        names = settings.learning
        held = [weight for group in policy.optimizer.param_groups for weight in group["params"]]
        # Those of the optimizer too that are none of the policy's: each once, by identity
        self.all = list({id(weight): weight for weight in (*weights.values(), *held)}.values())
        #: The weights that get a gradient; None: whatever the loss depends on
        self.learning = None if names is None else [weights[name] for name in names]
        #: The weights that move, in the order of a gradient over all ranks
        self.weights = [each for each in (self.all if self.learning is None else self.learning) if each.requires_grad]
        groups = clipped_together(weights if names is None else names, settings)
        self.groups = [([weights[name] for name in group], limit) for group, limit in groups]
        self.optimizer = policy.optimizer
        self.stop_kl = settings.stop_kl
        self.ranks = ranks

    def differentiate(self, loss: th.Tensor) -> None:
        """
        Leave the gradient of a loss with the weights.

        :param loss: mean over this rank's transitions, scalar, with its graph
        """
        self.clear()
        loss.backward(inputs=self.learning)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Take the gradient from every weight: without one the optimizer leaves the weight and its moments alone."""
        for weight in self.all:
            weight.grad = None

    def step(
        self, count: int, log_ratio: th.Tensor | None = None, failure: Exception | None = None
    ) -> tuple[tuple[th.Tensor, ...], bool]:
        """
        Average the gradient over all ranks, clip it and step, unless the policy has already moved too far.

        :param count: number of this rank's transitions
        :param log_ratio: log of their importance ratios, shape (count,); None where nothing may stop the update
        :param failure: why this rank has no gradient, if it has none
        :return: lengths of the clipped parts of the gradient before they were clipped, and whether the update ends here on
            all ranks, with no step made
        :raises JointError: on all of several ranks, if one of them failed
        """
        estimate = None if self.stop_kl is None or log_ratio is None else k3_estimate(log_ratio)
        estimate = self.ranks.average_gradients(self.weights, count, estimate, failure)
        # The one place that waits for the device, as early stopping must
        if self.stop_kl is not None and estimate is not None and estimate.item() > self.stop_kl:
            return (), True
        # torch's norm of nothing is on the CPU
        device = self.all[0].device
        norms = tuple(nn.utils.clip_grad_norm_(group, limit).to(device) for group, limit in self.groups)
        self.optimizer.step()
        return norms, False


class EagerStepper:
    """
    Make the optimizer's steps as PyTorch does, operation by operation, whatever the optimizer is.

    :param policy: whose weights move
    :param evaluate: gives the loss
    :param loss: settings of the loss
    :param settings: of the steps
    :param ranks: the processes that train the policy
    """

    def __init__(
        self, policy: ActorCriticPolicy, evaluate: Evaluate, loss: LossSettings, settings: StepSettings, ranks: Ranks
    ) -> None:
        self.evaluate = evaluate
        self.loss = loss
        self.settings = settings
        self.descent = Descent(policy, settings, ranks)
        #: Gives a minibatch's terms, detached, and leaves their gradient with the weights; exchanged where that is compiled
        self.differentiate: Callable[[Transitions], Terms] = self.differentiate_eagerly

    def differentiate_eagerly(self, batch: Transitions) -> Terms:
        """
        Evaluate a minibatch and leave the gradient of its loss with the weights.

        :param batch: the minibatch
        :return: the terms of its loss, detached
        """
        terms = self.evaluate(batch, self.loss)
        self.descent.differentiate(terms.loss)
        return terms.detached()

    def __call__(self, batch: Transitions) -> Step:
        """
        Make one step.

        :param batch: the minibatch to learn from, or this rank's part of it
        :raises JointError: on all of several ranks, if one of them cannot evaluate its transitions
        """
        count = len(batch.actions)
        try:
            terms = self.differentiate(batch)
        except Exception as error:
            # Told to the other ranks in the very sum that they are waiting for
            self.descent.step(count, failure=error)
            raise
        norms, stopped = self.descent.step(count, terms.log_ratio)
        return Step(terms, norms, stopped)
