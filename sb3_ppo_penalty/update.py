"""One step of the optimizer on one minibatch, operation by operation; ``compiled`` has the same step as one graph."""

from collections.abc import Callable, Sequence
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
    :param grad_norm: length of the whole gradient before it was clipped, scalar
    :param stopped: whether the update ends here, and no step was made
    """

    terms: Terms
    grad_norm: th.Tensor
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


class EagerStepper:
    """
    The step as PyTorch's own optimizer makes it, whatever that optimizer is.

    :param policy: whose weights move
    :param evaluate: the loss
    :param settings: of the loss, with ``max_grad_norm``, and ``stop_kl``: the estimate of KL(old || new), in nats, beyond
        which the update ends, or None
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate, settings: Settings) -> None:
        self.evaluate = evaluate
        self.settings = settings
        self.optimizer = policy.optimizer
        self.parameters = list(policy.parameters())

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
            return Step(record, th.zeros_like(record.loss), stopped=True)
        for parameter in self.parameters:
            parameter.grad = None
        terms.loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings["max_grad_norm"])
        self.optimizer.step()
        return Step(record, norm, stopped=False)
