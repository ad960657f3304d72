"""Statistics over a few seeds, computed by SciPy and named as in Agarwal et al. 2021 (arXiv 2108.13264)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid  # type: ignore[import-untyped]
from scipy.stats import bootstrap, mannwhitneyu, trim_mean  # type: ignore[import-untyped]

Array = npt.NDArray[np.float64]

#: Number of bootstrap resamples of the seeds behind every interval
RESAMPLES = 5000
CONFIDENCE = 0.95
#: Fewest seeds that get an interval: one seed has no spread, and the interval of two would be the two values
MIN_SEEDS = 3


class Interval(NamedTuple):
    """
    The ends of a confidence interval.

    :param low: lower end; NaN where a sample has fewer than :data:`MIN_SEEDS`
    :param high: upper end
    """

    low: Any
    high: Any


def iqm(values: npt.ArrayLike, axis: int = -1) -> Any:
    """
    Compute the interquartile mean: the mean without the lowest and the highest quarter (each rounded down).

    :param values: one number for each seed along ``axis``
    :param axis: axis of the seeds
    :return: in the unit of the values
    """
    return trim_mean(values, 0.25, axis=axis)


def iqm_interval(values: npt.ArrayLike, axis: int = -1) -> Interval:
    """
    Compute the 95 % percentile bootstrap interval of the IQM over seeds.

    :param values: one number for each seed along ``axis``
    :param axis: axis of the seeds
    :return: in the unit of the values
    """
    return _interval(iqm, np.asarray(values, dtype=np.float64), axis=axis)


def probability_of_improvement(values: npt.ArrayLike, baseline: npt.ArrayLike, axis: int = -1) -> Any:
    """
    Estimate how probable it is that a run beats a run of the baseline; a tie counts half.

    ``U / (n m)`` with the statistic ``U`` of Mann and Whitney.

    :param values: one number for each seed along ``axis``
    :param baseline: the same for the baseline, which may have another number of seeds
    :param axis: axis of the seeds
    :return: between 0 and 1
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    # The p-value is not used, and "asymptotic" is its cheapest method
    return mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / (x.shape[axis] * y.shape[axis])


def improvement_interval(values: npt.ArrayLike, baseline: npt.ArrayLike) -> Interval:
    """
    Compute the 95 % percentile bootstrap interval of the probability of improvement.

    :param values: one number for each seed, shape (seeds,)
    :param baseline: one number for each seed of the baseline, shape (seeds of the baseline,)
    :return: between 0 and 1
    """
    samples = (np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64))
    return _interval(probability_of_improvement, *samples)


def _interval(statistic: Callable[..., Any], *samples: Array, axis: int = -1) -> Interval:
    """
    Compute the 95 % percentile bootstrap interval of a statistic.

    :param statistic: function of the samples and ``axis``
    :param samples: samples, resampled independently of each other
    :param axis: axis of the seeds
    :return: NaN at both ends if a sample has fewer than :data:`MIN_SEEDS`
    """
    if min(sample.shape[axis] for sample in samples) < MIN_SEEDS:
        unknown = np.full_like(statistic(*samples, axis=axis), np.nan)[()]
        return Interval(unknown, unknown)
    generator = np.random.default_rng(0)
    method = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", "rng": generator}
    return Interval(*bootstrap(samples, statistic, axis=axis, vectorized=True, **method).confidence_interval)


def steps_to_threshold(steps: npt.ArrayLike, returns: npt.ArrayLike, threshold: float) -> float:
    """
    Find the environment steps after which a learning curve first reaches a threshold.

    :param steps: environment steps of the evaluations, ascending, shape (evaluations,)
    :param returns: mean return of each evaluation, shape (evaluations,)
    :param threshold: return to reach
    :return: environment steps of the first evaluation that reaches it; infinity if none does
    """
    reached = np.asarray(returns) >= threshold
    return float(np.asarray(steps)[reached.argmax()]) if reached.any() else float("inf")


def mean_over_training(steps: npt.ArrayLike, returns: npt.ArrayLike, until: float) -> float:
    """
    Average the return over training: the area under the learning curve divided by its length.

    :param steps: environment steps of the evaluations, ascending, shape (evaluations,)
    :param returns: mean return of each evaluation, shape (evaluations,)
    :param until: environment steps at which the area ends, interpolated between two evaluations, so that runs whose last
        evaluations differ by some steps are compared over the same part of training; a shorter curve ends where it ends
    :return: in the unit of the returns
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(returns, dtype=np.float64)
    end = min(until, x[-1])
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(trapezoid(y, x) / (end - x[0]))
