"""One step of the optimizer on one minibatch, operation by operation; ``compiled`` has the same step as one graph."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.objectives.losses import k3_estimate
from sb3_ppo_penalty.rollouts.rollout import Minibatch

Answer = TypeVar("Answer")

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
    # Kept: outputs of one evaluation share their graph
    gradients = th.autograd.grad(sums, list(weights.values()), allow_unused=True, retain_graph=True)
    return tuple(name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None)


class _Question(nn.Module):
    """
    Something asked of a policy, as a module, whose weights :func:`torch.func.functional_call` can exchange.

    :param policy: that is asked
    :param ask: uses the policy
    """

    def __init__(self, policy: nn.Module, ask: Callable[[Any], Any]) -> None:
        super().__init__()
        self.policy = policy
        self.ask = ask

    def forward(self, observations: Any) -> Any:
        """
        :param observations: see the class
        :return: the policy's answer
        """
        return self.ask(observations)


def as_of_now(policy: nn.Module, ask: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """
    Keep a policy's weights of this moment, to ask it later what it would have answered now.

    :param policy: that moves afterwards
    :param ask: asks it about observations
    :return: asks it with the weights that are kept, without gradient
    """
    question = _Question(policy, ask)
    saved = policy.state_dict().keys()
    tensors = itertools.chain(policy.named_parameters(), policy.named_buffers())
    # What no file has follows from the rest, and is compared by identity
    kept = {f"policy.{name}": tensor.detach().clone() for name, tensor in tensors if name in saved}

    @th.no_grad()
    def answer(observations: Any) -> Answer:
        answered: Answer = th.func.functional_call(question, kept, (observations,))
        return answered

    return answer


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
        held = [weight for group in policy.optimizer.param_groups for weight in group["params"]]
        # Those of the optimizer too that are none of the policy's: each once, by identity
        self.all = list({id(weight): weight for weight in (*weights.values(), *held)}.values())
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
        self.differentiate(loss)
        return self.step()

    def differentiate(self, loss: th.Tensor) -> None:
        """
        :param loss: scalar, with its graph; its gradient is left with the weights
        """
        # Without a gradient, not with one of 0: the optimizer leaves such a weight and its moments alone
        for weight in self.all:
            weight.grad = None
        loss.backward(inputs=self.learning)  # type: ignore[no-untyped-call]

    def step(self) -> tuple[th.Tensor, ...]:
        """:return: length of each clipped part of the weights' gradient before it was clipped."""
        # torch's norm of nothing is on the CPU
        device = self.all[0].device
        norms = tuple(nn.utils.clip_grad_norm_(group, limit).to(device) for group, limit in self.groups)
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


class JointError(RuntimeError):
    """Raised on all ranks of a distributed training at the same place, because one of them failed there."""

    @classmethod
    def of(cls, own: Exception | None) -> "JointError":
        """
        :param own: what failed here, or None if it was on another rank
        """
        elsewhere = "another rank failed in this update: its own message says why"
        return cls(elsewhere if own is None else f"{type(own).__name__}: {own}")


def packed(
    weights: Sequence[th.Tensor], gradients: Sequence[th.Tensor | None], count: int, estimate: th.Tensor | None
) -> th.Tensor:
    """
    What ranks add up for one step, as one vector: its length depends on nothing but the weights.

    :param weights: that move
    :param gradients: of the mean loss of some transitions, with respect to each; None where it does not depend on it
    :param count: number of these transitions
    :param estimate: of KL(old || new) there, in nats; None where nobody asks
    :return: ``count`` times the gradients; 1 or 0 for each weight that has one or none; ``count``; ``count`` times the
        estimate; 0, where a rank that failed has 1
    """
    pairs = list(zip(weights, gradients, strict=True))
    parts = [(th.zeros_like(weight) if found is None else found * count).reshape(-1) for weight, found in pairs]

    def scalar(value: float) -> th.Tensor:
        return th.full((), value, dtype=weights[0].dtype, device=weights[0].device)

    estimated = scalar(0.0) if estimate is None else estimate * count
    tail = [*(scalar(float(found is not None)) for found in gradients), scalar(float(count)), estimated, scalar(0.0)]
    return th.cat([*parts, th.stack(tail)])


class SharedDescent:
    """
    Downhill by the gradient of all ranks' transitions together, each of which counts the same whichever rank has it.

    :param policy: whose weights move, by the same step on every rank
    :param settings: see :class:`EagerStepper`
    :param add_up: replaces a vector by the sum of all ranks' vectors
    """

    def __init__(self, policy: ActorCriticPolicy, settings: Settings, add_up: Callable[[th.Tensor], None]) -> None:
        self.descent = Descent(policy, settings)
        learning = self.descent.all if self.descent.learning is None else self.descent.learning
        self.weights = [weight for weight in learning if weight.requires_grad]
        self.sizes = [weight.numel() for weight in self.weights]
        self.limit = settings["stop_kl"]
        self.add_up = add_up

    def __call__(self, loss: th.Tensor, count: int) -> tuple[th.Tensor, ...]:
        """
        :param loss: mean over some transitions, scalar, with its graph
        :param count: number of these transitions
        :return: length of each clipped part of the gradient before it was clipped
        """
        return self.step(self.gradient(loss, count, None))[0]

    def gradient(self, loss: th.Tensor, count: int, log_ratio: th.Tensor | None) -> th.Tensor:
        """
        :param loss: mean over some transitions, scalar, with its graph
        :param count: number of these transitions
        :param log_ratio: of their actions, shape (count,); None where nothing may stop the update
        :return: see :func:`packed`
        """
        self.descent.differentiate(loss)
        estimate = None if log_ratio is None or self.limit is None else k3_estimate(log_ratio)
        return packed(self.weights, [weight.grad for weight in self.weights], count, estimate)

    def step(self, vector: th.Tensor | Exception) -> tuple[tuple[th.Tensor, ...], bool]:
        """
        :param vector: of this rank, see :func:`packed`, or why there is none
        :return: length of each clipped part of the gradient before it was clipped; whether the update ends here, on all
            ranks, and no step was made
        :raises JointError: on all ranks, if one of them has no vector
        """
        failure = vector if isinstance(vector, Exception) else None
        total = self._failed() if isinstance(vector, Exception) else vector
        self.add_up(total)
        *present, count, estimate, failed = total[sum(self.sizes) :].tolist()
        if failed:
            raise JointError.of(failure) from failure
        if self.limit is not None and estimate / count > self.limit:
            return (), True
        gradients = (total[: sum(self.sizes)] / count).split(self.sizes)
        for weight, gradient, there in zip(self.weights, gradients, present, strict=True):
            weight.grad = gradient.view_as(weight) if there else None
        return self.descent.step(), False

    def _failed(self) -> th.Tensor:
        """:return: the vector of a rank that has no gradient to add."""
        length = sum(self.sizes) + len(self.sizes) + 3
        vector = th.zeros(length, dtype=self.weights[0].dtype, device=self.weights[0].device)
        vector[-1] = 1
        return vector


class SharedStepper:
    """
    The step of one rank among several: its own gradient, the sum of all, the same step everywhere.

    :param policy: whose weights move
    :param evaluate: the loss
    :param settings: see :class:`EagerStepper`
    :param add_up: replaces a vector by the sum of all ranks' vectors
    """

    def __init__(
        self, policy: ActorCriticPolicy, evaluate: Evaluate, settings: Settings, add_up: Callable[[th.Tensor], None]
    ) -> None:
        self.policy = policy
        self.evaluate = evaluate
        self.settings = settings
        self.descent = SharedDescent(policy, settings, add_up)
        #: Exchanged where the gradient is compiled
        self.differentiate: Callable[[Minibatch], tuple[Terms, th.Tensor]] = self.eager_gradient

    def eager_gradient(self, batch: Minibatch) -> tuple[Terms, th.Tensor]:
        """
        :param batch: some transitions of this rank
        :return: their terms, detached, and what the ranks add up
        """
        terms = self.evaluate(batch, self.settings)
        record = Terms(*(term.detach() for term in terms))
        return record, self.descent.gradient(terms.loss, len(batch.actions), record.log_ratio)

    def __call__(self, batch: Minibatch) -> Step:
        """
        :param batch: some transitions of this rank
        :return: what came of them and of the other ranks'
        :raises JointError: on all ranks, if one of them cannot evaluate its transitions
        """
        vector: th.Tensor | Exception
        try:
            record, vector = self.differentiate(batch)
        except Exception as error:
            # Told to the others in the very sum that they are waiting for
            vector = error
        norms, stopped = self.descent.step(vector)
        return Step(record, norms, stopped)
