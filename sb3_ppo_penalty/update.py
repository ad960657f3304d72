"""One step of the optimizer on one minibatch, operation by operation; ``compiled`` has the same step as one graph."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.losses import k3_estimate
from sb3_ppo_penalty.rollout import Minibatch

#: What a loss depends on besides the weights and the minibatch. Floats may change from update to update; any other value
#: shapes the computation: a compiled graph is made for each
Settings = dict[str, Any]


class Terms(NamedTuple):
    """
    What a minibatch's loss is made of; scalar tensors but for the last two.

    :param loss: everything with its coefficient: what is minimised
    :param surrogate: the policy's objective before any penalty, with its sign turned
    :param policy: the policy's objective with penalty, with its sign turned
    :param value: the critic's squared error
    :param log_ratio: log of the importance ratio of every action, shape (batch,)
    :param entropy: of the policy in every state, or what estimates it, in nats, shape (batch,)
    """

    loss: th.Tensor
    surrogate: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    log_ratio: th.Tensor
    entropy: th.Tensor


class Step(NamedTuple):
    """
    What came of one minibatch. Everything is detached and still on the device: nothing waits for it.

    :param terms: before the step
    :param grad_norms: length before it was clipped of each part of the gradient that is clipped by itself, scalars:
        the whole, or the actor's and the critic's
    :param stopped: whether the update ends here, and no step was made
    """

    terms: Terms
    grad_norms: tuple[th.Tensor, ...]
    stopped: bool


Evaluate = Callable[[Minibatch, Settings], Terms]


def minibatch_mean(measure: Callable[[th.Tensor], th.Tensor], values: Sequence[th.Tensor]) -> float:
    """
    Mean over minibatches of a mean over each, worked out for all minibatches of one size at once.

    :param measure: takes values of any shape and returns the mean of something, a scalar
    :param values: of every minibatch, a scalar or of shape (batch,)
    :return: every minibatch counts the same, also a smaller one
    """
    sizes = {value.shape for value in values}
    groups = [[value for value in values if value.shape == size] for size in sizes]
    return sum(len(group) * measure(th.stack(group)).item() for group in groups) / len(values)


class Stepper(Protocol):
    """Makes the optimizer's steps of one update."""

    def __call__(self, batch: Minibatch) -> Step:
        """
        :param batch: some transitions
        :return: what came of it
        """


class Roles(NamedTuple):
    """
    Who uses which weights of a policy, by name; a weight of a shared trunk has both roles.

    :param actor: those that the distribution of the actions depends on
    :param critic: those that the value depends on
    """

    actor: tuple[str, ...]
    critic: tuple[str, ...]


def reached(policy: nn.Module, outputs: Iterable[th.Tensor]) -> tuple[str, ...]:
    """
    Found by differentiation: it holds for networks of any make.

    :param policy: whose weights are asked for
    :param outputs: computed by it, with their graph
    :return: names of the weights that any of the outputs depends on
    """
    weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    sums = [output.sum() for output in outputs if output.requires_grad]
    gradients = th.autograd.grad(sums, list(weights.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None)


def clipped_together(names: Iterable[str], settings: Settings) -> list[tuple[list[str], Any]]:
    """
    :param names: of weights
    :param settings: of an update
    :return: names of the weights whose gradient is clipped as one, and its largest length: all, or actor and critic
    """
    limits = settings["max_grad_norm"]
    if not isinstance(limits, tuple):
        return [(list(names), limits)]
    actor = settings["actor"]
    groups = [name for name in names if name in actor], [name for name in names if name not in actor]
    return list(zip(groups, limits, strict=True))


class Descent:
    """
    Downhill by one step of PyTorch's own optimizer, whatever it is.

    :param policy: whose weights move
    :param settings: see :class:`EagerStepper`
    """

    def __init__(self, policy: ActorCriticPolicy, settings: Settings) -> None:
        weights = dict(policy.named_parameters())
        names = settings["learning"]
        self.all = list(weights.values())
        # None: whatever the loss depends on
        self.learning = None if names is None else [weights[name] for name in names]
        groups = clipped_together(weights if names is None else names, settings)
        self.groups = [([weights[name] for name in group], limit) for group, limit in groups]
        self.optimizer = policy.optimizer

    def __call__(self, loss: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param loss: scalar, with its graph
        :return: length of each clipped part of the gradient before it was clipped
        """
        # Without a gradient, not with one of 0: the optimizer leaves such a weight and its moments alone
        for weight in self.all:
            weight.grad = None
        loss.backward(inputs=self.learning)  # type: ignore[no-untyped-call]
        norms = tuple(nn.utils.clip_grad_norm_(group, limit).to(loss.device) for group, limit in self.groups)
        self.optimizer.step()
        return norms


class EagerStepper:
    """
    The step as PyTorch's own optimizer makes it, whatever that optimizer is.

    :param policy: whose weights move
    :param evaluate: the loss
    :param settings: of the loss, with ``max_grad_norm``: one number, or one for the actor and one for the critic, with
        ``actor``, the names of the actor's weights; ``learning``: the names of the weights that move, or None for all;
        and ``stop_kl``: the estimate of KL(old || new), in nats, beyond which the update ends, or None
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate, settings: Settings) -> None:
        self.evaluate = evaluate
        self.settings = settings
        self.descend = Descent(policy, settings)

    def __call__(self, batch: Minibatch) -> Step:
        """
        :param batch: some transitions
        :return: what came of it
        """
        terms = self.evaluate(batch, self.settings)
        record = Terms(*(term.detach() for term in terms))
        limit = self.settings["stop_kl"]
        # The one place that waits for the device, as early stopping must
        if limit is not None and k3_estimate(record.log_ratio).item() > limit:
            return Step(record, (), stopped=True)
        return Step(record, self.descend(terms.loss), stopped=False)
