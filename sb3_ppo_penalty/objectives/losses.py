"""
The objectives of PPO, as pure functions of tensors.

Symbols: ``r`` is the importance ratio pi(a|s) / pi_old(a|s), ``A`` the advantage, ``eps`` the clip range.
The article and the paper are named in :mod:`sb3_ppo_penalty.objectives`.
"""

from collections.abc import Callable

import torch as th
from torch.nn import functional

#: Clip range that the clip fraction is measured against if nothing is clipped: PPO's usual one (the article, section 4.2 (2))
REFERENCE_CLIP_RANGE = 0.2


def _clip(values: th.Tensor, lowest: float | th.Tensor, highest: float | th.Tensor) -> th.Tensor:
    """
    Clip a tensor to limits that are both numbers or both scalar tensors, which torch allows but does not declare.

    :param values: tensor of any shape
    :param lowest: lower limit
    :param highest: upper limit, at least ``lowest``
    :return: clipped tensor, same shape
    """
    return th.clamp(values, lowest, highest)  # type: ignore[arg-type]


def normalize_advantages(advantages: th.Tensor) -> th.Tensor:
    """
    Shift and scale the advantages to mean 0 and standard deviation 1.

    ``(A - mean(A)) / (std(A) + 1e-8)``, as SB3 does. The standard deviation is the sample's (n - 1 in the denominator). A
    single advantage has none and is returned unchanged.

    :param advantages: advantages of the minibatch, shape (batch,)
    :return: normalised advantages, shape (batch,), no unit
    """
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def importance_ratio(log_prob: th.Tensor, old_log_prob: th.Tensor | float) -> th.Tensor:
    """
    Return the weight of each action that turns an average over the old policy into one over the new policy.

    ``r = exp(log pi(a|s) - log pi_old(a|s))``. Source: the article, section 3 (importance sampling).

    :param log_prob: log-probability (density) of each action under the policy being trained, shape (batch,)
    :param old_log_prob: log-probability of each action under the policy that acted, shape (batch,); 0 if ``log_prob`` is
        already the difference
    :return: importance ratios, shape (batch,), no unit
    """
    return th.exp(log_prob - old_log_prob)


def surrogate(ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    Estimate the policy's objective without a trust region, to be maximised: ``J = mean(r * A)``.

    Source: the article, section 4.2 (1), second line of its formula; the paper, equation 6.

    :param ratio: importance ratios, shape (batch,)
    :param advantages: advantages of the minibatch, shape (batch,)
    :return: scalar, in the unit of the advantages
    """
    return (advantages * ratio).mean()


def clipped_surrogate(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    Return the objective of PPO-clip, to be maximised: ``J = mean(min(r * A, clip(r, 1 - eps, 1 + eps) * A))``.

    Source: the article, section 4.2 (2); the paper, equation 7.

    :param ratio: importance ratios, shape (batch,)
    :param advantages: advantages of the minibatch, shape (batch,)
    :param clip_range: eps, distance of the ratio from 1 beyond which moving it further gains nothing
    :return: scalar, in the unit of the advantages
    """
    clipped = _clip(ratio, 1 - clip_range, 1 + clip_range)
    return th.min(advantages * ratio, advantages * clipped).mean()


def truncate_ratio(ratio: th.Tensor, advantages: th.Tensor, max_ratio: float) -> th.Tensor:
    """
    Keep a few large ratios from dominating the surrogate.

    ``min(r, c)`` if ``A > 0``, else ``rho(r)``, which is r up to c and ``c (1 + log(r / c))`` beyond. The gradient of rho is
    ``min(r, c)`` times that of ``log pi``: the truncated importance weight of V-trace and ACER (Espeholt et al. 2018,
    https://arxiv.org/abs/1802.01561; Wang et al. 2017, https://arxiv.org/abs/1611.01224). So no state weighs more than
    ``c * |A|``. As with the clip, the sign of the advantage matters. A better action that is already c times as likely gets no
    gradient: with a weight of c every epoch would drive it further from the data. A worse one is still pushed back;
    ``min(r, c)`` for both signs (https://arxiv.org/abs/1912.09729) would leave that to the penalty alone.

    :param ratio: importance ratios, shape (batch,)
    :param advantages: advantages of the minibatch, shape (batch,)
    :param max_ratio: c, the largest ratio that is not changed, above 1
    :return: truncated ratios, shape (batch,), no unit
    """
    beyond = max_ratio * (1 + th.log(ratio.clamp(min=max_ratio) / max_ratio))
    return th.where(ratio <= max_ratio, ratio, th.where(advantages > 0, max_ratio, beyond))


def penalized_surrogate(objective: th.Tensor, kl: th.Tensor, kl_coef: float | th.Tensor) -> th.Tensor:
    """
    Return the objective of PPO-penalty, to be maximised: ``J - beta * mean(KL(old || new))``.

    Source: the article, section 4.2 (1); the paper, equation 8.

    :param objective: :func:`surrogate`, or :func:`clipped_surrogate` to penalise in addition to the clip; scalar
    :param kl: divergence in each state, shape (batch,), in nats
    :param kl_coef: beta, in the unit of the objective per nat
    :return: scalar, in the unit of the objective
    """
    return objective - kl_coef * kl.mean()


def squared_ratio_deviation(ratio: th.Tensor) -> th.Tensor:
    """
    Estimate KL(old || new) in a state from the one action taken there: ``(r - 1)^2 / 2``.

    Its mean over the old policy's actions is half the chi-squared divergence, which agrees with the KL to second order.
    The penalised surrogate is concave in r: ``r A - b |A| (r - 1)^2 / 2`` is largest at ``r = 1 + sign(A) / b``, for every
    action and every size of its advantage (Xie et al. 2024, https://arxiv.org/abs/2401.16025).

    :param ratio: importance ratios of actions drawn from the old policy, shape (batch,)
    :return: estimated divergence in each state, shape (batch,), in nats
    """
    return 0.5 * (ratio - 1).square()


#: Multiple of the target divergence beyond which the quadratic cutoff is positive; modular_rl's value
CUTOFF_MULTIPLE = 2.0


def quadratic_cutoff(kl: th.Tensor, target_kl: float | th.Tensor, per_state: bool) -> th.Tensor:
    """
    Return a quadratic penalty on the KL beyond twice the target; exactly 0 below.

    ``max(0, mean(KL) - 2 d)^2``, or per state ``mean(max(0, KL_s - 2 d)^2)``. The first does not notice a single state that
    moves far while the others stay. Source: J. Schulman, modular_rl, https://github.com/joschu/modular_rl (``ppo.py``, with
    the minibatch's mean and a coefficient of 1000).

    :param kl: divergence in each state, shape (batch,), in nats
    :param target_kl: d, the divergence aimed at, in nats
    :param per_state: whether to penalise each state separately instead of the mean
    :return: scalar, in squared nats
    """
    excess = (kl if per_state else kl.mean()) - CUTOFF_MULTIPLE * target_kl
    return th.relu(excess).square().mean()


def mean_square(returns: th.Tensor, values: th.Tensor) -> th.Tensor:
    """
    Return ``mean((R - V)^2)`` as ``RecurrentPPO`` works it out: the gradient is rounded otherwise than ``mse_loss`` rounds it.

    :param returns: targets of the prediction, shape (batch,)
    :param values: predicted values of the states, shape (batch,)
    :return: scalar, in the squared unit of the returns
    """
    return ((returns - values) ** 2).mean()


def value_loss(
    values: th.Tensor,
    returns: th.Tensor,
    old_values: th.Tensor,
    clip_range_vf: float | th.Tensor | None = None,
    squared_error: Callable[[th.Tensor, th.Tensor], th.Tensor] = functional.mse_loss,
) -> th.Tensor:
    """
    Return the mean squared error of the critic: ``mean((R - V)^2)``.

    With ``clip_range_vf``, ``V`` is ``V_old + clip(V - V_old, -clip_range_vf, clip_range_vf)``, as in SB3.

    :param values: predicted values of the states, shape (batch,)
    :param returns: targets of the prediction, shape (batch,)
    :param old_values: values predicted when the actions were taken, shape (batch,)
    :param clip_range_vf: largest change of a prediction that still counts, in the unit of the returns; None for no clipping
    :param squared_error: of targets and predictions; their mean is taken already
    :return: scalar, in the squared unit of the returns
    """
    if clip_range_vf is not None:
        values = old_values + _clip(values - old_values, -clip_range_vf, clip_range_vf)
    return squared_error(returns, values)


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    Return the negative mean entropy of the policy, see :func:`state_entropy`.

    :param entropy: entropy in each state, shape (batch,), in nats; None if it has no closed form (squashed Gaussians)
    :param log_prob: log-probability of the actions taken, shape (batch,)
    :return: scalar, in nats
    """
    return -th.mean(state_entropy(entropy, log_prob))


def state_entropy(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    Return the entropy of the policy in each state, or if it has no closed form its estimate ``-log pi(a|s)``.

    :param entropy: entropy in each state, shape (batch,), in nats; None if it has no closed form (squashed Gaussians)
    :param log_prob: log-probability of the actions taken, shape (batch,)
    :return: entropy in each state, shape (batch,), in nats
    """
    return -log_prob if entropy is None else entropy


def clip_fraction(ratio: th.Tensor, clip_range: float | None) -> th.Tensor:
    """
    Return the share of samples whose ratio left the clip range: ``mean(|r - 1| > eps)``.

    :param ratio: importance ratios, shape (batch,)
    :param clip_range: eps; None if nothing is clipped, which counts with :data:`REFERENCE_CLIP_RANGE`
    :return: scalar between 0 and 1
    """
    limit = REFERENCE_CLIP_RANGE if clip_range is None else clip_range
    return th.mean((th.abs(ratio - 1) > limit).float())
