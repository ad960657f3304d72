"""Take the random draws out of a policy's forward pass: their noise comes from outside, so that the pass can be a graph."""

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from torch.utils._python_dispatch import TorchDispatchMode

aten = th.ops.aten
#: Kind of noise -> fills a tensor with it, from torch's global generator
FILL: dict[str, Callable[[th.Tensor], Any]] = {
    "normal": th.Tensor.normal_,
    "exponential": th.Tensor.exponential_,
    "uniform": th.Tensor.uniform_,
}


class UnknownDrawError(Exception):
    """A policy draws random numbers in a way of its own, which no graph can repeat; its steps need none of them."""


class Draw(NamedTuple):
    """
    How torch makes the result of a random operation of noise whose distribution depends on nothing.

    :param kind: of the noise
    :param result: makes the operation's result of the noise and the operation's arguments
    """

    kind: str
    result: Callable[..., th.Tensor]


def _chosen(noise: th.Tensor, weights: th.Tensor, count: int, *_: Any) -> th.Tensor:
    """
    Choose one category in each row, as ``th.multinomial`` does: the first of exponential waiting times.

    :param noise: standard exponential, shape (batch, number of categories)
    :param weights: of the categories, same shape
    :param count: number of draws
    :return: shape (batch, 1)
    """
    if count != 1:
        raise UnknownDrawError(f"the policy draws {count} categories at a time")
    return (weights / noise).argmax(dim=-1, keepdim=True)


#: The draws of SB3's distributions. Each takes its noise from the generator as torch itself does, number by number
DRAWS: dict[Any, Draw] = {
    # What `th.normal` and `Normal.sample` come to
    aten.normal_.default: Draw("normal", lambda noise, into, mean=0.0, std=1.0: into.copy_(noise * std + mean)),
    aten.randn_like.default: Draw("normal", lambda noise, like: noise.clone()),
    aten.multinomial.default: Draw("exponential", _chosen),
    aten.bernoulli.default: Draw("uniform", lambda noise, probability: (noise < probability).to(probability.dtype)),
}


@singledispatch
def noise_shapes(distribution: Any, rows: int) -> list[tuple[str, tuple[int, int]]]:
    """
    Say what a distribution draws for one action per state.

    :param distribution: one of a class that is not registered is taken to draw nothing, which :class:`Noise` finds out
    :param rows: number of states
    :return: kind and shape of the noise of each draw, in their order
    """
    return []


noise_shapes.register(DiagGaussianDistribution, lambda of, rows: [("normal", (rows, of.action_dim))])
noise_shapes.register(CategoricalDistribution, lambda of, rows: [("exponential", (rows, of.action_dim))])
noise_shapes.register(MultiCategoricalDistribution, lambda of, rows: [("exponential", (rows, n)) for n in of.action_dims])
noise_shapes.register(BernoulliDistribution, lambda of, rows: [("uniform", (rows, of.action_dims))])


class Noise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """
    Serve the random operations that run meanwhile from given noise.

    :param kinds: of the noise, in the order of the draws
    :param given: the noise
    :raises UnknownDrawError: if the operations need other noise
    """

    def __init__(self, kinds: Sequence[str], given: Sequence[th.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = list(zip(kinds, given, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation of torch; a random one with the noise in its place."""
        kwargs = kwargs or {}
        if th.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = DRAWS.get(func)
        kind, noise = self.left.pop(0) if self.left else ("", th.empty(0))
        if draw is None or draw.kind != kind or args[0].shape != noise.shape or kwargs.get("generator") is not None:
            raise UnknownDrawError(f"the policy draws random numbers of its own, with {func}")
        return draw.result(noise, *args)

    def __exit__(self, *exception: Any) -> None:
        """Check that all noise was needed."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if self.left and exception[0] is None:
            raise UnknownDrawError("the policy draws fewer random numbers than its distribution")
