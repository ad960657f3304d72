"""Programs that can become graphs: tracing with tensors that hold no data, and the check of a graph against the eager code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.utils import _pytree as pytree

from sb3_ppo_penalty.compiled.module_state import UntraceableError, evaluation_state
from sb3_ppo_penalty.compiled.noise import Noise
from sb3_ppo_penalty.compiled.step import (
    AdamOptions,
    LossModule,
    StepInputs,
    call_with_tensors,
    evaluate_loss,
    gradient_step,
    whole_step,
)
from sb3_ppo_penalty.policies.distributions import FixedGaussianDistribution
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.step import Terms

#: Takes the tensors of a program and returns the program's results
Graph = Callable[..., list[th.Tensor]]

#: Where a step's graph is checked: how far the weights, and the rollout's record of the old policy, are moved; see
#: :meth:`StepProgram.perturbed`. Unmoved first, because an update begins there; then with large ratios and KL divergences
DISTANCES = ((0.0, 0.0), (0.0, 2.0), (0.1, 2.0), (0.5, 2.0), (2.0, 2.0))
#: Random moves tried at each distance. One may put a sample on the edge of a clip or of a ReLU, where rounding decides; a
#: wrong graph fails all
ATTEMPTS = 3


def map_tensors(tree: Any, change: Callable[[th.Tensor], th.Tensor]) -> Any:
    """
    Map the tensors of a tree; aliased tensors stay aliased.

    :param tree: tensors and other things, in tuples, lists and dicts
    :param change: returns the tensor to put in the place of a tensor
    """
    changed: dict[int, th.Tensor] = {}

    def new_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, th.Tensor):
            return leaf
        if id(leaf) not in changed:
            changed[id(leaf)] = change(leaf)
        return changed[id(leaf)]

    return pytree.tree_map(new_leaf, tree)


def close_enough(ours: list[th.Tensor], theirs: list[th.Tensor]) -> bool:
    """
    Return whether two lists of tensors are the same up to rounding.

    :param ours: tensors of any shapes
    :param theirs: tensors of the same shapes
    """
    pairs = zip(ours, theirs, strict=True)
    return all(th.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-4, equal_nan=True) for a, b in pairs)


def keep_random_state(run: Callable[[], Any]) -> Any:
    """
    Call a function and reset torch's random generators, so that the next call draws the same numbers.

    :param run: function without arguments that may draw random numbers
    :return: its result
    """
    devices = [th.cuda.current_device()] if th.cuda.is_available() else []
    with th.random.fork_rng(devices=devices):
        return run()


class StepProgram(NamedTuple):
    """
    A step on one minibatch, or its gradient alone, as something that can become a graph.

    :param module: the loss with the policy inside
    :param inputs: inputs of the step
    :param batch: the minibatch
    :param options: Adam's constants for a whole step; None for the gradient alone
    """

    module: LossModule
    inputs: StepInputs
    batch: Transitions
    options: AdamOptions | None

    def run(self) -> list[th.Tensor]:
        """Make the step, or compute the gradient, operation by operation."""
        if self.options is None:
            return gradient_step(self.inputs, self.batch, self.module)
        return whole_step(self.inputs, self.batch, self.module, self.options)

    def fixed_tensors(self) -> list[th.Tensor]:
        """Return each tensor once that stays the same from minibatch to minibatch."""
        leaves = pytree.tree_leaves((self.inputs, self.batch.shared))
        return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, th.Tensor)}.values())

    def tensors(self) -> list[th.Tensor]:
        """Return the arguments of the graph: the fixed tensors, then the columns of the minibatch."""
        return [*self.fixed_tensors(), *self.batch.columns]

    def with_tensors(self, tensors: Sequence[th.Tensor]) -> "StepProgram":
        """
        Return the same program on other tensors.

        :param tensors: tensors in place of :meth:`tensors`
        """
        places = {id(tensor): place for place, tensor in enumerate(self.fixed_tensors())}

        def given(leaf: Any) -> Any:
            return tensors[places[id(leaf)]] if isinstance(leaf, th.Tensor) else leaf

        inputs, shared = pytree.tree_map(given, (self.inputs, self.batch.shared))
        return self._replace(inputs=inputs, batch=self.batch.with_columns(tensors[len(places) :], shared))

    def perturbed(self, distances: tuple[float, float], generator: th.Generator) -> "StepProgram":
        """
        Return a copy whose policy is moved away from the rollout, so that ratio, divergence, clips and cutoff all act.

        :param distances: distance of the weights: at 1, a layer's response to inputs of size 1 changes by about 1; and of the
            rollout: at 1, the log-ratios change by about 1 nat, and the old values by about the size of their clip
        :param generator: generator of the noise
        """
        copy: StepProgram = map_tensors(self, th.clone)
        of_weights, of_rollout = distances

        def noise(like: th.Tensor) -> th.Tensor:
            return th.randn(like.shape, generator=generator).to(like)

        for weight in copy.inputs.weights.values():
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.add_(of_weights * noise(weight) / fan_in**0.5)
        batch = copy.batch
        batch.old_log_prob.add_(of_rollout * noise(batch.old_log_prob))
        clip_range_vf = copy.inputs.loss.clip_range_vf
        if clip_range_vf is not None:
            batch.old_values.add_(of_rollout * noise(batch.old_values) * clip_range_vf)
        return copy

    def matches(self, graph: Graph) -> bool:
        """
        Return whether a graph does what the program does, at the old policy and away from it.

        At the old policy alone, every ratio is 1, and the divergence and its gradient are 0.

        :param graph: a graph that was made of the program
        """
        generator = th.Generator().manual_seed(0)

        def matches_at(distances: tuple[float, float]) -> bool:
            return any(_same_step(self.perturbed(distances, generator), graph) for _ in range(ATTEMPTS))

        return all(map(matches_at, DISTANCES))

    @th.no_grad()
    def still_matches(self, graph: Graph) -> bool:
        """
        Return whether a graph of an earlier update still returns the terms of the loss.

        Checked once per update, because the policy or the loss may read something that no key of the graph covers.

        :param graph: a graph that was made of such a program
        """
        ours, theirs = (map_tensors(self, th.clone) for _ in range(2))
        terms, _ = keep_random_state(lambda: evaluate_loss(ours.inputs, ours.batch, ours.module))
        found = keep_random_state(lambda: graph(*theirs.tensors()))
        return close_enough(found[: len(terms)], list(terms))


def _same_step(program: StepProgram, graph: Graph) -> bool:
    """
    Return whether a program and its graph find the same terms and gradient, and change the same tensors alike.

    :param program: the program; its tensors are not changed
    :param graph: a graph that was made of it
    """
    ours, theirs = (map_tensors(program, th.clone) for _ in range(2))
    expected = keep_random_state(ours.run)
    found = keep_random_state(lambda: graph(*theirs.tensors()))
    # Adam's mean, not the new weights: Adam moves a weight as far for a gradient that is rounding error as for any other
    gradients, graph_gradients = list(ours.inputs.exp_avg.values()), list(theirs.inputs.exp_avg.values())
    if program.options is None:
        start = len(Terms._fields) + 1
        expected, gradients = expected[:start], expected[start:]
        found, graph_gradients = found[:start], found[start:]
    # Compared by length: a ReLU's input rounded to the other side of 0 changes single entries by a whole sample's share
    lengths = [gradient.norm() for gradient in gradients]
    bounds = [1e-2 * length + 1e-6 * max(lengths) for length in lengths]
    pairs = zip(gradients, graph_gradients, bounds, strict=True)
    # Far from the old policy the gradient may overflow; then in both
    close = all(bool((a - b).norm() <= bound) or not bool(bound.isfinite()) for a, b, bound in pairs)
    left, graph_left = ([*each.inputs.others.values(), each.inputs.steps, *each.batch.columns] for each in (ours, theirs))
    return close and close_enough(found, expected) and close_enough(graph_left, left)


class ActorModule(nn.Module):
    """
    A policy's pass from observations to actions, as a module.

    :param policy: the policy whose weights are exchanged
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def tensors(self) -> dict[str, th.Tensor]:
        """Return all weights and buffers by name."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach() for name, tensor in named.items()}

    def forward(self, obs: Any, **others: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Compute actions, values and log-probabilities, by the method of the policy's class.

        :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
        :param others: what else the policy takes, by name, as masks
        """
        actions, values, log_prob = type(self.policy).forward(self.policy, obs, **others)
        return actions, values, log_prob


def exploration_of(policy: ActorCriticPolicy) -> dict[str, th.Tensor]:
    """
    Return by name what a policy's distribution keeps from one evaluation to the next: gSDE's matrices, nothing otherwise.

    :param policy: a policy of SB3's
    """
    if not isinstance(policy.action_dist, StateDependentNoiseDistribution):
        return {}
    return {name: vars(policy.action_dist)[name] for name in ("exploration_mat", "exploration_matrices")}


class ActorProgram(NamedTuple):
    """
    A policy's pass over one batch of observations to actions, as something that can become a graph.

    :param module: the pass
    :param state: weights and buffers by name
    :param exploration: see :func:`exploration_of`
    :param kinds: kinds of the noise, see :data:`~.noise.FILL`
    :param noise: what the draws of the pass take from the random generator, in their order
    :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
    :param others: what else the policy takes, by name, as masks
    """

    module: ActorModule
    state: dict[str, th.Tensor]
    exploration: dict[str, th.Tensor]
    kinds: tuple[str, ...]
    noise: tuple[th.Tensor, ...]
    obs: Any
    others: dict[str, th.Tensor]

    @th.no_grad()
    def run(self) -> list[th.Tensor]:
        """Return actions, values, log-probabilities, and a scalar that is finite if actions and log-probabilities are."""
        vars(self.module.policy.action_dist).update(self.exploration)
        with Noise(self.kinds, self.noise):
            actions, values, log_prob = call_with_tensors(self.module, self.state, self.obs, **self.others)
        return [actions, values, log_prob, log_prob.sum() + actions.sum()]

    def tensors(self) -> list[th.Tensor]:
        """Return the arguments of the graph: the policy's tensors, the noise, the observations, then what else it takes."""
        observations = self.obs.values() if isinstance(self.obs, dict) else [self.obs]
        return [*self.state.values(), *self.exploration.values(), *self.noise, *observations, *self.others.values()]

    def with_tensors(self, tensors: Sequence[th.Tensor]) -> "ActorProgram":
        """
        Return the same program on other tensors.

        :param tensors: tensors in place of :meth:`tensors`
        """
        left = iter(tensors)
        state, exploration = ({name: next(left) for name in each} for each in (self.state, self.exploration))
        noise = tuple(next(left) for _ in self.noise)
        obs = {key: next(left) for key in self.obs} if isinstance(self.obs, dict) else next(left)
        others = {name: next(left) for name in self.others}
        return self._replace(state=state, exploration=exploration, noise=noise, obs=obs, others=others)

    @th.no_grad()
    def matches(self, graph: Graph) -> bool:
        """
        Return whether a graph returns what the policy returns, and changes the same tensors alike.

        :param graph: a graph that was made of such a program
        """
        ours, theirs = (map_tensors(self, th.clone) for _ in range(2))
        expected, found = ours.run(), graph(*theirs.tensors())
        return close_enough([*found, *theirs.tensors()], [*expected, *ours.tensors()])

    def still_matches(self, graph: Graph) -> bool:
        """
        Return whether a graph of an earlier rollout still does what the policy does.

        :param graph: a graph that was made of such a program
        """
        return self.matches(graph)


#: A module with the tensors that it works on
Program = StepProgram | ActorProgram


def key_of(program: Program) -> Any:
    """
    Return a key that is the same for two programs if one graph can serve both.

    :param program: the program
    """
    # Without the module, which is the same for all programs of a compiler
    leaves, structure = pytree.tree_flatten(program[1:])
    kinds = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, th.Tensor) else leaf for leaf in leaves)
    places: dict[int, int] = {}
    # Also which tensors are one: the divergence has another form while old and new covariance are the very same tensor
    aliases = tuple(places.setdefault(id(leaf), len(places)) for leaf in leaves if isinstance(leaf, th.Tensor))
    return str(structure), kinds, aliases


@contextmanager
def traceable(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Let tensors without data pass through a policy, and leave none of them behind.

    :param policy: a policy, whose distribution object keeps the tensors that it was last given
    """
    distribution, validates = vars(policy.action_dist), th.distributions.Distribution._validate_args
    before = distribution.copy()
    # torch's check of a distribution's arguments needs their values; what is not finite is found after the update
    th.distributions.Distribution.set_default_validate_args(False)
    if isinstance(policy.action_dist, FixedGaussianDistribution):
        distribution["_require_finite_mean"] = lambda: None
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(validates)
        distribution.clear()
        distribution.update(before)


def trace(program: Program) -> th.fx.GraphModule:
    """
    Record every operation of a program, with tensors that hold no data.

    :param program: the program
    :return: a module that takes the program's tensors and returns its results
    :raises UntraceableError: naming what the policy changes in itself on the way, which a graph would repeat as it was
    """
    # Not at the top: importing torch's tracer takes memory that it never gives back
    from torch.fx.experimental.proxy_tensor import make_fx

    policy = program.module.policy
    before = evaluation_state(policy)
    with traceable(policy):
        traced = make_fx(lambda *tensors: program.with_tensors(tensors).run(), tracing_mode="fake")(*program.tensors())
    after = evaluation_state(policy)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise UntraceableError(f"evaluating the policy changes `{changed[0]}`, which a graph would not")
    return traced
