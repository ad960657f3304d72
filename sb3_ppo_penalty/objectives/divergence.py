"""
Exact Kullback-Leibler divergence between two action distributions, for each state, in nats.

SB3's own ``kl_divergence`` leaves one column per action dimension for Gaussians and Bernoullis, so that its mean is too
small by the number of dimensions, and is infinite for categoricals whose probability underflows
(https://github.com/ray-project/ray/issues/21297). Here the divergence of a state is one finite number.

A distribution is frozen with :func:`parameters_of`; two frozen ones are compared with :func:`kl_divergence`. For a
distribution of one's own, :func:`register_divergence` tells both.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import singledispatch
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal
from torch.nn.functional import logsigmoid

from sb3_ppo_penalty.arguments import require

AnyDistribution = TypeVar("AnyDistribution")


class UnknownDivergenceError(ValueError):
    """No closed form of the KL divergence is known for a policy's action distribution."""


def _scale_term(change: th.Tensor) -> th.Tensor:
    """
    What a change of scale adds to the divergence, ``e + e^2 / 2 - log(1 + e)``: exactly 0 at ``e = 0`` and accurate around it.

    :param change: e = old scale / new scale - 1
    :return: in nats, same shape
    """
    return change + 0.5 * change.square() - th.log1p(change)


def kl_diagonal_gaussian(mean: th.Tensor, std: th.Tensor, new_mean: th.Tensor, new_std: th.Tensor) -> th.Tensor:
    """
    ``sum_i log(s'_i / s_i) + (s_i^2 + (m_i - m'_i)^2) / (2 s'_i^2) - 1/2``, primes for the new distribution.

    :param mean: old mean, shape (batch, action_dim)
    :param std: old standard deviation, shape (batch, action_dim)
    :param new_mean: shape (batch, action_dim)
    :param new_std: shape (batch, action_dim)
    :return: KL(old || new), shape (batch,), in nats
    """
    shift = (mean - new_mean) / new_std
    spread = _scale_term((std - new_std) / new_std)
    return (spread + 0.5 * shift.square()).sum(dim=-1)


def kl_gaussian(mean: th.Tensor, scale_tril: th.Tensor, new_mean: th.Tensor, new_scale_tril: th.Tensor) -> th.Tensor:
    """
    ``(tr(S'^-1 S) - d + (m' - m)^T S'^-1 (m' - m) + log(det S' / det S)) / 2`` from the Cholesky factors ``S = L L^T``.

    Written in ``E = L'^-1 (L - L')``, which is 0 where the covariances agree: no trace is subtracted from a dimension.

    :param mean: old mean, shape (batch, action_dim)
    :param scale_tril: old L, shape (action_dim, action_dim) or (batch, action_dim, action_dim)
    :param new_mean: shape (batch, action_dim)
    :param new_scale_tril: shape like ``scale_tril``
    :return: KL(old || new), shape (batch,), in nats
    """
    change: th.Tensor = th.linalg.solve_triangular(new_scale_tril, scale_tril - new_scale_tril, upper=False)
    diagonal = change.diagonal(dim1=-2, dim2=-1)
    spread = (diagonal - th.log1p(diagonal)).sum(dim=-1) + 0.5 * change.square().sum(dim=(-2, -1))
    # One right-hand side per state against one matrix for all states, or against the state's own
    difference = (mean - new_mean).mT if new_scale_tril.dim() == 2 else (mean - new_mean).unsqueeze(-1)
    shift: th.Tensor = th.linalg.solve_triangular(new_scale_tril, difference, upper=False)
    return spread + 0.5 * shift.square().sum(dim=-2).reshape(len(mean))


def kl_fixed_diagonal(
    mean: th.Tensor, std: th.Tensor, whitening: th.Tensor, new_mean: th.Tensor, new_std: th.Tensor, new_whitening: th.Tensor
) -> th.Tensor:
    """
    As :func:`kl_diagonal_gaussian`, where all states share their deviations and the inverses are known.

    While the covariance stays (the very same tensor) only ``sum_i ((m_i - m'_i) / s_i)^2 / 2`` is worked out.

    :param mean: old mean, shape (batch, action_dim)
    :param std: old standard deviations, shape (action_dim,)
    :param whitening: ``1 / std``
    :param new_mean: shape (batch, action_dim)
    :param new_std: shape (action_dim,)
    :param new_whitening: ``1 / new_std``
    :return: KL(old || new), shape (batch,), in nats
    """
    shift = 0.5 * ((mean - new_mean) * new_whitening).square().sum(dim=-1)
    return shift if new_std is std else shift + _scale_term((std - new_std) * new_whitening).sum()


def kl_fixed_full(
    mean: th.Tensor,
    factor: th.Tensor,
    whitening: th.Tensor,
    new_mean: th.Tensor,
    new_factor: th.Tensor,
    new_whitening: th.Tensor,
) -> th.Tensor:
    """
    As :func:`kl_gaussian`, where all states share one matrix and the inverse of its factor is known.

    While the covariance stays (the very same tensor) only ``|L^-1 (m - m')|^2 / 2`` is worked out.

    :param mean: old mean, shape (batch, action_dim)
    :param factor: old lower Cholesky factor L, shape (action_dim, action_dim)
    :param whitening: inverse of ``factor``
    :param new_mean: shape (batch, action_dim)
    :param new_factor: shape (action_dim, action_dim)
    :param new_whitening: inverse of ``new_factor``
    :return: KL(old || new), shape (batch,), in nats
    """
    shift = 0.5 * ((mean - new_mean) @ new_whitening.mT).square().sum(dim=-1)
    if new_factor is factor:
        return shift
    change = new_whitening @ (factor - new_factor)
    diagonal = change.diagonal()
    return shift + (diagonal - th.log1p(diagonal)).sum() + 0.5 * change.square().sum()


def kl_categorical(*logits: th.Tensor) -> th.Tensor:
    """
    ``sum_i sum_a p_i(a) (log p_i(a) - log p'_i(a))`` over independent categorical actions i, from log-softmax.

    An action that the old policy never takes adds nothing, even where its log-probability is minus infinity.

    :param logits: the old logits of every action dimension, then the new ones; shapes (batch, number of choices)
    :return: KL(old || new), shape (batch,), in nats
    """
    count = len(logits) // 2
    terms = []
    for old, new in zip(logits[:count], logits[count:], strict=True):
        log_p, new_log_p = th.log_softmax(old, dim=-1), th.log_softmax(new, dim=-1)
        p = log_p.exp()
        # Inside the product: minus infinity minus itself has no gradient that a factor of 0 could take away
        terms.append((p * th.where(p > 0, log_p - new_log_p, 0.0)).sum(dim=-1))
    return th.stack(terms).sum(dim=0)


def kl_bernoulli(logits: th.Tensor, new_logits: th.Tensor) -> th.Tensor:
    """
    ``sum_i p_i log(p_i / p'_i) + (1 - p_i) log((1 - p_i) / (1 - p'_i))`` over independent bits i, from log-sigmoid.

    :param logits: old, shape (batch, bits)
    :param new_logits: shape (batch, bits)
    :return: KL(old || new), shape (batch,), in nats
    """
    one = th.sigmoid(logits) * (logsigmoid(logits) - logsigmoid(new_logits))
    zero = th.sigmoid(-logits) * (logsigmoid(-logits) - logsigmoid(-new_logits))
    return (one + zero).sum(dim=-1)


class ActionParameters(NamedTuple):
    """
    What defines the action distribution in a batch of states: tensors only, no reference to the policy.

    :param divergence: the function above that compares two of a kind
    :param per_state: tensors of shape (batch, ...)
    :param shared: tensors that are the same in every state
    """

    divergence: Callable[..., th.Tensor]
    per_state: tuple[th.Tensor, ...]
    shared: tuple[th.Tensor, ...] = ()


@singledispatch
def parameters_of(distribution: Distribution) -> ActionParameters:
    """
    The parameters that SB3's mutable distribution object holds right now, with their gradient.

    gSDE and squashed policies are compared before the squashing: a bijection does not change the divergence. For a
    distribution class of one's own see :func:`register_divergence`.

    :param distribution: what ``policy.get_distribution(obs)`` returned
    :return: the parameters in each state of the batch
    :raises UnknownDivergenceError: for a distribution whose divergence is not known in closed form
    """
    inner = getattr(distribution, "distribution", None)  # sb3-contrib's masked ones keep their parts elsewhere
    parts = inner if isinstance(inner, Sequence) else [inner]
    choices = tuple(part.logits for part in parts if isinstance(part, Categorical))
    if len(choices) == len(parts):
        return ActionParameters(kl_categorical, choices)
    if isinstance(inner, Normal):
        return ActionParameters(kl_diagonal_gaussian, (inner.loc, inner.scale))
    if isinstance(inner, MultivariateNormal):
        # As torch's own divergence does: `scale_tril` would repeat one matrix for every state
        factor = inner._unbroadcasted_scale_tril
        shared = factor.dim() == 2
        return ActionParameters(kl_gaussian, (inner.loc,) if shared else (inner.loc, factor), (factor,) if shared else ())
    if isinstance(inner, Bernoulli):
        return ActionParameters(kl_bernoulli, (inner.logits,))
    raise UnknownDivergenceError(
        f"no closed-form KL divergence is known for the policy's action distribution, {type(distribution).__name__}; "
        "`sb3_ppo_penalty.register_divergence` makes one known"
    )


def register_divergence(
    distribution_class: type[AnyDistribution],
    parameters: Callable[[AnyDistribution], Iterable[th.Tensor]],
    divergence: Callable[..., th.Tensor],
) -> None:
    """
    Make the exact KL divergence of a distribution class known to ``PPOPenalty``, its guard and the log.

    To be called once, best beside the class's definition, before a model with such a policy is made or loaded. Subclasses
    are covered too, and a later call replaces an earlier one. For a policy of Beta distributions::

        register_divergence(
            BetaDistribution,
            lambda beta: (beta.distribution.concentration1, beta.distribution.concentration0),
            lambda a, b, new_a, new_b: kl.kl_divergence(Beta(a, b), Beta(new_a, new_b)).sum(dim=-1),
        )

    :param distribution_class: of what the policy's ``_get_action_dist_from_latent`` and ``get_distribution`` return
    :param parameters: takes such a distribution and returns the tensors that define it, with their gradient, each of shape
        (batch, ...)
    :param divergence: takes the old distribution's tensors, then the new one's, and returns KL(old || new), shape (batch,),
        in nats, summed over the action's dimensions. Differentiable; asked for a distribution and itself it is 0
    :return: nothing
    :raises ArgumentError: naming the argument, if the first is no class or one of the others cannot be called
    """
    require(isinstance(distribution_class, type), "distribution_class", distribution_class, "a class")
    require(callable(parameters), "parameters", parameters, "a function")
    require(callable(divergence), "divergence", divergence, "a function")

    def frozen(distribution: AnyDistribution) -> ActionParameters:
        tensors = tuple(parameters(distribution))
        rows = {len(tensor) for tensor in tensors}
        if len(rows) != 1:
            raise ValueError(f"`parameters` must return tensors with a row for each state, got {[*rows]} rows")
        return ActionParameters(divergence, tensors)

    parameters_of.register(distribution_class, frozen)


def collect_rows(parts: Iterable[Sequence[th.Tensor]], rows: int) -> tuple[th.Tensor, ...]:
    """
    Join what is worked out batch by batch, each batch put in its place at once: small results that were kept from between
    the large tensors of the passes would hold memory together that the allocator could give back.

    :param parts: of each batch the same kinds of tensors, of shape (batch, ...)
    :param rows: of all batches together
    :return: one tensor of each kind, of shape (rows, ...), that no gradient reaches
    :raises ValueError: if the batches have another number of rows, or differ in what they hold
    """
    columns: tuple[th.Tensor, ...] = ()
    start = 0
    for part in parts:
        end = start + len(part[0])
        columns = columns or tuple(values.new_empty((rows, *values.shape[1:])) for values in part)
        if end > rows:
            break
        for column, values in zip(columns, part, strict=True):
            column[start:end] = values.detach()
        start = end
    if start != rows:
        raise ValueError(f"the batches should have {rows} rows together")
    return columns


def concatenate(parts: Iterable[ActionParameters], rows: int) -> ActionParameters:
    """
    Join the parameters of several batches of states of one policy, as a copy that no gradient reaches.

    :param parts: at least one batch
    :param rows: number of states in all batches
    :return: detached parameters of all states in order; shared ones that do not learn are kept as they are
    :raises ValueError: if the batches have another number of states, or are of different kinds
    """
    batches = iter(parts)
    first = next(batches)
    per_state = collect_rows((part.per_state for part in chain([first], batches)), rows)
    shared = tuple(tensor.detach().clone() if tensor.requires_grad else tensor for tensor in first.shared)
    return first._replace(per_state=per_state, shared=shared)


def _name(divergence: Callable[..., Any]) -> str:
    """
    :param divergence: compares two distributions of a kind
    :return: what that kind is called
    """
    # An instance and a partial have no name of their own
    name: str = getattr(divergence, "__name__", type(divergence).__name__)
    return name.removeprefix("kl_")


def kl_divergence(old: ActionParameters, new: ActionParameters) -> th.Tensor:
    """
    KL(old || new) in every state, summed over action dimensions (the paper, equation 8; the document's section 4.2).

    :param old: the policy that acted
    :param new: the policy being trained, in the same states
    :return: shape (batch,), in nats
    :raises ValueError: if the two are not of the same kind
    """
    kinds = [(_name(part.divergence), len(part.per_state) + len(part.shared)) for part in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"cannot compare {kinds[0][0]} of {kinds[0][1]} tensors with {kinds[1][0]} of {kinds[1][1]}")
    return old.divergence(*old.per_state, *old.shared, *new.per_state, *new.shared)


#: Which divergence a direction stands for
DIRECTIONS: dict[str, Callable[[ActionParameters, ActionParameters], th.Tensor]] = {
    "old_new": kl_divergence,
    "new_old": lambda old, new: kl_divergence(new, old),
    "symmetric": lambda old, new: 0.5 * (kl_divergence(old, new) + kl_divergence(new, old)),
}


def directed_divergence(old: ActionParameters, new: ActionParameters, direction: str) -> th.Tensor:
    """
    The divergence in every state, one way, the other way, or both.

    ``"old_new"`` is KL(old || new), the document's and the paper's: it is large where the new policy no longer does what the
    old one did. ``"new_old"`` is KL(new || old): it is large where the new policy does what the old one hardly ever did
    (modular_rl's ``reverse_kl``; mirror descent, https://arxiv.org/abs/2005.09814). ``"symmetric"`` is the mean of the two,
    half of Jeffreys' divergence (their sum): for small steps all three agree, and a coefficient or a target means the same.

    :param old: the policy that acted
    :param new: the policy being trained, in the same states
    :param direction: a name of :data:`DIRECTIONS`
    :return: shape (batch,), in nats
    :raises ValueError: if the two are not of the same kind
    """
    return DIRECTIONS[direction](old, new)
