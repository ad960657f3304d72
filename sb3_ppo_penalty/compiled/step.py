"""
The optimizer's step on one minibatch as pure functions of tensors, from which torch makes one graph.

``updates.step`` makes the same step operation by operation. Here the weights and the optimizer's own tensors are changed in
place, so that the eager step can take over at any time and saved files are those of an eager model.
"""

from collections.abc import Iterable
from itertools import compress
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.utils import _pytree as pytree

from sb3_ppo_penalty.compiled.module_state import UntraceableError
from sb3_ppo_penalty.objectives.drift import k3_estimate
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.step import Descent, Evaluate, LossSettings, Step, StepSettings, Terms, clipped_together


class AdamOptions(NamedTuple):
    """
    Adam's constants; see ``torch.optim.Adam``.

    :param betas: decay rates of the two running means, between 0 and 1
    :param eps: added to the root of the mean of squares
    :param weight_decay: share of the weight that is added to its gradient
    :param decoupled_weight_decay: take that share times the learning rate from the weight instead, as AdamW does
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer) -> "AdamOptions":
        """
        Read the constants of an optimizer.

        :param optimizer: an Adam or AdamW with one group of parameters
        """
        group = optimizer.param_groups[0]
        beta, beta_sq = map(float, group["betas"])
        return cls((beta, beta_sq), group["eps"], group["weight_decay"], group["decoupled_weight_decay"])


def adam_step(
    weight: th.Tensor,
    gradient: th.Tensor,
    exp_avg: th.Tensor,
    exp_avg_sq: th.Tensor,
    step: th.Tensor,
    learning_rate: th.Tensor,
    options: AdamOptions,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Make one step of Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1).

    :param weight: a weight of any shape
    :param gradient: gradient of the loss with respect to it, same shape
    :param exp_avg: running mean of the gradients before this one, same shape
    :param exp_avg_sq: running mean of their squares, same shape
    :param step: number of this step, from 1, scalar
    :param learning_rate: step size, scalar
    :param options: Adam's constants
    :return: the new weight and the two new means
    """
    beta, beta_sq = options.betas
    if options.decoupled_weight_decay:
        weight = weight - learning_rate * options.weight_decay * weight
    elif options.weight_decay:
        gradient = gradient + options.weight_decay * weight
    exp_avg = exp_avg.lerp(gradient, 1 - beta)
    exp_avg_sq = exp_avg_sq * beta_sq + (1 - beta_sq) * gradient * gradient
    root = exp_avg_sq.sqrt() / (1 - beta_sq**step).sqrt() + options.eps
    return weight - learning_rate / (1 - beta**step) * exp_avg / root, exp_avg, exp_avg_sq


def optimized_names(policy: ActorCriticPolicy) -> list[str]:
    """
    Return the names of the weights that learn; the optimizer may hold only some of the policy's.

    :param policy: the policy with its optimizer
    """
    held = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    return [name for name, weight in policy.named_parameters() if weight.requires_grad and id(weight) in held]


class LossModule(nn.Module):
    """
    The loss as a module, because ``functional_call`` exchanges the weights of modules only.

    :param policy: the policy whose weights are exchanged
    :param evaluate: returns the terms of the loss of a minibatch under that policy
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate) -> None:
        super().__init__()
        self.policy = policy
        self.evaluate = evaluate

    def forward(self, batch: Transitions, settings: LossSettings) -> Terms:
        """
        Evaluate the loss.

        :param batch: the minibatch
        :param settings: settings of the loss
        """
        return self.evaluate(batch, settings)


class StepInputs(NamedTuple):
    """
    All that a graph reads or writes besides the minibatch; the same tensors through one update.

    :param weights: the policy's weights that have a gradient, by name
    :param exp_avg: Adam's running mean of the gradients, for each weight that the optimizer moves
    :param exp_avg_sq: Adam's running mean of their squares, for the same weights
    :param steps: Adam's step counts, in the same order, shape (number of weights that the optimizer moves,)
    :param others: the policy's further tensors by name: buffers, and weights that do not learn
    :param learning_rate: the optimizer's step size, scalar
    :param loss: settings of the loss, with scalar tensors in place of numbers
    :param settings: settings of the step, with scalar tensors in place of numbers
    """

    weights: dict[str, th.Tensor]
    exp_avg: dict[str, th.Tensor]
    exp_avg_sq: dict[str, th.Tensor]
    steps: th.Tensor
    others: dict[str, th.Tensor]
    learning_rate: th.Tensor
    loss: LossSettings
    settings: StepSettings

    @classmethod
    def for_step(cls, policy: ActorCriticPolicy, loss: LossSettings, settings: StepSettings) -> "StepInputs":
        """
        Collect the inputs of whole steps; Adam's state is created where there is none yet.

        :param policy: a policy whose optimizer is an Adam
        :param loss: settings of the loss
        :param settings: settings of the steps
        """
        weights, state = dict(policy.named_parameters()), policy.optimizer.state
        learning = weights if settings.learning is None else settings.learning
        moved = {name: state[weights[name]] for name in optimized_names(policy) if name in learning}
        for name, own in moved.items():
            if not own:
                means = {mean: th.zeros_like(weights[name]) for mean in ("exp_avg", "exp_avg_sq")}
                own.update(step=th.zeros((), device=policy.device), **means)
        # Another optimizer, or a file, may have left the counts on another device
        steps = th.stack([own["step"].to(policy.device) for own in moved.values()])
        for own, step in zip(moved.values(), steps, strict=True):
            # Views of one tensor, so that the graph raises all counts with one addition
            own["step"] = step
        return cls.for_gradient(policy, loss, settings)._replace(
            exp_avg={name: own["exp_avg"] for name, own in moved.items()},
            exp_avg_sq={name: own["exp_avg_sq"] for name, own in moved.items()},
            steps=steps,
        )

    @classmethod
    def for_gradient(cls, policy: ActorCriticPolicy, loss: LossSettings, settings: StepSettings) -> "StepInputs":
        """
        Collect the inputs of the gradient alone, without Adam's state.

        :param policy: a policy with any optimizer
        :param loss: settings of the loss
        :param settings: settings of the steps
        """
        tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
        learning = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

        def scalar(value: float) -> th.Tensor:
            return th.tensor(value, dtype=th.float32, device=policy.device)

        loss, settings = pytree.tree_map(lambda leaf: scalar(leaf) if type(leaf) in (int, float) else leaf, (loss, settings))
        return cls(
            weights={name: weight.detach() for name, weight in learning.items()},
            exp_avg={},
            exp_avg_sq={},
            steps=th.zeros(0, device=policy.device),
            others={name: tensor for name, tensor in tensors.items() if name not in learning},
            learning_rate=scalar(policy.optimizer.param_groups[0]["lr"]),
            loss=loss,
            settings=settings,
        )


def call_with_tensors(module: nn.Module, tensors: dict[str, th.Tensor], *arguments: Any, **named: Any) -> Any:
    """
    Call a module with other tensors in place of its own.

    :param module: the module; it keeps its own tensors
    :param tensors: weights and buffers by name; what the module changes in place is changed in these
    :param arguments: the arguments of the call
    :param named: the same by name
    :return: the module's result
    :raises UntraceableError: if the module assigns a new tensor to one of its names
    """
    exchanged = dict(tensors)
    # Not tied: an extractor that SB3 registers under three names would be exchanged three times and put back once
    result = th.func.functional_call(module, exchanged, arguments, named, tie_weights=False)
    # torch writes into this dict what the module has assigned
    assigned = [name for name, tensor in tensors.items() if exchanged[name] is not tensor]
    if assigned:
        raise UntraceableError(f"evaluating the policy assigns `{assigned[0]}`, which a graph would not")
    return result


def evaluate_loss(inputs: StepInputs, batch: Transitions, loss: LossModule) -> tuple[Terms, dict[str, th.Tensor]]:
    """
    Evaluate the loss with the weights among the inputs.

    :param inputs: inputs of the step; only what the policy itself changes in place changes, such as a batch norm's means
    :param batch: the minibatch
    :param loss: the loss with the policy inside
    :return: the terms of the loss, and the weights by name, which it can be differentiated with respect to
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in inputs.weights.items()}
    exchanged = {f"policy.{name}": tensor for name, tensor in {**weights, **inputs.others}.items()}
    return call_with_tensors(loss, exchanged, batch, inputs.loss), weights


def loss_and_gradients(inputs: StepInputs, batch: Transitions, loss: LossModule) -> tuple[Terms, dict[str, th.Tensor | None]]:
    """
    Evaluate the loss and its gradient.

    :param inputs: inputs of the step, see :func:`evaluate_loss`
    :param batch: the minibatch
    :param loss: the loss with the policy inside
    :return: the terms of the loss, and the gradient for each weight that may move, None where the loss does not depend on it
    """
    terms, weights = evaluate_loss(inputs, batch, loss)
    names = [name for name in weights if inputs.settings.learning is None or name in inputs.settings.learning]
    gradients = th.autograd.grad(terms.loss, [weights[name] for name in names], allow_unused=True)
    return terms, dict(zip(names, gradients, strict=True))


def gradient_step(inputs: StepInputs, batch: Transitions, loss: LossModule) -> list[th.Tensor]:
    """
    Compute the part of a step that comes before several ranks sum their gradients.

    :param inputs: inputs of the step, which do not change
    :param batch: this rank's minibatch
    :param loss: the loss with the policy inside
    :return: see :func:`unpack_gradient`
    """
    terms, gradients = loss_and_gradients(inputs, batch, loss)
    found = [gradient for gradient in gradients.values() if gradient is not None]
    return [*(term.detach().clone() for term in terms), _presence(gradients.values(), inputs.steps.device), *found]


def unpack_gradient(descent: Descent, outputs: list[th.Tensor]) -> Terms:
    """
    Leave the gradients of :func:`gradient_step` with the weights.

    :param descent: steps the weights
    :param outputs: what :func:`gradient_step`, or its graph, returned: the terms of the loss; for each weight 1, or 0 if the
        loss does not depend on it; and the gradients for the others
    :return: the terms of the loss
    """
    n_terms = len(Terms._fields)
    present, *gradients = outputs[n_terms:]
    descent.clear()
    for weight, gradient in zip(compress(descent.weights, present.tolist()), gradients, strict=True):
        weight.grad = gradient
    return Terms(*outputs[:n_terms])


def _presence(values: Iterable[Any], device: th.device) -> th.Tensor:
    """
    Return 1 for each value and 0 for each None, as one vector.

    :param values: values, some of which may be None
    :param device: where to put the vector
    """
    return th.stack([th.full((), float(value is not None), device=device) for value in values])


def clip_gradients(
    gradients: dict[str, th.Tensor], settings: StepSettings, device: th.device
) -> tuple[list[th.Tensor], dict[str, th.Tensor]]:
    """
    Scale gradients that are too long down to the largest length allowed.

    :param gradients: gradients by the weight's name
    :param settings: settings of the update
    :param device: where the policy is
    :return: lengths before clipping, scalars, one for each group of gradients that is clipped as one; the clipped gradients
    """
    norms, clipped = [], {}
    for names, limit in clipped_together(gradients, settings):
        # torch's norm of nothing is on the CPU
        norm = nn.utils.get_total_norm([gradients[name] for name in names]) if names else th.zeros((), device=device)
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        clipped.update({name: gradients[name] * scale for name in names})
        norms.append(norm)
    return norms, clipped


def whole_step(inputs: StepInputs, batch: Transitions, loss: LossModule, options: AdamOptions) -> list[th.Tensor]:
    """
    Compute the loss and its gradient, clip it and make one step of Adam.

    :param inputs: inputs of the step; the weights, Adam's means and the step counts change in place
    :param batch: the minibatch
    :param loss: the loss with the policy inside
    :param options: Adam's constants
    :return: see :func:`unpack_step`
    """
    terms, gradients = loss_and_gradients(inputs, batch, loss)
    with th.no_grad():
        # A weight without gradient and its moments stay: torch's Adam leaves them alone too
        used = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        norms, clipped = clip_gradients(used, inputs.settings, inputs.steps.device)
        limit = inputs.settings.stop_kl
        stopped = None if limit is None else k3_estimate(terms.log_ratio) > limit
        for name, step in zip(inputs.exp_avg, inputs.steps + 1, strict=True):
            if name not in clipped:
                continue
            old = (inputs.weights[name], inputs.exp_avg[name], inputs.exp_avg_sq[name])
            new = adam_step(*old[:1], clipped[name], *old[1:], step, inputs.learning_rate, options)
            for before, after in zip(old, new, strict=True):
                before.copy_(after if stopped is None else th.where(stopped, before, after))
        moved = _presence(map(clipped.get, inputs.exp_avg), inputs.steps.device)
        inputs.steps.add_(moved if stopped is None else moved * ~stopped)
    # Copies, because a term may be a view of one of the policy's tensors
    outputs = [*(term.detach().clone() for term in terms), *norms]
    return outputs if stopped is None else [*outputs, stopped]


def unpack_step(settings: StepSettings, outputs: list[th.Tensor]) -> Step:
    """
    Name the outputs of :func:`whole_step`.

    :param settings: settings of the update
    :param outputs: what it, or its graph, returned: the terms of the loss, the length of each group of gradients that is
        clipped as one, and, where ``stop_kl`` is set, whether the update ends and this step was not made
    """
    n_terms = len(Terms._fields)
    n_norms = 2 if isinstance(settings.max_grad_norm, tuple) else 1
    stopped = settings.stop_kl is not None and bool(outputs[-1])
    return Step(Terms(*outputs[:n_terms]), () if stopped else tuple(outputs[n_terms : n_terms + n_norms]), stopped)
