"""Running means and variances as SB3's ``RunningMeanStd`` and ``VecNormalize`` compute them, to the bit, in less time."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.running_mean_std import RunningMeanStd

Array = npt.NDArray[Any]
#: Types that numpy sums in their own precision; smaller floats and integers it sums in a wider type
FAST_DTYPES = (np.dtype(np.float64), np.dtype(np.float32))


@lru_cache
def constant_array(value: float) -> Array:
    """
    Turn a number into an array once; numpy calculates twice as fast with it as with a Python number.

    :param value: any number
    :return: shape (), double, read-only
    """
    array = np.array(value, dtype=np.float64)
    array.flags.writeable = False
    return array


def update(statistics: RunningMeanStd, batch: Array) -> None:
    """
    Update the statistics with a batch as ``statistics.update(batch)`` does, by the same floating-point operations.

    :param statistics: running statistics of one element of the batch; changed
    :param batch: new values, shape (n, ...)
    """
    mean, variance = _moments(batch)
    if batch.ndim == 1:
        statistics.update_from_moments(mean, variance, len(batch))
    else:
        _combine(statistics, mean, variance, len(batch))


def update_by_number(statistics: RunningMeanStd, number: float) -> None:
    """
    Update the statistics of a scalar with one number, in Python's floats, which are numpy's doubles.

    :param statistics: running statistics of shape (); changed
    :param number: the new value
    """
    old, mean, total = statistics.count, float(statistics.mean), statistics.count + 1
    delta = number - mean
    second = float(statistics.var) * old + (number - number) + delta * delta * old / total
    statistics.mean = np.float64(mean + delta / total)  # type: ignore[assignment]  # the type that SB3 has after its first update
    statistics.var = np.float64(second / total)  # type: ignore[assignment]
    statistics.count = total


def _moments(batch: Array) -> tuple[Array, Array]:
    """
    Compute mean and variance over the first axis as ``numpy.mean`` and ``numpy.var`` do, without their checks.

    :param batch: values, shape (n, ...)
    :return: mean and variance, shape (...)
    """
    if batch.dtype not in FAST_DTYPES:
        return np.mean(batch, axis=0), np.var(batch, axis=0)
    if len(batch) == 1:
        row = batch[0]
        return row, row - row  # zero, or NaN where the row is not finite
    count = batch.dtype.type(len(batch))
    mean = np.add.reduce(batch, axis=0) / count
    centred = batch - mean
    return mean, np.add.reduce(centred * centred, axis=0) / count


def _combine(statistics: RunningMeanStd, mean: Array, variance: Array, count: int) -> None:
    """
    Merge the moments of a batch into the statistics as ``update_from_moments`` does, reusing arrays.

    :param statistics: running statistics; changed
    :param mean: mean of the batch
    :param variance: variance of the batch
    :param count: number of rows of the batch
    """
    total = statistics.count + count
    old_rows, new_rows = np.array(statistics.count), np.array(total)
    delta = mean - statistics.mean
    second = statistics.var * old_rows
    square = delta * delta
    square *= old_rows
    if count == 1:  # multiplying by one changes nothing
        second += variance
    else:
        second += variance * count
        square *= count
        delta *= count
    square /= new_rows
    second += square
    second /= new_rows
    delta /= new_rows
    delta += statistics.mean
    statistics.mean, statistics.var, statistics.count = delta, second, total


def clip_magnitude(values: Array, limit: float) -> Array:
    """
    Clip to a magnitude as ``numpy.clip`` does.

    :param values: doubles or floats
    :param limit: largest magnitude
    :return: the same shape and type
    """
    return np.minimum(np.maximum(values, constant_array(-limit)), constant_array(limit))
