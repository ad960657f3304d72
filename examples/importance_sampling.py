"""
Show why the new policy must stay near the old one: importance sampling keeps the mean but not the variance.

The article's section 3: samples of q, weighted by p/q, have the mean that samples of p have, E_q[f p/q] = E_p[f], but not
their variance, which grows as q leaves p. Here p = N(0, 1) stands for the policy being trained, q = N(shift, width^2) for the
one that acted, and f(x) = x^2, whose mean under p is 1 and whose variance is 2. Prints the closed forms beside Monte Carlo.

    python examples/importance_sampling.py
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import torch as th
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch.distributions import Normal

from sb3_ppo_penalty.objectives.divergence import kl_diagonal_gaussian
from sb3_ppo_penalty.objectives.drift import effective_sample_size
from sb3_ppo_penalty.objectives.losses import importance_ratio

#: (shift, width) of q: first q moves away from p, then it is narrower or wider than p
TABLE = (
    (0.0, 1.0),
    (0.25, 1.0),
    (0.5, 1.0),
    (0.75, 1.0),
    (1.0, 1.0),
    (1.5, 1.0),
    (2.0, 1.0),
    (0.0, 0.7),
    (0.0, 0.8),
    (0.0, 1.5),
)
COLUMNS = ("shift", "width", "KL(q||p)", "mean", "mean*", "error*", "var", "var*", "ess", "ess*")
WIDTHS = (0.9, 1.0, 1.25)
#: Number of samples in PPO's default rollout
ROLLOUT = 2048


class Moments(NamedTuple):
    """
    Moments of f p/q where x is drawn from q.

    :param mean: E[f p/q]
    :param variance: Var[f p/q]
    :param effective_sample_size: effective sample size of the weights p/q, as a fraction of the samples
    """

    mean: float
    variance: float
    effective_sample_size: float


def closed_form(shift: float, width: float) -> Moments:
    """
    Compute the moments exactly.

    ``p^2 / q`` is ``weight`` times a Gaussian: E[(p/q)^2] = weight, and E[(f p/q)^2] = weight * (the Gaussian's fourth
    moment).

    :param shift: mean of q
    :param width: standard deviation of q; at 1 / sqrt(2) and below the variance is infinite
    :return: exact moments; with width 1 the effective sample size is exp(-shift^2)
    """
    excess = 2 * width**2 - 1
    if excess <= 0:
        return Moments(1.0, math.inf, 0.0)
    weight = width**2 / math.sqrt(excess) * math.exp(shift**2 / excess)
    mean, variance = -shift / excess, width**2 / excess
    fourth_moment = mean**4 + 6 * mean**2 * variance + 3 * variance**2
    return Moments(1.0, weight * fourth_moment - 1, 1 / weight)


def weighted_samples(shift: float, width: float, shape: tuple[int, ...]) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw weighted samples of q from torch's global generator.

    :param shift: mean of q
    :param width: standard deviation of q
    :param shape: shape of the samples
    :return: f p/q and log(p/q) of each sample, both of that shape
    """
    p, q = Normal(th.tensor(0.0, dtype=th.float64), 1.0), Normal(th.tensor(shift, dtype=th.float64), width)
    x = q.sample(shape)
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    return x.square() * importance_ratio(log_p, log_q), log_p - log_q


def monte_carlo(shift: float, width: float, n_samples: int) -> Moments:
    """
    Estimate the moments from samples of q.

    :param shift: mean of q
    :param width: standard deviation of q
    :param n_samples: number of samples
    :return: estimated moments
    """
    products, log_ratio = weighted_samples(shift, width, (n_samples,))
    return Moments(products.mean().item(), products.var().item(), effective_sample_size(log_ratio).item())


def divergence(shift: float, width: float) -> float:
    """
    Compute KL(q || p), the quantity that the penalty keeps small.

    :param shift: mean of q
    :param width: standard deviation of q
    :return: KL in nats
    """
    q_mean, q_std, zero, one = (th.tensor([[value]], dtype=th.float64) for value in (shift, width, 0.0, 1.0))
    return kl_diagonal_gaussian(q_mean, q_std, zero, one).item()


def print_table(n_samples: int) -> None:
    """
    Print the closed forms beside Monte Carlo estimates.

    :param n_samples: number of samples for each line
    """
    print(f"p = N(0, 1), q = N(shift, width^2), f(x) = x^2, {n_samples} samples of q per line; * is Monte Carlo\n")
    print("".join(f"{name:>11}" for name in COLUMNS))
    for shift, width in TABLE:
        exact, sampled = closed_form(shift, width), monte_carlo(shift, width, n_samples)
        error = math.sqrt(sampled.variance / n_samples)
        pairs = (exact.mean, sampled.mean, error, exact.variance, sampled.variance)
        sizes = (exact.effective_sample_size, sampled.effective_sample_size)
        print("".join(f"{value:11.4g}" for value in (shift, width, divergence(shift, width), *pairs, *sizes)))
    print(
        "\nThe means agree; the variance grows as q leaves p, and is infinite for widths of 1/sqrt(2) and below."
        "\nFar out, where a few samples carry the sum, Monte Carlo misses most of the variance: an importance-"
        "\nsampled estimate cannot tell from its own samples how bad it is. For equal widths ess = exp(-shift^2) ="
        "\nexp(-2 KL): at the default target, KL = 0.01, the samples keep 98 % of their worth."
    )


def draw_means(axes: Axes) -> None:
    """
    Draw repeated estimates of E[f] as box plots of 5, 25, 50, 75 and 95 %, with their means.

    :param axes: axes to draw on
    """
    shifts = [0.25 * step for step in range(7)]
    estimates = [weighted_samples(shift, 1.0, (1000, ROLLOUT))[0].mean(dim=1).numpy() for shift in shifts]
    axes.axhline(1, color="0.6", linewidth=1, zorder=0, label=r"$E_p[f] = 1$")
    boxes = axes.boxplot(
        estimates,
        positions=shifts,
        widths=0.14,
        whis=(5, 95),
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": "#c6dbef", "edgecolor": "C0"},
        whiskerprops={"color": "C0"},
        capprops={"color": "C0"},
        medianprops={"color": "C0"},
    )
    boxes["boxes"][0].set_label(f"estimates from {ROLLOUT} samples")
    axes.plot(shifts, [values.mean() for values in estimates], "D", color="C2", markersize=4, label="mean of the estimates")
    axes.set(title="(a) equal means", xlabel="shift of q", ylabel=r"estimate of $E_q[f\,p/q]$", ylim=(0.65, 1.65))
    axes.legend(loc="upper left", frameon=False)


def draw_against_shift(axes: Axes, field: str, n_samples: int) -> None:
    """
    Draw one of the moments over the shift: a line (closed form) and dots (Monte Carlo) for each width.

    :param axes: axes to draw on
    :param field: name of the moment in :class:`Moments`
    :param n_samples: number of samples for each dot
    """
    line, dots = [0.02 * step for step in range(101)], [0.25 * step for step in range(9)]
    for width, colour in zip(WIDTHS, ("C1", "C0", "C3"), strict=True):
        exact = [getattr(closed_form(shift, width), field) for shift in line]
        sampled = [getattr(monte_carlo(shift, width, n_samples), field) for shift in dots]
        axes.plot(line, exact, color=colour, label=f"width {width:g}")
        axes.plot(dots, sampled, "o", color=colour, markersize=4, markerfacecolor="white")
    axes.set(xlabel="shift of q", xlim=(-0.05, 2.05))


def draw(out: Path, n_samples: int) -> None:
    """
    Draw the figure.

    :param out: path of the picture
    :param n_samples: number of samples for each dot
    """
    with plt.style.context("sb3_ppo_penalty.study.pictures"):
        figure, (means, variances, sizes) = plt.subplots(1, 3, figsize=(10.4, 3.3), layout="constrained")
        draw_means(means)
        draw_against_shift(variances, "variance", n_samples)
        variances.set(title="(b) unequal variances", ylabel=r"$\mathrm{Var}_q[f\,p/q]$", yscale="log")
        variances.plot([], [], "o", color="0.4", markersize=4, markerfacecolor="white", label="Monte Carlo")
        variances.legend(loc="upper left", frameon=False)
        draw_against_shift(sizes, "effective_sample_size", n_samples)
        sizes.set(title="(c) what the samples are worth", ylabel="effective sample size (fraction)", ylim=(0, 1.05))
        for ending in (".png", ".pdf"):
            figure.savefig(out.with_suffix(ending))


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Print the table and draw the figure.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    picture = Path(__file__).parent / "results" / "importance_sampling.png"
    parser.add_argument("--out", type=Path, default=picture, help="path of the picture")
    parser.add_argument("--n-samples", type=int, default=1_000_000, help="samples of q for each line and each dot")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    th.manual_seed(options.seed)
    print_table(options.n_samples)
    draw(options.out, options.n_samples)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
