"""A policy that acts through one graph: features, networks, sample, log-probability and value in one call."""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_ppo_penalty.compiled.noise import FILL, Noise, noise_shapes
from sb3_ppo_penalty.compiled.trace import ActorModule, ActorProgram, Graph, exploration_of, map_tensors

#: Actions, values and log-probabilities
Acted = tuple[th.Tensor, th.Tensor, th.Tensor]


def no_acting_reason(policy: Any) -> str | None:
    """
    Return why a policy cannot act through a graph, or None if it can.

    :param policy: the policy of a model
    """
    if not isinstance(policy, BasePolicy):
        return f"{type(policy).__name__} is none of SB3's policies"
    return "its `forward` has been exchanged" if "forward" in vars(policy) else None


def own_forward(policy: ActorCriticPolicy) -> Callable[..., Any]:
    """
    Return the method of a policy's class.

    :param policy: the policy that the method is bound to
    """
    return MethodType(type(policy).forward, policy)


class Ready(NamedTuple):
    """
    All that one call needs, for observations of one kind.

    :param graph: takes the policy's tensors, gSDE's matrices, the noise, the observations, and masks or the like
    :param program: that the graph was made of; its noise is filled anew at each call
    :param state: the policy's tensors
    """

    graph: Graph
    program: ActorProgram
    state: list[th.Tensor]


class GraphForward:
    """
    Stands in for a policy's ``forward`` while it collects a rollout.

    Random numbers come from torch's generator in the order in which the policy itself would draw them. Copies of the policy
    and files have the class's own method in its place.

    :param policy: the policy
    :param find: returns the graph of a program, None where there is none
    """

    def __init__(self, policy: ActorCriticPolicy, find: Callable[[ActorProgram], Graph | None]) -> None:
        self.policy = policy
        self.find = find
        self.eager: Callable[..., Acted] = own_forward(policy)
        self.module = ActorModule(policy)
        #: By shape and type of the observations
        self.ready: dict[Any, Ready | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return own_forward, (self.policy,)

    def __call__(self, obs: Any, deterministic: bool = False, **others: Any) -> Acted:
        """
        Return actions, values and log-probabilities.

        :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
        :param deterministic: whether to return the most likely actions, which needs no graph of its own
        :param others: what else the policy takes, by name, as masks; None for what it does without
        """
        if deterministic or th.is_grad_enabled() or self.policy.training:
            return self.eager(obs, deterministic, **others)
        named = {name: th.as_tensor(each, device=self.policy.device) for name, each in others.items() if each is not None}
        observations = obs.values() if isinstance(obs, dict) else (obs,)
        given = [each.contiguous() for each in (*observations, *named.values())]
        kind = tuple([(each.shape, each.dtype) for each in given])
        if kind not in self.ready:
            self.ready[kind] = self._prepare(obs, named)
        ready = self.ready[kind]
        if ready is None:
            return self.eager(obs, **others)
        kinds, noise = ready.program.kinds, ready.program.noise
        for kind_of_noise, each in zip(kinds, noise, strict=True):
            FILL[kind_of_noise](each)
        exploration = exploration_of(self.policy).values()
        actions, values, log_prob, finite = ready.graph(*ready.state, *exploration, *noise, *given)
        if not math.isfinite(finite.item()):
            # The policy itself says what is wrong, if anything is: a sum may also overflow
            with Noise(kinds, noise):
                return self.eager(obs, **others)
        return actions, values, log_prob

    def _prepare(self, obs: Any, others: dict[str, th.Tensor]) -> Ready | None:
        """
        Make the program for one kind of observations, and look up its graph.

        :param obs: observations of a kind not seen in this rollout
        :param others: what else the policy takes, by name
        :return: None where there is no graph
        """
        obs, others = map_tensors((obs, others), th.Tensor.contiguous)
        some = next(iter(obs.values())) if isinstance(obs, dict) else obs
        draws = noise_shapes(self.policy.action_dist, len(some))
        noise = tuple(th.ones(shape, device=some.device) for _, shape in draws)
        state, exploration = self.module.tensors(), exploration_of(self.policy)
        program = ActorProgram(self.module, state, exploration, tuple(kind for kind, _ in draws), noise, obs, others)
        with th.random.fork_rng(devices=[some.device] if some.is_cuda else []):
            for kind, each in zip(program.kinds, noise, strict=True):
                FILL[kind](each)
        graph = self.find(program)
        return None if graph is None else Ready(graph, program, [*state.values()])
