"""
Draw what the algorithms maximise, from the package's own loss functions.

The clip function (the article's figure 1), the clipped surrogate of one sample for A > 0 and for A < 0 (figure 2), and,
which the article does not draw, the penalised objective J - beta * KL(old || new) of a Gaussian whose mean moves.

    python examples/plot_objectives.py
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import torch as th
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.polynomial.hermite_e import hermegauss

from sb3_ppo_penalty.objectives import losses
from sb3_ppo_penalty.objectives.divergence import kl_diagonal_gaussian
from sb3_ppo_penalty.policies.distributions import DEFAULT_VARIANCE

EPS = 0.2
#: At the maximum KL(old || new) = 1 / (2 beta^2) nats: with the last coefficient it is the default target, 0.01
KL_COEFS = (0.0, 0.5, 1.0, 2.0, math.sqrt(50))
RATIO_LABEL = r"ratio $r = \pi_\theta(a|s)\,/\,\pi_{\theta^k}(a|s)$"


def surrogate_curve(ratio: th.Tensor, advantage: float) -> th.Tensor:
    """
    Compute the surrogate of one sample over the ratio.

    :param ratio: probability ratios, shape (points,)
    :param advantage: advantage of the sample
    :return: r A at each ratio, shape (points,)
    """
    return th.vmap(lambda r: losses.surrogate(r, th.tensor(advantage)))(ratio)


def clipped_surrogate_curve(ratio: th.Tensor, advantage: float) -> th.Tensor:
    """
    Compute the clipped surrogate of one sample over the ratio.

    :param ratio: probability ratios, shape (points,)
    :param advantage: advantage of the sample
    :return: min(r A, clip(r) A) at each ratio, shape (points,)
    """
    return th.vmap(lambda r: losses.clipped_surrogate(r, th.tensor(advantage), EPS))(ratio)


def clip_curve(ratio: th.Tensor) -> th.Tensor:
    """
    Compute the clip function from the clipped surrogate, which has it only inside its minimum.

    A = 1 shows its upper bend, A = -1 the lower one.

    :param ratio: probability ratios, shape (points,)
    :return: clip(r, 1 - eps, 1 + eps), shape (points,)
    """
    bends = clipped_surrogate_curve(ratio, 1.0) - clipped_surrogate_curve(ratio, -1.0)
    return bends - surrogate_curve(ratio, 1.0)


def penalized_curve(shift: th.Tensor, kl_coef: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Compute the penalised objective in one state for a Gaussian whose mean moves and whose width stays.

    The advantage of an action is its distance from the old mean in standard deviations. The expectation over the old policy's
    actions is a Gauss-Hermite sum, which has no noise: each advantage carries its action's weight.

    :param shift: how far the mean has moved, in standard deviations, shape (points,)
    :param kl_coef: coefficient beta of the penalty
    :return: J - beta * KL(old || new), and KL(old || new) in nats, at each mean; both of shape (points,)
    """
    nodes, weights = (th.from_numpy(column) for column in hermegauss(64))
    std = th.tensor([[math.sqrt(DEFAULT_VARIANCE)]], dtype=th.float64)
    actions, advantages = nodes * std[0], nodes * len(nodes) * weights / weights.sum()
    old_mean = th.zeros_like(std)

    def at(mean: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        old, new = (th.distributions.Normal(centre, std[0], validate_args=False) for centre in (old_mean[0], mean))
        ratio = losses.importance_ratio(new.log_prob(actions), old.log_prob(actions))
        kl = kl_diagonal_gaussian(old_mean, std, mean[None], std)
        return losses.penalized_surrogate(losses.surrogate(ratio, advantages), kl, kl_coef), kl.mean()

    return th.vmap(at)(shift.double()[:, None] * std[0])


def draw_clip(axes: Axes) -> None:
    """
    Draw the article's figure 1.

    :param axes: axes to draw on
    """
    ratio = th.linspace(0, 2, 401)
    axes.plot(ratio, clip_curve(ratio), color="C0", linewidth=2)
    axes.set(title="(a) the clip function", ylabel=r"$\mathrm{clip}(r,\ 1-\epsilon,\ 1+\epsilon)$")
    mark_clip_range(axes, 1)


def draw_surrogate(axes: Axes, advantage: float) -> None:
    """
    Draw one half of the article's figure 2.

    :param axes: axes to draw on
    :param advantage: advantage of the one sample, 1 or -1
    """
    ratio = th.linspace(0, 2, 401)
    unclipped, clipped = surrogate_curve(ratio, advantage), advantage * clip_curve(ratio)
    axes.plot(ratio, unclipped, color="C3", linewidth=2, linestyle=(0, (5, 2)), label=r"$r\,A$")
    axes.plot(ratio, clipped, color="C0", linewidth=2, linestyle=(0, (2, 1)), label=r"$\mathrm{clip}(r)\,A$")
    minimum = clipped_surrogate_curve(ratio, advantage)
    axes.plot(ratio, minimum, color="C2", linewidth=5, alpha=0.45, label="their minimum")
    title = "(b) a good action, $A = 1$" if advantage > 0 else "(c) a bad action, $A = -1$"
    axes.set(title=title, ylabel="objective of the sample")
    axes.legend(loc="upper left" if advantage > 0 else "lower left", frameon=False)
    mark_clip_range(axes, advantage)


def mark_clip_range(axes: Axes, sign: float) -> None:
    """
    Label both axes and mark the ends of the clip range.

    :param axes: axes with the ratio along x
    :param sign: 1 if y goes up from 0 to 2, -1 if it goes down to -2
    """
    marks = (0, 1 - EPS, 1, 1 + EPS, 2)
    for bend in (1 - EPS, 1 + EPS):
        axes.axvline(bend, color="0.75", linewidth=0.8, zorder=0)
    up = ("0", r"$1-\epsilon$", "1", r"$1+\epsilon$", "2")
    down = ("0", r"$-(1-\epsilon)$", "$-1$", r"$-(1+\epsilon)$", "$-2$")
    axes.set(xlabel=RATIO_LABEL, xlim=(0, 2), ylim=sorted((-0.05 * sign, 2.1 * sign)))
    axes.set_xticks(marks, ["0", r"$1-\epsilon$  ", "1", r"  $1+\epsilon$", "2"])
    axes.set_yticks([sign * mark for mark in marks], up if sign > 0 else down)


def draw_penalized(axes: Axes) -> None:
    """
    Draw the penalised objective for several coefficients, each with its maximum.

    :param axes: axes to draw on
    """
    shift = th.linspace(-0.5, 2.5, 6001)
    for number, kl_coef in enumerate(KL_COEFS):
        colour = plt.get_cmap("viridis")(number / len(KL_COEFS))
        objective, divergence = penalized_curve(shift, kl_coef)
        label, best = f"{kl_coef:.3g}", int(objective.argmax())
        if best < len(shift) - 1:
            label += f": {divergence[best]:.3g}"
            axes.plot(shift[best], objective[best], "o", color=colour, markersize=5)
        axes.plot(shift, objective, color=colour, linewidth=1.8, label=label)
    axes.set(title=r"(d) the penalised objective, $J - \beta\,\mathrm{KL}$", xlim=(-0.5, 2.5), ylim=(-1, 2.6))
    axes.set(xlabel="shift of the mean (standard deviations)", ylabel="objective of the state")
    axes.legend(loc="upper left", frameon=False, title=r"$\beta$: KL at the maximum", alignment="left")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Draw the figure.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    picture = Path(__file__).parent / "results" / "objectives.png"
    parser.add_argument("--out", type=Path, default=picture, help="path of the picture")
    out: Path = parser.parse_args(arguments).out
    out.parent.mkdir(parents=True, exist_ok=True)

    with plt.style.context("sb3_ppo_penalty.study.pictures"):
        figure, panels = plt.subplots(2, 2, figsize=(7.6, 6), layout="constrained")
        draw_clip(panels[0, 0])
        draw_surrogate(panels[0, 1], 1.0)
        draw_surrogate(panels[1, 0], -1.0)
        draw_penalized(panels[1, 1])
        for ending in (".png", ".pdf"):
            figure.savefig(out.with_suffix(ending))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
