"""The figures of an update that are logged, under SB3's names where SB3 has them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance

from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.objectives.drift import Drift, k3_estimate
from sb3_ppo_penalty.updates.step import Step
from sb3_ppo_penalty.updates.update import Update


def minibatch_mean(measure: Callable[[th.Tensor], th.Tensor], stacks: Sequence[th.Tensor]) -> float:
    """
    Average a minibatch's mean over minibatches, working it out for all minibatches of one size at once.

    :param measure: takes values of any shape and returns the mean of something, a scalar
    :param stacks: of some minibatches' values each, shape (n_minibatches,) or (n_minibatches, batch)
    :return: the mean, in which every minibatch counts the same, also a smaller one
    """
    sizes = {stack.shape[1:] for stack in stacks}
    groups = [th.cat([stack for stack in stacks if stack.shape[1:] == size]) for size in sizes]
    return sum(len(group) * measure(group).item() for group in groups) / sum(map(len, stacks))


def update_figures(update: Update, values: np.ndarray, returns: np.ndarray, drift: Drift) -> dict[str, float]:
    """
    Work out what is logged of an update.

    :param update: that was made; ``approx_kl`` is the last epoch's mean, as in SB3
    :param values: the critic's predictions during the rollout, any shape
    :param returns: its targets, same shape
    :param drift: over the whole rollout
    :return: figures by name, without the prefix ``train/``; what is not in force is not among them
    """
    terms, clip_range = [step.terms for step in update.steps], update.loss.clip_range
    log_ratios = [each.log_ratio for each in terms]

    def clip_fraction(log_ratio: th.Tensor) -> th.Tensor:
        return losses.clip_fraction(losses.importance_ratio(log_ratio, 0.0), clip_range)

    figures = {
        "entropy_loss": -minibatch_mean(th.mean, [each.entropy for each in terms]),
        "policy_gradient_loss": minibatch_mean(th.mean, [each.surrogate for each in terms]),
        "value_loss": minibatch_mean(th.mean, [each.value for each in terms]),
        "approx_kl": minibatch_mean(k3_estimate, log_ratios[-len(update.epochs[-1]) :]),
        "clip_fraction": minibatch_mean(clip_fraction, log_ratios),
        "loss": terms[-1].loss[-1].item(),
        "explained_variance": float(explained_variance(values.flatten(), returns.flatten())),
    }
    figures = update.ranks.mean(figures, values.size)
    figures |= {name: measure for name, measure in drift._asdict().items() if measure is not None}
    figures |= gradient_norms(update.steps, apart=isinstance(update.settings.max_grad_norm, tuple))
    if hasattr(update.policy, "log_std"):
        figures["std"] = update.policy.log_std.exp().mean().item()
    in_force = {"clip_range": clip_range, "clip_range_vf": update.loss.clip_range_vf}
    return figures | {name: value for name, value in in_force.items() if value is not None}


def gradient_norms(steps: Sequence[Step], apart: bool) -> dict[str, float]:
    """
    Average the lengths of the gradients before they were clipped.

    :param steps: of an update, stacked; the one that an early stop kept from being made has no gradient
    :param apart: whether the actor's and the critic's gradients were clipped apart
    :return: mean lengths by name
    """
    names = ("grad_norm_actor", "grad_norm_critic") if apart else ("grad_norm",)
    made = [step.grad_norms for step in steps if step.grad_norms]
    return {name: minibatch_mean(th.mean, norms) for name, norms in zip(names, zip(*made, strict=True), strict=False)}
