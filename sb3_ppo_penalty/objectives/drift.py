"""How far an update moved the policy, and how far importance sampling can be trusted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch as th

from sb3_ppo_penalty.objectives.losses import importance_ratio


def k3_estimate(log_ratio: th.Tensor) -> th.Tensor:
    """
    Estimate KL(old || new) from the actions taken, without bias and never below 0: ``mean((r - 1) - log r)``.

    Source: J. Schulman, http://joschu.net/blog/kl-approx.html (k3); it is SB3's ``approx_kl``.

    :param log_ratio: log r for actions drawn from the old policy, shape (batch,)
    :return: scalar, in nats
    """
    return th.mean((importance_ratio(log_ratio, 0.0) - 1) - log_ratio)


def effective_sample_size(log_ratio: th.Tensor) -> th.Tensor:
    """
    Say how many equally weighted samples the weighted ones are worth, as a fraction: ``(sum r)^2 / (n * sum r^2)``.

    1 when every ratio is equal, 1/n when one sample outweighs all others: what goes wrong when the two policies drift
    apart (the article, section 3). Source: Kish 1965. Computed from log-ratios, so that no square overflows.

    :param log_ratio: log r, shape (batch,)
    :return: scalar between 1/n and 1
    """
    exact = log_ratio.double()
    return _effective_fraction(exact.logsumexp(0), (2 * exact).logsumexp(0), len(log_ratio))


def _effective_fraction(log_sum: th.Tensor, log_square_sum: th.Tensor, count: int) -> th.Tensor:
    """
    Work out the effective sample size from sums.

    :param log_sum: log of the sum of the ratios, scalar
    :param log_square_sum: log of the sum of their squares, scalar
    :param count: number of ratios
    :return: scalar between 1/n and 1
    """
    return (2 * log_sum - log_square_sum).exp() / count


class Drift(NamedTuple):
    """
    How far an update moved the policy, measured over the whole rollout after the last epoch.

    The exact figures are None for a policy whose action distribution has no known divergence.

    :param kl: mean over states of the exact KL(old || new), in nats
    :param kl_estimate: the same, estimated from the actions taken (k3), in nats
    :param effective_sample_size: of the importance weights, as a fraction
    :param max_ratio: the largest importance weight
    :param kl_max_state: the largest KL(old || new) of a state, in nats
    :param kl_p99: the KL(old || new) that 99 % of the states do not exceed, in nats
    """

    kl: float | None
    kl_estimate: float
    effective_sample_size: float
    max_ratio: float
    kl_max_state: float | None
    kl_p99: float | None


class DriftPart(NamedTuple):
    """
    The drift over some of the transitions, in a form that can be joined with that over others.

    :param size: number of transitions
    :param kl_sum: sum of the states' exact KL(old || new), in nats; None where it is not known
    :param largest_kl: the largest of them, falling, shape (largest,); None where they are not known
    :param sampled: sum of the k3 terms, log of the sum of the ratios, of the sum of their squares, and of the largest one,
        float64, shape (4,)
    """

    size: int
    kl_sum: float | None
    largest_kl: th.Tensor | None
    sampled: th.Tensor

    @classmethod
    def of(cls, kl: th.Tensor | None, log_ratio: th.Tensor, total: int) -> "DriftPart":
        """
        Measure a part of the transitions.

        :param kl: exact KL(old || new) of each state, in nats, shape (n_transitions,); None where it is not known
        :param log_ratio: log r, shape (n_transitions,)
        :param total: number of transitions in all parts
        """
        log_ratio, count = log_ratio.double(), len(log_ratio)
        sums = log_ratio.logsumexp(0), (2 * log_ratio).logsumexp(0)
        sampled = th.stack([k3_estimate(log_ratio) * count, *sums, log_ratio.max()]).cpu()
        if kl is None:
            return cls(count, None, None, sampled)
        largest = kl.topk(min(count_above_p99(total), count)).values.cpu()
        return cls(count, kl.double().sum().item(), largest, sampled)


def count_above_p99(count: int) -> int:
    """
    Say how many of the largest values there are from the 99th percentile on, which is one of the values.

    :param count: number of values
    :return: the percentile's place among them in falling order, from 1
    """
    return count - math.ceil(0.99 * count) + 1


def joined_drift(parts: Sequence[DriftPart]) -> Drift:
    """
    Join the measures of the parts of a rollout.

    :param parts: all of them
    :return: the drift over the whole rollout
    """
    count = sum(part.size for part in parts)
    k3, log_sums, log_square_sums, largest = th.stack([part.sampled for part in parts]).unbind(1)
    effective = _effective_fraction(log_sums.logsumexp(0), log_square_sums.logsumexp(0), count).item()
    sampled = k3.sum().item() / count, effective, importance_ratio(largest.max(), 0.0).item()
    sums = [part.kl_sum for part in parts if part.kl_sum is not None]
    if not sums:
        return Drift(None, *sampled, None, None)
    falling = th.cat([part.largest_kl for part in parts if part.largest_kl is not None]).sort(descending=True).values
    return Drift(sum(sums) / count, *sampled, falling[0].item(), falling[count_above_p99(count) - 1].item())
