"""
Exact Kullback-Leibler divergence between two action distributions, one number per state, in nats.

SB3's own ``kl_divergence`` returns one column per action dimension for Gaussians and Bernoullis, so that its mean is too
small by the number of dimensions, and is infinite for categoricals whose probability underflows
(https://github.com/ray-project/ray/issues/21297). Here the divergence in a state is one finite number.

:func:`parameters_of` takes the parameters out of a distribution, :func:`kl_divergence` compares two sets of them, and
:func:`register_divergence` adds another class of distributions. The article and the paper are named in
:mod:`sb3_ppo_penalty.objectives`.
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
    """The KL divergence of a policy's action distribution is not known in closed form."""


def _scale_term(change: th.Tensor) -> th.Tensor:
    """
    Return the part of a Gaussian's divergence that is due to its change of scale.

    ``e + e^2 / 2 - log(1 + e)``, which is exactly 0 at ``e = 0`` and accurate around it.

    :param change: e = old scale / new scale - 1, any shape
    :return: part of the divergence, same shape, in nats
    """
    return change + 0.5 * change.square() - th.log1p(change)


def kl_diagonal_gaussian(mean: th.Tensor, std: th.Tensor, new_mean: th.Tensor, new_std: th.Tensor) -> th.Tensor:
    """
    Return the divergence between Gaussians with diagonal covariance.

    ``sum_i log(s'_i / s_i) + (s_i^2 + (m_i - m'_i)^2) / (2 s'_i^2) - 1/2``, primes for the new distribution.

    :param mean: old means, shape (batch, action_dim)
    :param std: old standard deviations, shape (batch, action_dim)
    :param new_mean: new means, shape (batch, action_dim)
    :param new_std: new standard deviations, shape (batch, action_dim)
    :return: KL(old || new), shape (batch,), in nats
    """
    shift = (mean - new_mean) / new_std
    spread = _scale_term((std - new_std) / new_std)
    return (spread + 0.5 * shift.square()).sum(dim=-1)


def kl_gaussian(mean: th.Tensor, scale_tril: th.Tensor, new_mean: th.Tensor, new_scale_tril: th.Tensor) -> th.Tensor:
    """
    Return the divergence between Gaussians with full covariance, from the Cholesky factors ``S = L L^T``.

    ``(tr(S'^-1 S) - d + (m' - m)^T S'^-1 (m' - m) + log(det S' / det S)) / 2``, primes for the new distribution. Computed from
    ``E = L'^-1 (L - L')``, which is 0 for equal covariances, because ``tr(S'^-1 S) - d`` would lose digits.

    :param mean: old means, shape (batch, action_dim)
    :param scale_tril: old L, shape (action_dim, action_dim) or (batch, action_dim, action_dim)
    :param new_mean: new means, shape (batch, action_dim)
    :param new_scale_tril: new L, shape like ``scale_tril``
    :return: KL(old || new), shape (batch,), in nats
    """
    change: th.Tensor = th.linalg.solve_triangular(new_scale_tril, scale_tril - new_scale_tril, upper=False)
    diagonal = change.diagonal(dim1=-2, dim2=-1)
    spread = (diagonal - th.log1p(diagonal)).sum(dim=-1) + 0.5 * change.square().sum(dim=(-2, -1))
    # One matrix for all states is solved once, with a right-hand side per state; otherwise each state has a matrix of its own
    difference = (mean - new_mean).mT if new_scale_tril.dim() == 2 else (mean - new_mean).unsqueeze(-1)
    shift: th.Tensor = th.linalg.solve_triangular(new_scale_tril, difference, upper=False)
    return spread + 0.5 * shift.square().sum(dim=-2).reshape(len(mean))


def kl_fixed_diagonal(
    mean: th.Tensor, std: th.Tensor, whitening: th.Tensor, new_mean: th.Tensor, new_std: th.Tensor, new_whitening: th.Tensor
) -> th.Tensor:
    """
    Return :func:`kl_diagonal_gaussian` for standard deviations that all states share, from known inverses.

    If the covariance did not change (both are the same tensor), only ``sum_i ((m_i - m'_i) / s_i)^2 / 2`` is computed.

    :param mean: old means, shape (batch, action_dim)
    :param std: old standard deviations, shape (action_dim,)
    :param whitening: ``1 / std``, shape (action_dim,)
    :param new_mean: new means, shape (batch, action_dim)
    :param new_std: new standard deviations, shape (action_dim,)
    :param new_whitening: ``1 / new_std``, shape (action_dim,)
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
    Return :func:`kl_gaussian` for a covariance that all states share, from known inverses.

    If the covariance did not change (both are the same tensor), only ``|L^-1 (m - m')|^2 / 2`` is computed.

    :param mean: old means, shape (batch, action_dim)
    :param factor: old lower Cholesky factor L, shape (action_dim, action_dim)
    :param whitening: inverse of ``factor``, shape (action_dim, action_dim)
    :param new_mean: new means, shape (batch, action_dim)
    :param new_factor: new lower Cholesky factor, shape (action_dim, action_dim)
    :param new_whitening: inverse of ``new_factor``, shape (action_dim, action_dim)
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
    Return the divergence between independent categorical distributions, one per action dimension.

    ``sum_i sum_a p_i(a) (log p_i(a) - log p'_i(a))``, from log-softmax. An action that the old policy never takes adds 0, even
    if its log-probability is minus infinity.

    :param logits: old logits of every action dimension, then the new ones; shapes (batch, number of choices)
    :return: KL(old || new), shape (batch,), in nats
    """
    count = len(logits) // 2
    terms = []
    for old, new in zip(logits[:count], logits[count:], strict=True):
        log_p, new_log_p = th.log_softmax(old, dim=-1), th.log_softmax(new, dim=-1)
        p = log_p.exp()
        # The difference of two infinities is replaced before it is multiplied: a factor of 0 would not remove its NaN gradient
        terms.append((p * th.where(p > 0, log_p - new_log_p, 0.0)).sum(dim=-1))
    return th.stack(terms).sum(dim=0)


def kl_bernoulli(logits: th.Tensor, new_logits: th.Tensor) -> th.Tensor:
    """
    Return the divergence between independent Bernoulli distributions, one per bit of the action.

    ``sum_i p_i log(p_i / p'_i) + (1 - p_i) log((1 - p_i) / (1 - p'_i))``, from log-sigmoid.

    :param logits: old logits, shape (batch, bits)
    :param new_logits: new logits, shape (batch, bits)
    :return: KL(old || new), shape (batch,), in nats
    """
    one = th.sigmoid(logits) * (logsigmoid(logits) - logsigmoid(new_logits))
    zero = th.sigmoid(-logits) * (logsigmoid(-logits) - logsigmoid(-new_logits))
    return (one + zero).sum(dim=-1)


class ActionParameters(NamedTuple):
    """
    Parameters of the action distributions in a batch of states: tensors only, no reference to the policy.

    :param divergence: function that takes the tensors of two such sets and returns their divergence, shape (batch,), in nats
    :param per_state: tensors with a row for each state, shape (batch, ...)
    :param shared: tensors that all states share
    """

    divergence: Callable[..., th.Tensor]
    per_state: tuple[th.Tensor, ...]
    shared: tuple[th.Tensor, ...] = ()


@singledispatch
def parameters_of(distribution: Distribution) -> ActionParameters:
    """
    Take the parameters out of SB3's distribution object, which its next use overwrites; gradients flow through them.

    gSDE and squashed policies are compared before the squashing: a bijection does not change the divergence. Other classes
    are added by :func:`register_divergence`.

    :param distribution: result of ``policy.get_distribution(obs)``
    :return: parameters of the distributions in the batch of states
    :raises UnknownDivergenceError: for a distribution whose divergence is not known in closed form
    """
    inner = getattr(distribution, "distribution", None)  # sb3-contrib's masked distributions have another attribute
    parts = inner if isinstance(inner, Sequence) else [inner]
    choices = tuple(part.logits for part in parts if isinstance(part, Categorical))
    if len(choices) == len(parts):
        return ActionParameters(kl_categorical, choices)
    if isinstance(inner, Normal):
        return ActionParameters(kl_diagonal_gaussian, (inner.loc, inner.scale))
    if isinstance(inner, MultivariateNormal):
        # The public `scale_tril` repeats a shared matrix for every state; torch's own divergence reads this one too
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
    Add a class of distributions with its exact KL divergence, for ``PPOPenalty``, its guard and the log.

    Call it once, best beside the definition of the class, before a model with such a policy is made or loaded. It covers
    subclasses too, and a later call replaces an earlier one. For a policy of Beta distributions::

        register_divergence(
            BetaDistribution,
            lambda beta: (beta.distribution.concentration1, beta.distribution.concentration0),
            lambda a, b, new_a, new_b: kl.kl_divergence(Beta(a, b), Beta(new_a, new_b)).sum(dim=-1),
        )

    :param distribution_class: class of the distributions that the policy's ``_get_action_dist_from_latent`` and
        ``get_distribution`` return
    :param parameters: function that takes such a distribution and returns its parameters, not detached, each a tensor of
        shape (batch, ...)
    :param divergence: function that takes the old distribution's parameters, then the new one's, and returns
        KL(old || new), shape (batch,), in nats, summed over action dimensions; differentiable, and 0 for equal distributions
    :return: nothing
    :raises ArgumentError: if the first is no class or one of the others is no function; names the argument
    """
    require(isinstance(distribution_class, type), "distribution_class", distribution_class, "a class")
    require(callable(parameters), "parameters", parameters, "a function")
    require(callable(divergence), "divergence", divergence, "a function")

    def read(distribution: AnyDistribution) -> ActionParameters:
        """Read the parameters and check that they have a row for each state."""
        tensors = tuple(parameters(distribution))
        rows = {len(tensor) for tensor in tensors}
        if len(rows) != 1:
            raise ValueError(f"`parameters` must return tensors with a row for each state, got {[*rows]} rows")
        return ActionParameters(divergence, tensors)

    parameters_of.register(distribution_class, read)


def collect_rows(parts: Iterable[Sequence[th.Tensor]], rows: int) -> tuple[th.Tensor, ...]:
    """
    Join tensors that are computed batch by batch into detached tensors of all rows.

    Each batch is copied into place at once. Kept until the end, the small results would lie between the large temporary
    tensors of the passes and fragment the allocator's memory.

    :param parts: for each batch the same number of tensors, of shape (batch, ...)
    :param rows: number of rows in all batches together
    :return: the joined tensors, of shape (rows, ...)
    :raises ValueError: if the batches have another number of rows, or different numbers of tensors
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
    Join the parameters of one policy's distributions in several batches of states, as a detached copy.

    :param parts: parameters of at least one batch
    :param rows: number of states in all batches together
    :return: parameters of all states, in order; shared tensors that do not learn are not copied
    :raises ValueError: if the batches have another number of states, or are of different kinds
    """
    batches = iter(parts)
    first = next(batches)
    per_state = collect_rows((part.per_state for part in chain([first], batches)), rows)
    shared = tuple(tensor.detach().clone() if tensor.requires_grad else tensor for tensor in first.shared)
    return first._replace(per_state=per_state, shared=shared)


def _name(divergence: Callable[..., Any]) -> str:
    """
    Return the name of a kind of distributions, for error messages.

    :param divergence: function that compares two distributions of the kind
    :return: name without the prefix ``kl_``
    """
    # Instances of classes and partials have no `__name__`
    name: str = getattr(divergence, "__name__", type(divergence).__name__)
    return name.removeprefix("kl_")


def kl_divergence(old: ActionParameters, new: ActionParameters) -> th.Tensor:
    """
    Return KL(old || new) in each state, summed over action dimensions.

    Source: the article, section 4.2; the paper, equation 8.

    :param old: action distributions of the policy that acted
    :param new: action distributions of the policy being trained, in the same states
    :return: divergence in each state, shape (batch,), in nats
    :raises ValueError: if the two are not of the same kind
    """
    kinds = [(_name(part.divergence), len(part.per_state) + len(part.shared)) for part in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"cannot compare {kinds[0][0]} of {kinds[0][1]} tensors with {kinds[1][0]} of {kinds[1][1]}")
    return old.divergence(*old.per_state, *old.shared, *new.per_state, *new.shared)


#: Names of the directions, and the divergence of each
DIRECTIONS: dict[str, Callable[[ActionParameters, ActionParameters], th.Tensor]] = {
    "old_new": kl_divergence,
    "new_old": lambda old, new: kl_divergence(new, old),
    "symmetric": lambda old, new: 0.5 * (kl_divergence(old, new) + kl_divergence(new, old)),
}


def directed_divergence(old: ActionParameters, new: ActionParameters, direction: str) -> th.Tensor:
    """
    Return KL(old || new), KL(new || old) or their mean in each state.

    ``"old_new"`` is KL(old || new), the article's and the paper's: large if the new policy no longer does what the old one
    did. ``"new_old"`` is KL(new || old): large if the new policy does what the old one hardly ever did (modular_rl's
    ``reverse_kl``; mirror descent, https://arxiv.org/abs/2005.09814). ``"symmetric"`` is their mean (Jeffreys' divergence is
    their sum), so that for small steps all three agree and one coefficient or target suits them all.

    :param old: action distributions of the policy that acted
    :param new: action distributions of the policy being trained, in the same states
    :param direction: name in :data:`DIRECTIONS`
    :return: divergence in each state, shape (batch,), in nats
    :raises ValueError: if the two are not of the same kind
    """
    return DIRECTIONS[direction](old, new)
