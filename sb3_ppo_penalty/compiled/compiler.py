"""
The optimizer's step on one minibatch as one compiled graph: loss, gradient, clipping and Adam; of several ranks, whose
gradients have to be added up in between, loss and gradient alone.

A step is traced once for each kind of minibatch and compiled by what is behind ``torch.compile``, on the CPU in a process of
its own (``apart``). It changes the policy's weights and the optimizer's own tensors in place, so that the eager step can take
over at any time and a saved file knows nothing of it.
"""

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.utils import _pytree as pytree

from sb3_ppo_penalty.compiled.module_state import UnfollowedError, module_state
from sb3_ppo_penalty.compiled.worker import Draw, Graph, Workshop, drawn, each_tensor, pickled
from sb3_ppo_penalty.objectives.losses import k3_estimate
from sb3_ppo_penalty.policies.policies import FORWARD_OVERRIDES, FixedCovarianceMixin
from sb3_ppo_penalty.rollouts.rollout import Minibatch
from sb3_ppo_penalty.updates.step import (
    EagerStepper,
    Evaluate,
    Settings,
    SharedStepper,
    Step,
    Stepper,
    Terms,
    clipped_together,
    packed,
)

LOGGER = logging.getLogger(__name__)

#: How far a graph's weights, and the rollout's record of the old policy, are moved to check it: see :func:`moved_apart`.
#: Nothing is moved first, since an update begins there; then the ratios are large, and the divergence goes from 0 to large
DISTANCES = ((0.0, 0.0), (0.0, 2.0), (0.1, 2.0), (0.5, 2.0), (2.0, 2.0))
#: At each distance. One may put a sample on the edge of a clip or of a unit, where rounding decides; a wrong graph fails all
ATTEMPTS = 3
#: A policy or a loss that needs more graphs than that keeps changing: compiling would take longer than it saves
MAX_GRAPHS = 8


class AdamOptions(NamedTuple):
    """
    Adam's constants; see ``torch.optim.Adam``.

    :param betas: how much of the two means stays at each step
    :param eps: added to the root of the mean of squares
    :param weight_decay: share of the weight that is added to its gradient
    :param decoupled_weight_decay: whether that share times the learning rate is taken from the weight instead, as AdamW does
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer) -> "AdamOptions":
        """
        :param optimizer: an Adam
        :return: the constants of its one group
        """
        group = optimizer.param_groups[0]
        return cls(tuple(group["betas"]), group["eps"], group["weight_decay"], group["decoupled_weight_decay"])


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
    Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1).

    :param weight: any shape
    :param gradient: same shape
    :param exp_avg: mean of the gradients so far, same shape
    :param exp_avg_sq: mean of their squares, same shape
    :param step: the number of this step, from 1, scalar
    :param learning_rate: scalar
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


def held_names(policy: ActorCriticPolicy) -> list[str]:
    """
    Find the weights that the optimizer moves: a user may have given it some of the policy's alone.

    :param policy: with its optimizer
    :return: names of the weights that learn and that the optimizer holds
    """
    held = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    return [name for name, weight in policy.named_parameters() if weight.requires_grad and id(weight) in held]


def why_not(policy: ActorCriticPolicy) -> str | None:
    """
    Say what speaks against a graph before anything is traced.

    :param policy: with its optimizer
    :return: why the step of the two cannot be a graph, or None if it can
    """
    return _why_not_optimizer(policy) or _why_not_hooks(policy)


def _why_not_optimizer(policy: ActorCriticPolicy) -> str | None:
    """
    Look for what :func:`adam_step` does not do.

    :param policy: with its optimizer
    :return: why the optimizer's step cannot be part of a graph, or None if it can
    """
    optimizer = policy.optimizer
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"the optimizer is {type(optimizer).__name__}, not Adam"
    if len(optimizer.param_groups) > 1:
        return "the optimizer has more than one group of parameters"
    unusual = [name for name in ("amsgrad", "maximize", "differentiable") if optimizer.param_groups[0][name]]
    if unusual:
        return f"the optimizer is an Adam with {unusual[0]}"
    own = {id(weight) for weight in policy.parameters()}
    if any(id(weight) not in own for weight in optimizer.param_groups[0]["params"]):
        return "the optimizer holds weights that are not the policy's"
    if not held_names(policy):
        return "the optimizer holds no weight of the policy that learns"
    complex_valued = [name for name, weight in policy.named_parameters() if weight.is_complex()]
    return f"the weight {complex_valued[0]} is complex" if complex_valued else None


def _why_not_hooks(policy: ActorCriticPolicy) -> str | None:
    """
    Look for a user's functions that torch calls on the way, and a graph would not.

    :param policy: with its optimizer
    :return: where there is one, or None if there is none
    """
    optimizer = policy.optimizer
    if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in policy.parameters()):
        return "a weight has hooks"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [type(module).__name__ for module in policy.modules() if any(getattr(module, kind) for kind in kinds)]
    return f"a module, {hooked[0]}, has hooks" if hooked else None


class _Loss(nn.Module):
    """
    The loss as a module, because torch exchanges the weights of modules.

    :param policy: whose weights are exchanged
    :param evaluate: uses that policy
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate) -> None:
        super().__init__()
        self.policy = policy
        self.evaluate = evaluate

    def forward(self, batch: Minibatch, settings: Settings) -> Terms:
        """
        :param batch: some transitions
        :param settings: of the loss
        :return: the loss and its parts
        """
        return self.evaluate(batch, settings)


class Inputs(NamedTuple):
    """
    What a graph reads or writes besides the minibatch.

    :param weights: those that have a gradient, by name
    :param exp_avg: Adam's mean of the gradients, for each weight that the optimizer moves
    :param exp_avg_sq: Adam's mean of their squares, for the same
    :param steps: Adam's step counts, in that order, shape (number of weights that the optimizer moves,)
    :param others: the policy's further tensors by name: buffers, and weights that do not learn
    :param learning_rate: scalar
    :param settings: see :class:`~.EagerStepper`, with scalar tensors in place of floats
    """

    weights: dict[str, th.Tensor]
    exp_avg: dict[str, th.Tensor]
    exp_avg_sq: dict[str, th.Tensor]
    steps: th.Tensor
    others: dict[str, th.Tensor]
    learning_rate: th.Tensor
    settings: Settings

    @classmethod
    def of(cls, policy: ActorCriticPolicy, settings: Settings) -> "Inputs":
        """
        Gather what stays the same through an update; Adam's state is made where there is none yet.

        :param policy: its optimizer is an Adam
        :param settings: of one update
        """
        weights, state = dict(policy.named_parameters()), policy.optimizer.state
        learning = weights if settings["learning"] is None else settings["learning"]
        moved = {name: state[weights[name]] for name in held_names(policy) if name in learning}
        for name, own in moved.items():
            if not own:
                means = {mean: th.zeros_like(weights[name]) for mean in ("exp_avg", "exp_avg_sq")}
                own.update(step=th.zeros((), device=policy.device), **means)
        # On the device, wherever another optimizer, or a file of its, has kept them
        steps = th.stack([own["step"].to(policy.device) for own in moved.values()])
        for own, step in zip(moved.values(), steps, strict=True):
            # A view, so that the graph counts for all weights at once
            own["step"] = step
        return cls.of_loss(policy, settings)._replace(
            exp_avg={name: own["exp_avg"] for name, own in moved.items()},
            exp_avg_sq={name: own["exp_avg_sq"] for name, own in moved.items()},
            steps=steps,
        )

    @classmethod
    def of_loss(cls, policy: ActorCriticPolicy, settings: Settings) -> "Inputs":
        """
        Gather the same without what belongs to Adam.

        :param policy: with any optimizer
        :param settings: of one update
        """
        tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
        learning = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

        def scalar(value: float) -> th.Tensor:
            return th.tensor(value, dtype=th.float32, device=policy.device)

        return cls(
            weights={name: weight.detach() for name, weight in learning.items()},
            exp_avg={},
            exp_avg_sq={},
            steps=th.zeros(0, device=policy.device),
            others={name: tensor for name, tensor in tensors.items() if name not in learning},
            learning_rate=scalar(policy.optimizer.param_groups[0]["lr"]),
            settings=pytree.tree_map(lambda leaf: scalar(leaf) if type(leaf) in (int, float) else leaf, settings),
        )


def call_with(module: nn.Module, tensors: dict[str, th.Tensor], *arguments: Any) -> Any:
    """
    Call a module with other tensors in place of its own.

    :param module: keeps its own tensors
    :param tensors: weights and buffers by name; what the module does to them in place is done to these
    :param arguments: of the call
    :return: what the module returns
    :raises UnfollowedError: if it puts another tensor in the place of one
    """
    exchanged = dict(tensors)
    # Not tied: an extractor that SB3 registers under three names would be exchanged three times and put back once
    found = th.func.functional_call(module, exchanged, arguments, tie_weights=False)
    # torch notes there what a module has assigned
    assigned = [name for name, tensor in tensors.items() if exchanged[name] is not tensor]
    if assigned:
        raise UnfollowedError(f"evaluating the policy assigns `{assigned[0]}`, which a graph would not")
    return found


def evaluated(inputs: Inputs, batch: Minibatch, loss: nn.Module) -> tuple[Terms, dict[str, th.Tensor]]:
    """
    Work out the loss.

    :param inputs: nothing of them is changed but what the policy itself changes, such as a batch norm's running means
    :param batch: some transitions
    :param loss: with the policy inside
    :return: the loss and its parts, and the weights by which it can be differentiated
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in inputs.weights.items()}
    exchanged = {f"policy.{name}": tensor for name, tensor in {**weights, **inputs.others}.items()}
    return call_with(loss, exchanged, batch, inputs.settings), weights


def differentiated(inputs: Inputs, batch: Minibatch, loss: nn.Module) -> tuple[Terms, dict[str, th.Tensor | None]]:
    """
    Work out the loss and its gradient.

    :param inputs: as in :func:`evaluated`
    :param batch: some transitions
    :param loss: with the policy inside
    :return: the loss and its parts, and the gradient with respect to each weight that may move, None where there is none
    """
    terms, weights = evaluated(inputs, batch, loss)
    names = [name for name in weights if inputs.settings["learning"] is None or name in inputs.settings["learning"]]
    gradients = th.autograd.grad(terms.loss, [weights[name] for name in names], allow_unused=True)
    return terms, dict(zip(names, gradients, strict=True))


def gradient_alone(inputs: Inputs, batch: Minibatch, loss: nn.Module) -> list[th.Tensor]:
    """
    The part of a step that comes before the ranks add up.

    :param inputs: nothing of them is changed
    :param batch: some transitions of this rank
    :param loss: with the policy inside
    :return: the terms, and what the ranks add up: :func:`~.packed`
    """
    terms, gradients = differentiated(inputs, batch, loss)
    with th.no_grad():
        estimate = None if inputs.settings["stop_kl"] is None else k3_estimate(terms.log_ratio)
        weights = [inputs.weights[name] for name in gradients]
        vector = packed(weights, list(gradients.values()), len(batch.actions), estimate)
    return [*(term.detach().clone() for term in terms), vector]


def clipped(
    gradients: dict[str, th.Tensor | None], settings: Settings, like: th.Tensor
) -> tuple[list[th.Tensor], dict[str, th.Tensor]]:
    """
    :param gradients: by the weight's name; None where the loss does not depend on it
    :param settings: of the step
    :param like: on the device
    :return: length of each part of the gradient that is clipped by itself, before that; the gradients that are not None, after
    """
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    norms = []
    for names, limit in clipped_together(list(found), settings):
        # torch's norm of nothing is on the CPU
        norm = nn.utils.get_total_norm([found[name] for name in names]) if names else th.zeros_like(like)
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        found.update({name: found[name] * scale for name in names})
        norms.append(norm)
    return norms, found


def whole_step(inputs: Inputs, batch: Minibatch, loss: nn.Module, options: AdamOptions) -> list[th.Tensor]:
    """
    Loss, gradient, clipping and Adam, written so that torch can make one graph of them.

    :param inputs: the weights, Adam's means and the step counts are changed in place
    :param batch: some transitions
    :param loss: with the policy inside
    :param options: Adam's constants
    :return: the terms, the length of each clipped part of the gradient, and whether the update ends before this step (it
        was not made then)
    """
    terms, gradients = differentiated(inputs, batch, loss)
    with th.no_grad():
        norms, found = clipped(gradients, inputs.settings, terms.loss)
        limit = inputs.settings["stop_kl"]
        stopped = None if limit is None else k3_estimate(terms.log_ratio) > limit
        for name, step in zip(inputs.exp_avg, inputs.steps + 1, strict=True):
            if name not in found:
                continue
            old = (inputs.weights[name], inputs.exp_avg[name], inputs.exp_avg_sq[name])
            new = adam_step(*old[:1], found[name], *old[1:], step, inputs.learning_rate, options)
            for before, after in zip(old, new, strict=True):
                before.copy_(after if stopped is None else th.where(stopped, before, after))
        moved = th.stack([th.full((), float(name in found), device=inputs.steps.device) for name in inputs.exp_avg])
        inputs.steps.add_(moved if stopped is None else moved * ~stopped)
    # Copies: a term may be a view of a tensor of the policy's
    record = [term.detach().clone() for term in terms]
    return [*record, *norms] if stopped is None else [*record, *norms, stopped]


def one_step(inputs: Inputs, batch: Minibatch, loss: nn.Module, options: AdamOptions | None) -> list[th.Tensor]:
    """
    :param inputs: of the step
    :param batch: some transitions
    :param loss: with the policy inside
    :param options: Adam's constants; None for the gradient alone
    :return: what :func:`whole_step` returns, or :func:`gradient_alone`
    """
    return gradient_alone(inputs, batch, loss) if options is None else whole_step(inputs, batch, loss, options)


def fixed_tensors(inputs: Inputs, batch: Minibatch) -> list[th.Tensor]:
    """
    :param inputs: of a graph
    :param batch: any of the rollout's
    :return: the tensors that stay the same from minibatch to minibatch, each of them once
    """
    leaves = pytree.tree_leaves((inputs, batch.shared))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, th.Tensor)}.values())


def trace(inputs: Inputs, batch: Minibatch, loss: nn.Module, options: AdamOptions | None) -> th.fx.GraphModule:
    """
    Write down every operation of a step, with tensors that hold no data.

    :param inputs: of the step
    :param batch: some transitions
    :param loss: with the policy inside
    :param options: Adam's constants; None for the gradient alone
    :return: a module that takes :func:`fixed_tensors` and the columns of a minibatch, and returns what :func:`one_step`
        returns
    """
    # As wherever torch's compiler is needed: importing it takes memory that it never gives back
    from torch.fx.experimental.proxy_tensor import make_fx

    fixed = fixed_tensors(inputs, batch)
    places = {id(tensor): place for place, tensor in enumerate(fixed)}

    def flat(*tensors: th.Tensor) -> list[th.Tensor]:
        def given(leaf: Any) -> Any:
            return tensors[places[id(leaf)]] if isinstance(leaf, th.Tensor) else leaf

        traced, shared = pytree.tree_map(given, (inputs, batch.shared))
        return one_step(traced, batch.with_columns(tensors[len(fixed) :], shared), loss, options)

    return make_fx(flat, tracing_mode="fake")(*fixed, *batch.columns)


@contextmanager
def _traceable(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Let tensors without data pass through a policy, and leave none of them behind.

    :param policy: whose mutable distribution keeps what it was last given
    """
    distribution, validates = vars(policy.action_dist), th.distributions.Distribution._validate_args
    before = distribution.copy()
    # torch's check of its arguments would ask for their values; what is not finite is found after the update
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(validates)
        distribution.clear()
        distribution.update(before)


def draw_step(
    loss: _Loss, inputs: Inputs, batch: Minibatch, options: AdamOptions | None
) -> tuple[th.fx.GraphModule, list[th.Tensor]]:
    """
    :param loss: with the policy inside
    :param inputs: of the step
    :param batch: some transitions
    :param options: Adam's constants
    :return: see :func:`trace`, and what it takes
    """
    with _traceable(loss.policy):
        return trace(inputs, batch, loss, options), [*fixed_tensors(inputs, batch), *batch.columns]


def draw_networks(networks: "_Networks", obs: Any) -> tuple[th.fx.GraphModule, list[th.Tensor]]:
    """
    :param networks: of a policy
    :param obs: some observations
    :return: a module that takes the networks' tensors and the observations' own, and these
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    keys = list(obs) if isinstance(obs, dict) else None
    observations = list(obs.values()) if isinstance(obs, dict) else [obs]
    own = networks.tensors()

    def flat(*given: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        seen = given[len(own) :]
        state = dict(zip(own, given, strict=False))
        given_obs = seen[0] if keys is None else dict(zip(keys, seen, strict=True))
        found: tuple[th.Tensor, th.Tensor] = call_with(networks, state, given_obs)
        return found

    examples = [*own.values(), *observations]
    with _traceable(networks.policy), th.no_grad():
        return make_fx(flat, tracing_mode="fake")(*examples), examples


def alike(ours: list[th.Tensor], theirs: list[th.Tensor]) -> bool:
    """
    :param ours: tensors
    :param theirs: as many
    :return: whether they are the same up to rounding
    """
    pairs = zip(ours, theirs, strict=True)
    return all(th.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-4, equal_nan=True) for a, b in pairs)


def same_draws(run: Callable[[], Any]) -> Any:
    """
    Run something, and set the random generators back: what runs next draws the same numbers.

    :param run: may draw
    :return: what it returns
    """
    devices = [th.cuda.current_device()] if th.cuda.is_available() else []
    with th.random.fork_rng(devices=devices):
        return run()


def moved_apart(
    inputs: Inputs, batch: Minibatch, distances: tuple[float, float], generator: th.Generator
) -> tuple[Inputs, Minibatch]:
    """
    Move copies of policy and rollout apart, so that ratio, divergence, clips and cutoff all act.

    :param inputs: are not changed
    :param batch: is not changed
    :param distances: of the weights: at 1, what a layer makes of inputs of size 1 changes by about 1; and of the rollout:
        at 1, the log-ratios change by about 1 nat, and the old values by about as much as they are clipped at
    :param generator: of the noise
    :return: the copies
    """
    inputs, batch = each_tensor((inputs, batch), th.clone)
    of_weights, of_rollout = distances

    def noise(like: th.Tensor) -> th.Tensor:
        return th.randn(like.shape, generator=generator).to(like)

    for weight in inputs.weights.values():
        fan_in = weight[0].numel() if weight.dim() > 1 else 1
        weight.add_(of_weights * noise(weight) / fan_in**0.5)
    batch.old_log_prob.add_(of_rollout * noise(batch.old_log_prob))
    clip_range_vf = inputs.settings["clip_range_vf"]
    if clip_range_vf is not None:
        batch.old_values.add_(of_rollout * noise(batch.old_values) * clip_range_vf)
    return inputs, batch


def agrees(graph: Graph, loss: _Loss, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> bool:
    """
    Compare a step with that of a graph: its terms, what it leaves behind, and its gradient, where an error of a wrong graph
    is not lost in rounding.

    :param graph: of the step
    :param loss: with the policy inside
    :param inputs: of the step; it is made
    :param batch: some transitions
    :param options: Adam's constants; None for the gradient alone
    :return: whether the graph does what :func:`one_step` does
    """
    theirs, their_batch = each_tensor((inputs, batch), th.clone)
    expected = same_draws(lambda: one_step(inputs, batch, loss, options))
    found = same_draws(lambda: graph(*fixed_tensors(theirs, their_batch), *their_batch.columns))
    # Adam's mean, not the new weights: those it moves as much where the gradient is rounding as elsewhere
    gradients, their_gradients = list(inputs.exp_avg.values()), list(theirs.exp_avg.values())
    if options is None:
        (*expected, gradient), (*found, their_gradient) = expected, found
        gradients, their_gradients = [gradient], [their_gradient]
    # Their lengths, not their entries: a unit whose input is rounded to the other side of 0 changes single entries by a
    # sample's share
    lengths = [gradient.norm() for gradient in gradients]
    bounds = [1e-2 * length + 1e-6 * max(lengths) for length in lengths]
    pairs = zip(gradients, their_gradients, bounds, strict=True)
    left, their_left = (
        [*of.others.values(), of.steps, *seen.columns] for of, seen in ((inputs, batch), (theirs, their_batch))
    )
    # Not finite far away: then of both
    close = all(bool((a - b).norm() <= bound) or not bool(bound.isfinite()) for a, b, bound in pairs)
    return close and alike(found, expected) and alike(their_left, left)


def is_right_step(graph: Graph, loss: _Loss, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> bool:
    """
    Check a graph at the old policy and away from it: there alone the ratio is 1, and the divergence and its gradient are 0.

    :param graph: of the step
    :param loss: with the policy inside
    :param inputs: of the step; nothing of them is changed
    :param batch: some transitions
    :param options: Adam's constants; None for the gradient alone
    :return: whether the graph does what :func:`one_step` does
    """
    generator = th.Generator().manual_seed(0)

    def right(distances: tuple[float, float]) -> bool:
        apart = (moved_apart(inputs, batch, distances, generator) for _ in range(ATTEMPTS))
        return any(agrees(graph, loss, *each, options) for each in apart)

    return all(map(right, DISTANCES))


@th.no_grad()
def is_still_right(graph: Graph, loss: _Loss, inputs: Inputs, batch: Minibatch) -> bool:
    """
    Look, once per update, for what a graph cannot know of: something that the policy or the loss reads elsewhere has changed.

    :param graph: of the step
    :param loss: with the policy inside
    :param inputs: of the step; nothing of them is changed
    :param batch: some transitions
    :return: whether the graph finds the terms that the loss has
    """
    (ours, our_batch), (theirs, their_batch) = (each_tensor((inputs, batch), th.clone) for _ in range(2))
    expected, _ = same_draws(lambda: evaluated(ours, our_batch, loss))
    found = same_draws(lambda: graph(*fixed_tensors(theirs, their_batch), *their_batch.columns))
    return alike(found[: len(expected)], list(expected))


@th.no_grad()
def is_right_actor(graph: Graph, networks: "_Networks", obs: Any) -> bool:
    """
    Compare what the networks find, and leave behind, with what a graph does.

    :param graph: of the networks
    :param networks: of a policy; nothing of them is changed
    :param obs: some observations
    :return: whether the two are the same
    """
    (ours, our_obs), (theirs, their_obs) = (each_tensor((networks.tensors(), obs), th.clone) for _ in range(2))
    seen, their_seen = (list(each.values()) if isinstance(each, dict) else [each] for each in (our_obs, their_obs))
    expected = same_draws(lambda: call_with(networks, ours, our_obs))
    found = same_draws(lambda: graph(*theirs.values(), *their_seen))
    return alike([*found, *theirs.values(), *their_seen], [*expected, *ours.values(), *seen])


class Compiler:
    """
    Makes compiled steps, and keeps their graphs from update to update.

    :param policy: whose weights move
    :param evaluate: the loss; depends on nothing but that policy, the minibatch and the settings
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate) -> None:
        self.policy = policy
        self.loss = _Loss(policy, evaluate)
        self.graphs: dict[Any, Graph] = {}
        self.actors: dict[Any, Graph] = {}
        self.workshop = Workshop()
        self.made = 0
        #: Why there is no compiled step, once that is known
        self.refusal: str | None = None

    def stepper(self, eager: EagerStepper | SharedStepper, batch_size: int) -> Stepper:
        """
        :param eager: the step that does the same, of one update
        :param batch_size: the size to compile for; any other minibatch takes the eager step
        :return: the compiled step, or the eager one where torch cannot compile it
        """
        learning = eager.settings["learning"]
        idle = learning is not None and not {*learning} & {*held_names(self.policy)}
        if idle or not self.willing():
            return eager
        if isinstance(eager, EagerStepper):
            return CompiledStepper(self, eager, batch_size)
        eager.differentiate = CompiledGradient(self, eager, batch_size)
        return eager

    def willing(self) -> bool:
        """:return: whether there is anything to compile; warns once if not."""
        reason = why_not(self.policy)
        if self.refusal is None and reason is not None:
            self.refuse(reason)
        return self.refusal is None

    def refuse(self, reason: str) -> None:
        """
        Say once that the step stays eager.

        :param reason: in one line
        """
        self.refusal = reason
        self.workshop.close()
        warnings.warn(f"`compile=True` has no effect, training goes on without it: {reason}", RuntimeWarning, stacklevel=2)

    def graph(self, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> tuple[Graph, list[th.Tensor]] | None:
        """
        Make a step with the graph for inputs of this kind.

        :param inputs: of the step
        :param batch: some transitions
        :param options: Adam's constants; None for the gradient alone
        :return: the graph and what it returned, or None, with the inputs as they were, where torch cannot make one
        """
        tensors = [*fixed_tensors(inputs, batch), *batch.columns]
        key = self._kind_of(inputs, batch, options)
        try:
            if key not in self.graphs or not self._is_still_right(self.graphs[key], inputs, batch):
                self.graphs[key] = self._compile(inputs, batch, options)
            with th.no_grad():
                return self.graphs[key], self.graphs[key](*tensors)
        # Whatever torch's tracer, its compiler or the machine's C++ compiler stumbles over in a policy of the user's
        except Exception as error:
            self.refuse(in_one_line(error))
            return None

    def _kind_of(self, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> Any:
        """
        Find what a graph is made for.

        :param inputs: of the step
        :param batch: some transitions
        :param options: Adam's constants; None for the gradient alone
        :return: the same for two steps that one graph can make
        """
        leaves, structure = pytree.tree_flatten((inputs, batch))
        kinds = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, th.Tensor) else leaf for leaf in leaves)
        places: dict[int, int] = {}
        # Also which of them are one: the divergence is another while the covariance is the very same tensor
        same = tuple(places.setdefault(id(leaf), len(places)) for leaf in leaves if isinstance(leaf, th.Tensor))
        return str(structure), kinds, same, options, tuple(module_state(self.policy).items())

    def _is_still_right(self, graph: Graph, inputs: Inputs, batch: Minibatch) -> bool:
        """
        Look at what no key can hold: see :func:`is_still_right`.

        :param graph: of an earlier update
        :param inputs: of the step; nothing of them is changed
        :param batch: some transitions
        :return: whether the graph can make this update too
        """
        with _traceable(self.policy):
            return is_still_right(graph, self.loss, inputs, batch)

    def _compile(self, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> Graph:
        """
        Make the graph of a step.

        :param inputs: of the step
        :param batch: some transitions
        :param options: Adam's constants; None for the gradient alone
        :return: the graph
        """

        def is_right(graph: Graph) -> bool:
            return is_right_step(graph, self.loss, inputs, batch, options)

        graph = self._made(is_right, draw_step, self.loss, inputs, batch, options)
        # Other graphs are seldom asked for later
        self.workshop.close()
        return graph

    def _made(self, is_right: Callable[[Graph], bool], draw: Draw, module: nn.Module, *arguments: Any) -> Graph:
        """
        Compile in another process, or in this one where that does not work.

        :param is_right: whether a graph does what it should: the other process knows the code only as it is on disk
        :param draw: traces the module
        :param module: with the policy inside
        :param arguments: of ``draw``, after the module
        :return: the graph
        :raises UnfollowedError: if no graph does what the module does, or none does so for long
        """
        self.made += 1
        if self.made > MAX_GRAPHS:
            raise UnfollowedError(f"the policy, or the loss, has changed so often that it would need {self.made} graphs")
        reason = None
        with _traceable(self.policy):
            if self.policy.device.type == "cpu":
                reason = "it came out different there"
                try:
                    graph = self.workshop(draw, module, *arguments)
                    if is_right(graph):
                        return graph
                except UnfollowedError:
                    raise
                # Whatever it was: what cannot be compiled here either says so below
                except Exception as error:
                    reason = in_one_line(error)
            graph = compiled(*drawn(draw, duplicate(module), *arguments))
            if not is_right(graph):
                raise UnfollowedError("the compiled graph comes out different from the policy's own step")
        if reason:
            LOGGER.warning("compiled in the training process, which takes 90 MB more of its memory: %s", reason)
        return graph

    @contextmanager
    def acting(self) -> Iterator[None]:
        """
        Let the policy act through a graph of its networks, where its covariance is fixed; the draw stays as it is, and takes
        the same random numbers.
        """
        policy = self.policy
        if not (self.willing() and isinstance(policy, FixedCovarianceMixin) and policy.has_fixed_covariance):
            yield
            return
        networks = _Networks(policy)
        fixed = list(networks.tensors().values())
        actors: dict[Any, Graph | None] = {}

        def mean_and_value(obs: Any) -> tuple[th.Tensor, th.Tensor]:
            observations = list(obs.values()) if isinstance(obs, dict) else [obs]
            kind = tuple((tensor.shape, tensor.dtype) for tensor in observations)
            if kind not in actors:
                actors[kind] = self._actor(kind, networks, obs)
            graph = actors[kind]
            if graph is None:
                return policy.mean_and_value(obs)
            mean, values = graph(*fixed, *observations)
            return mean, values

        FORWARD_OVERRIDES[policy] = mean_and_value
        try:
            yield
        finally:
            del FORWARD_OVERRIDES[policy]

    def _actor(self, kind: Any, networks: "_Networks", obs: Any) -> Graph | None:
        """
        Look up, or make, the graph with which the policy acts in a rollout.

        :param kind: of the observations
        :param networks: of the policy
        :param obs: some observations
        :return: see :func:`draw_networks`; None where torch cannot make one
        """

        def is_right(graph: Graph) -> bool:
            return is_right_actor(graph, networks, obs)

        key = (kind, *module_state(self.policy).items())
        try:
            if self.refusal is None and (key not in self.actors or not is_right(self.actors[key])):
                self.actors[key] = self._made(is_right, draw_networks, networks, obs)
            return None if self.refusal else self.actors[key]
        # As for the step
        except Exception as error:
            self.refuse(in_one_line(error))
            return None


def duplicate(module: nn.Module) -> nn.Module:
    """
    Copy a module to trace: what it does to itself on the way is not done to the original.

    :param module: with the policy inside
    :return: the copy; the module itself where it cannot be pickled
    """
    try:
        copy: nn.Module = pickle.loads(pickled(module))
    # Whatever a class's own pickling raises
    except Exception:
        return module
    return copy


def compiled(traced: th.fx.GraphModule, examples: list[th.Tensor]) -> Graph:
    """
    :param traced: takes and returns tensors
    :param examples: such tensors, on their device
    :return: the same, compiled
    """
    from torch import _inductor as inductor

    graph: Graph
    if examples[0].device.type == "cuda":
        # Launched as one CUDA graph
        graph = kept(th.compile(traced, fullgraph=True, dynamic=False, mode="reduce-overhead"))
    else:
        # Straight to the compiler behind `torch.compile`: nothing is left to find out, and nothing to check at each call
        with th.no_grad():
            graph = inductor.compile(traced, list[Any](examples), {"size_asserts": False})
    return graph


def kept(graph: Graph) -> Graph:
    """
    Copy what a CUDA graph returns: its next replay writes to the same memory.

    :param graph: returns tensors that it will write to again
    :return: the same, whose tensors stay what they are
    """
    return lambda *tensors: [tensor.clone() for tensor in graph(*tensors)]


def in_one_line(error: Exception) -> str:
    """
    :param error: what torch's tracer or compiler raised
    :return: its kind and the first line of what it says
    """
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class _Networks(nn.Module):
    """
    What a policy of fixed covariance does before it draws, as a module.

    :param policy: whose weights are exchanged
    """

    def __init__(self, policy: FixedCovarianceMixin) -> None:
        super().__init__()
        self.policy = policy

    def tensors(self) -> dict[str, th.Tensor]:
        """:return: all that the networks may read, by name."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach() for name, tensor in named.items()}

    def forward(self, obs: Any) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :return: mean actions and values
        """
        return self.policy.mean_and_value(obs)


class Repeated:
    """
    A graph for minibatches of one size, looked up or made when the first of them comes.

    :param compiler: keeps the graphs
    :param inputs: of one update
    :param options: Adam's constants; None for the gradient alone
    :param batch_size: the size to compile for
    """

    def __init__(self, compiler: Compiler, inputs: Inputs, options: AdamOptions | None, batch_size: int) -> None:
        self.compiler = compiler
        self.inputs = inputs
        self.options = options
        self.batch_size = batch_size
        self.graph: Graph | None = None
        self.fixed: list[th.Tensor] = []

    def __call__(self, batch: Minibatch) -> list[th.Tensor] | None:
        """
        :param batch: some transitions
        :return: see :func:`one_step`; None, and nothing done, for another size, such as that of an epoch's last minibatch, and
            where torch makes no graph
        """
        if len(batch.actions) != self.batch_size or self.compiler.refusal is not None:
            return None
        if self.graph is not None:
            with th.no_grad():
                return self.graph(*self.fixed, *batch.columns)
        made = self.compiler.graph(self.inputs, batch, self.options)
        if made is None:
            return None
        self.graph, record = made
        self.fixed = fixed_tensors(self.inputs, batch)
        return record


class CompiledStepper:
    """
    The whole step as one graph.

    :param compiler: keeps the graphs
    :param eager: for minibatches that have no graph
    :param batch_size: the size to compile for
    """

    def __init__(self, compiler: Compiler, eager: EagerStepper, batch_size: int) -> None:
        self.eager = eager
        inputs, options = Inputs.of(compiler.policy, eager.settings), AdamOptions.of(compiler.policy.optimizer)
        self.graph = Repeated(compiler, inputs, options, batch_size)

    def __call__(self, batch: Minibatch) -> Step:
        """
        :param batch: some transitions
        :return: what came of it
        """
        record = self.graph(batch)
        if record is None:
            return self.eager(batch)
        count = len(Terms._fields)
        norms = 2 if isinstance(self.eager.settings["max_grad_norm"], tuple) else 1
        stopped = len(record) > count + norms and bool(record[-1])
        return Step(Terms(*record[:count]), () if stopped else tuple(record[count : count + norms]), stopped)


class CompiledGradient:
    """
    Loss and gradient as one graph, for a step that several ranks make together.

    :param compiler: keeps the graphs
    :param eager: for minibatches that have no graph
    :param batch_size: the size to compile for
    """

    def __init__(self, compiler: Compiler, eager: SharedStepper, batch_size: int) -> None:
        self.eager = eager
        self.graph = Repeated(compiler, Inputs.of_loss(compiler.policy, eager.settings), None, batch_size)

    def __call__(self, batch: Minibatch) -> tuple[Terms, th.Tensor]:
        """
        :param batch: some transitions of this rank
        :return: their terms, and what the ranks add up
        """
        record = self.graph(batch)
        if record is None:
            return self.eager.eager_gradient(batch)
        return Terms(*record[:-1]), record[-1]
