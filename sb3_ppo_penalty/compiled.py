"""
The optimizer's step on one minibatch as one compiled graph: loss, gradient, clipping and Adam; of several ranks, whose
gradients have to be added up in between, loss and gradient alone.

A step is traced once for each kind of minibatch and compiled by what is behind ``torch.compile``, on the CPU in a process of
its own (``apart``). It changes the policy's weights and the optimizer's own tensors in place, so that the eager step can take
over at any time and a saved file knows nothing of it.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.utils import _pytree as pytree

from sb3_ppo_penalty.apart import Draw, Graph, Workshop, each_tensor
from sb3_ppo_penalty.losses import k3_estimate
from sb3_ppo_penalty.policies import STAND_INS, FixedCovarianceMixin
from sb3_ppo_penalty.rollout import Minibatch
from sb3_ppo_penalty.update import (
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


def why_not(optimizer: th.optim.Optimizer) -> str | None:
    """
    :param optimizer: of the policy
    :return: why its step cannot be part of a graph, or None if it can
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"the optimizer is {type(optimizer).__name__}, not Adam"
    if len(optimizer.param_groups) > 1:
        return "the optimizer has more than one group of parameters"
    unusual = [name for name in ("amsgrad", "maximize", "differentiable") if optimizer.param_groups[0][name]]
    return f"the optimizer is an Adam with {unusual[0]}" if unusual else None


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

    :param weights: those that learn, by name
    :param exp_avg: Adam's mean of the gradients, a tensor per weight
    :param exp_avg_sq: Adam's mean of their squares, a tensor per weight
    :param steps: Adam's step counts, shape (number of weights,)
    :param others: the policy's further tensors by name: buffers, and weights that do not learn
    :param learning_rate: scalar
    :param settings: see :class:`~sb3_ppo_penalty.update.EagerStepper`, with scalar tensors in place of floats
    """

    weights: dict[str, th.Tensor]
    exp_avg: list[th.Tensor]
    exp_avg_sq: list[th.Tensor]
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
        state = policy.optimizer.state
        learning = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        for weight in learning.values():
            if not state[weight]:
                means = {name: th.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                state[weight] = {"step": th.zeros(()), **means}
        steps = th.stack([state[weight]["step"] for weight in learning.values()]).to(policy.device)
        for weight, step in zip(learning.values(), steps, strict=True):
            # A view, so that the graph counts for all weights at once
            state[weight]["step"] = step
        return cls.of_loss(policy, settings)._replace(
            exp_avg=[state[weight]["exp_avg"] for weight in learning.values()],
            exp_avg_sq=[state[weight]["exp_avg_sq"] for weight in learning.values()],
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
            exp_avg=[],
            exp_avg_sq=[],
            steps=th.zeros(0, device=policy.device),
            others={name: tensor for name, tensor in tensors.items() if name not in learning},
            learning_rate=scalar(policy.optimizer.param_groups[0]["lr"]),
            settings=pytree.tree_map(lambda leaf: scalar(leaf) if type(leaf) in (int, float) else leaf, settings),
        )


def differentiated(inputs: Inputs, batch: Minibatch, loss: nn.Module) -> tuple[Terms, dict[str, th.Tensor | None]]:
    """
    :param inputs: nothing of them is changed
    :param batch: some transitions
    :param loss: with the policy inside
    :return: the loss and its parts, and the gradient with respect to each weight that moves, None where there is none
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in inputs.weights.items()}
    exchanged = {f"policy.{name}": tensor for name, tensor in {**weights, **inputs.others}.items()}
    # Not tied: an extractor that SB3 registers under three names would be exchanged three times and put back once
    terms: Terms = th.func.functional_call(loss, exchanged, (batch, inputs.settings), tie_weights=False)
    names = [name for name in weights if inputs.settings["learning"] is None or name in inputs.settings["learning"]]
    gradients = th.autograd.grad(terms.loss, [weights[name] for name in names], allow_unused=True)
    return terms, dict(zip(names, gradients, strict=True))


def gradient_alone(inputs: Inputs, batch: Minibatch, loss: nn.Module) -> list[th.Tensor]:
    """
    The part of a step that comes before the ranks add up.

    :param inputs: nothing of them is changed
    :param batch: some transitions of this rank
    :param loss: with the policy inside
    :return: the terms, and what the ranks add up: :func:`~sb3_ppo_penalty.update.packed`
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
        columns = (inputs.weights.items(), inputs.exp_avg, inputs.exp_avg_sq, inputs.steps + 1)
        for (name, weight), exp_avg, exp_avg_sq, step in zip(*columns, strict=True):
            if name not in found:
                continue
            old = (weight, exp_avg, exp_avg_sq)
            new = adam_step(*old[:1], found[name], *old[1:], step, inputs.learning_rate, options)
            for before, after in zip(old, new, strict=True):
                before.copy_(after if stopped is None else th.where(stopped, before, after))
        moved = th.stack([th.full((), float(name in found), device=inputs.steps.device) for name in inputs.weights])
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
        found: tuple[th.Tensor, th.Tensor] = th.func.functional_call(networks, state, (given_obs,), tie_weights=False)
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


def is_right_step(graph: Graph, loss: _Loss, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> bool:
    """
    Make a step on copies, and compare: its terms, and its gradient, where an error of a wrong graph is not lost in rounding.

    :param graph: of the step
    :param loss: with the policy inside
    :param inputs: of the step; nothing of them is changed
    :param batch: some transitions
    :param options: Adam's constants; None for the gradient alone
    :return: whether the graph does what :func:`one_step` does
    """
    (ours, our_batch), (theirs, their_batch) = (each_tensor((inputs, batch), th.clone) for _ in range(2))
    expected = one_step(ours, our_batch, loss, options)
    found = graph(*fixed_tensors(theirs, their_batch), *their_batch.columns)
    # Adam's mean, not the new weights: those it moves as much where the gradient is rounding as elsewhere
    gradients, their_gradients = ours.exp_avg, theirs.exp_avg
    if options is None:
        (*expected, gradient), (*found, their_gradient) = expected, found
        gradients, their_gradients = [gradient], [their_gradient]
    # Their lengths, not their entries: a unit whose input is rounded to the other side of 0 changes single entries by a
    # sample's share
    lengths = [gradient.norm() for gradient in gradients]
    bounds = [1e-2 * length + 1e-4 * max(lengths) for length in lengths]
    pairs = zip(gradients, their_gradients, bounds, strict=True)
    return alike(found, expected) and all(bool((a - b).norm() <= bound) for a, b, bound in pairs)


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
        self.actors: dict[Any, Graph | None] = {}
        self.workshop = Workshop()
        #: Why there is no compiled step, once that is known
        self.refusal: str | None = None

    def stepper(self, eager: EagerStepper | SharedStepper, batch_size: int) -> Stepper:
        """
        :param eager: the step that does the same, of one update
        :param batch_size: the size to compile for; any other minibatch takes the eager step
        :return: the compiled step, or the eager one where torch cannot compile it
        """
        if not self.willing():
            return eager
        if isinstance(eager, EagerStepper):
            return CompiledStepper(self, eager, batch_size)
        eager.differentiate = CompiledGradient(self, eager, batch_size)
        return eager

    def willing(self) -> bool:
        """:return: whether there is anything to compile; warns once if not."""
        reason = why_not(self.policy.optimizer)
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
        leaves, structure = pytree.tree_flatten((inputs, batch))
        kinds = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, th.Tensor) else leaf for leaf in leaves)
        tensors = [*fixed_tensors(inputs, batch), *batch.columns]
        key = (str(structure), kinds, options)
        if key in self.graphs:
            with th.no_grad():
                return self.graphs[key], self.graphs[key](*tensors)
        try:
            graph = self._compile(inputs, batch, options)
            with th.no_grad():
                record = graph(*tensors)
        # Whatever torch's tracer, its compiler or the machine's C++ compiler stumbles over in a policy of the user's
        except Exception as error:
            self.refuse(in_one_line(error))
            return None
        self.graphs[key] = graph
        return graph, record

    def _compile(self, inputs: Inputs, batch: Minibatch, options: AdamOptions | None) -> Graph:
        """
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
        """
        if self.policy.device.type == "cpu":
            reason = "it came out different there"
            try:
                with _traceable(self.policy), th.random.fork_rng(devices=[]):
                    graph = self.workshop(draw, module, *arguments)
                    if is_right(graph):
                        return graph
            # Whatever it was: what cannot be compiled here either says so below
            except Exception as error:
                reason = in_one_line(error)
            LOGGER.warning("compiled in the training process, which takes 90 MB more of its memory: %s", reason)
        return compiled(*draw(module, *arguments))

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

        def mean_and_value(obs: Any) -> tuple[th.Tensor, th.Tensor]:
            observations = list(obs.values()) if isinstance(obs, dict) else [obs]
            key = tuple((tensor.shape, tensor.dtype) for tensor in observations)
            if key not in self.actors:
                self.actors[key] = self._compile_networks(networks, obs)
            graph = self.actors[key]
            if graph is None:
                return policy.mean_and_value(obs)
            mean, values = graph(*fixed, *observations)
            return mean, values

        STAND_INS[policy] = mean_and_value
        try:
            yield
        finally:
            del STAND_INS[policy]

    def _compile_networks(self, networks: "_Networks", obs: Any) -> Graph | None:
        """
        :param networks: of the policy
        :param obs: some observations
        :return: see :func:`draw_networks`; None where torch cannot make one
        """
        observations = list(obs.values()) if isinstance(obs, dict) else [obs]
        fixed = list(networks.tensors().values())
        try:
            return self._made(
                lambda graph: alike(graph(*fixed, *observations), [*networks(obs)]), draw_networks, networks, obs
            )
        # As for the step
        except Exception as error:
            self.refuse(in_one_line(error))
            return None


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
        graph = th.compile(traced, fullgraph=True, dynamic=False, mode="reduce-overhead")
    else:
        # Straight to the compiler behind `torch.compile`: nothing is left to find out, and nothing to check at each call
        with th.no_grad():
            graph = inductor.compile(traced, list[Any](examples), {"size_asserts": False})
    return graph


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
