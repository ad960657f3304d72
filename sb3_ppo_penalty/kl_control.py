"""How the penalty's coefficient follows the measured divergence: plain floats in, plain floats out."""

import math

#: The paper's band around the target, section 4: ``kl_min = target / 1.5``, ``kl_max = 1.5 * target``
PAPER_BAND = 1.5


def kl_thresholds(target_kl: float, kl_min: float | None = None, kl_max: float | None = None) -> tuple[float, float]:
    """
    Between which divergences the coefficient rests: ``target / 1.5`` and ``1.5 * target`` unless given.

    Source: the document, section 4.2 (KL_min, KL_max); the band is the paper's (Schulman et al. 2017, section 4).

    :param target_kl: in nats
    :param kl_min: in nats; None for the paper's
    :param kl_max: in nats; None for the paper's
    :return: ``(kl_min, kl_max)``, in nats
    """
    low = target_kl / PAPER_BAND if kl_min is None else kl_min
    high = target_kl * PAPER_BAND if kl_max is None else kl_max
    return low, high


def next_kl_coef(kl_coef: float, kl: float, kl_min: float, kl_max: float, factor: float) -> float:
    """
    Raise the penalty when the policy moved too far, lower it when it barely moved.

    ``beta * f`` if ``kl > kl_max``, ``beta / f`` if ``kl < kl_min``, else ``beta`` (adaptive KL penalty, the document's
    section 4.2; Schulman et al. 2017, section 4, has ``kl_max = 1.5 d``, ``kl_min = d / 1.5``, ``f = 2``).

    :param kl_coef: beta of the update that was just made
    :param kl: mean KL(old || new) over the whole rollout after the last epoch, in nats; one that is not finite says
        nothing and moves nothing
    :param kl_min: in nats
    :param kl_max: in nats
    :param factor: f > 1
    :return: the coefficient for the next update
    """
    if not math.isfinite(kl):
        return kl_coef
    if kl > kl_max:
        return kl_coef * factor
    if kl < kl_min:
        return kl_coef / factor
    return kl_coef


def clamp(kl_coef: float, bounds: tuple[float, float]) -> float:
    """
    Keep the coefficient where a multiplicative rule can bring it back from.

    Without bounds it runs away (https://github.com/ray-project/ray/issues/18492) or reaches 0 and stays there.

    :param kl_coef: what the rule asks for
    :param bounds: ``(lowest, highest)``
    :return: the nearest coefficient inside the bounds
    """
    lowest, highest = bounds
    return min(max(kl_coef, lowest), highest)
