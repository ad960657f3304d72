"""Ask a policy about actions, and find the very distribution behind its answers."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

from sb3_ppo_penalty.objectives.divergence import (
    ActionParameters,
    UnknownDivergenceError,
    collect_rows,
    concatenate,
    kl_divergence,
    parameters_of,
)
from sb3_ppo_penalty.rollouts.rollout import Observations, Transitions
from sb3_ppo_penalty.updates.step import ActorCriticWeights, weights_behind

Answer = TypeVar("Answer")

#: The method by which SB3's policies make the distribution that they act, evaluate and predict with
MAKER = "_get_action_dist_from_latent"
#: Where an evaluation's distribution is found: it is what :data:`MAKER` returned meanwhile, or a second pass has to ask for it
MADE, ASKED_FOR = "made", "asked for"


class Evaluation(NamedTuple):
    """
    A policy's answers about some actions.

    :param values: the critic's predictions, as ``evaluate_actions`` returned them
    :param log_prob: of the actions, shape (batch,)
    :param entropy: in nats, shape (batch,), or None where the policy knows none
    :param distribution: returns the action distribution of the evaluation, or None where there is none. To be called before
        the policy is evaluated again: SB3 fills one and the same object anew
    """

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    distribution: Callable[[], Any]


@contextmanager
def _made_meanwhile(policy: nn.Module) -> Iterator[list[Any]]:
    """
    Collect the action distributions that a policy makes.

    :param policy: also one that is wrapped, as by ``th.compile``
    :return: filled meanwhile
    """
    made: list[Any] = []
    make = getattr(policy, MAKER, None)
    # A wrapper hands on the method of the policy inside, which is the one that calls it
    attributes = vars(getattr(make, "__self__", policy))
    before = {MAKER: attributes[MAKER]} if MAKER in attributes else {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert make is not None
        made.append(make(*args, **kwargs))
        return made[-1]

    if make is not None:
        attributes[MAKER] = watched
    try:
        yield made
    finally:
        attributes.pop(MAKER, None)
        attributes.update(before)


@contextmanager
def acting(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Ask a policy something as it acts: without gradient, and without dropout or a moving batch norm.

    :param policy: each of its modules is left in the mode that it was in
    """
    # Not SB3's `set_training_mode`, which tells a policy that training begins
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with th.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """
    Find the method inside one that was given to ``th.compile``.

    Its graph tells neither which distribution it makes nor which weights each of its results depends on.

    :param method: of a policy
    :return: the method as it was written; the same if it is not compiled
    """
    written = getattr(method, "_torchdynamo_orig_callable", None)
    if written is None:
        return method
    # Compiled where the class was defined: not bound yet
    return partial(written, method.__self__) if hasattr(method, "__self__") else written


def evaluate(
    policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor, source: str | None, **others: Any
) -> Evaluation:
    """
    Ask a policy for the log-probabilities of actions, and for the distribution behind them.

    :param policy: that is asked
    :param observations: shape (batch, *obs_shape), or one such tensor per key
    :param actions: as ``evaluate_actions`` takes them
    :param source: where the distribution is found, see :func:`find_source`; None if nobody asks for it
    :param others: what else the policy takes besides observations, as masks
    :return: the answers, with their gradient
    """
    if source != MADE:
        asked_for = None if source is None else policy.get_distribution
        return Evaluation(
            *policy.evaluate_actions(observations, actions, **others),
            lambda: None if asked_for is None else asked_for(observations, **others),
        )
    with _made_meanwhile(policy) as made:
        answers = policy.evaluate_actions(observations, actions, **others)
    return Evaluation(*answers, lambda: made[-1] if made else None)


def find_source(policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor, **others: Any) -> str:
    """
    Find where the distribution is with which a policy evaluates actions, by the log-probabilities that it gives.

    :param policy: any that has ``evaluate_actions``, in evaluation mode
    :param observations: some, shape (batch, *obs_shape), or one such tensor per key
    :param actions: any, as ``evaluate_actions`` takes them
    :param others: what else the policy takes besides observations, as masks
    :return: :data:`MADE`, or :data:`ASKED_FOR` where ``get_distribution`` has to be called in a second pass
    :raises UnknownDivergenceError: if neither is the distribution of the evaluation, or its divergence is not known
    """
    # A compiled method is left alone: it would be compiled again for each look inside
    compiled = uncompiled(policy.evaluate_actions) != policy.evaluate_actions
    for source in (ASKED_FOR,) if compiled else (MADE, ASKED_FOR):
        evaluation = evaluate(policy, observations, actions, source, **others)
        distribution = _distribution(evaluation)
        if distribution is None or not _explains(distribution, evaluation.log_prob, actions):
            continue
        parameters = parameters_of(distribution)
        if len(parameters.per_state[0]) != len(actions):
            # Left behind by another evaluation
            continue
        shape = tuple(kl_divergence(parameters, parameters).shape)
        if shape != (len(actions),):
            raise UnknownDivergenceError(
                f"the divergence registered for {type(distribution).__name__} must return one number per state, shape "
                f"({len(actions)},), got {shape}"
            )
        return source
    raise UnknownDivergenceError(
        f"neither what the policy's `{MAKER}` returns nor its `get_distribution` gives the log-probabilities that its "
        "`evaluate_actions` returns"
    )


def _distribution(evaluation: Evaluation) -> Any:
    """
    Take the distribution from an evaluation.

    :param evaluation: just made
    :return: its distribution, or None
    :raises UnknownDivergenceError: if the policy fails when asked, which stock PPO never does
    """
    try:
        return evaluation.distribution()
    except Exception as error:
        raise UnknownDivergenceError(f"the policy's `get_distribution` fails: {type(error).__name__}: {error}") from error


def _explains(distribution: Any, log_prob: th.Tensor, actions: th.Tensor) -> bool:
    """
    Tell whether a distribution gives the log-probabilities that a policy gave.

    The tolerance is that of a second pass, because the actions of two fresh policies hardly differ.

    :param distribution: of the actions
    :param log_prob: the policy's, shape (batch,)
    :param actions: shape (batch, ...)
    """
    own = distribution.log_prob(actions)
    return own.shape == log_prob.shape and th.allclose(own, log_prob, rtol=1e-5, atol=1e-6, equal_nan=True)


def example(space: spaces.Space[Any], rows: int) -> Any:
    """
    Make up members of a space, away from its bounds, where a density may be infinite; always the same ones.

    :param space: of observations or actions
    :param rows: how many
    :return: array of shape (rows, *shape), or one such array per key
    """
    if isinstance(space, spaces.Dict):
        return {key: example(part, rows) for key, part in space.spaces.items()}
    if not isinstance(space, spaces.Box):
        return np.zeros((rows, *(space.shape or ())), dtype=space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    inset = np.minimum(high - low, 1.0) / 4
    values = np.random.default_rng(0).standard_normal((rows, *space.shape))
    return np.clip(values, low + inset, high - inset).astype(space.dtype)


def example_actions(policy: ActorCriticPolicy, rows: int) -> th.Tensor:
    """
    Make up actions as ``evaluate_actions`` takes them.

    :param policy: that could take them
    :param rows: how many
    :return: shape (rows, action_dim), or (rows,) if Discrete
    """
    actions = th.as_tensor(example(policy.action_space, rows), device=policy.device)
    if isinstance(policy.action_space, spaces.Discrete):
        return actions.long()
    return actions.float().reshape(rows, -1)


def acts_without_critic(policy: ActorCriticPolicy) -> bool:
    """
    Return whether a policy's ``get_distribution`` makes the distribution of its ``evaluate_actions``, bit for bit.

    True of SB3's own methods and networks, in which the critic is apart from the actor behind the features.

    :param policy: any that has both methods
    """
    names = ("evaluate_actions", "get_distribution", "extract_features")
    own = [getattr(getattr(policy, name), "__func__", None) is getattr(ActorCriticPolicy, name) for name in names]
    networks = getattr(policy, "mlp_extractor", None)
    # Both methods call it, but only `evaluate_actions` in a way that hooks see
    return all(own) and type(networks) is MlpExtractor and not networks._forward_hooks and not networks._forward_pre_hooks


@dataclass(frozen=True)
class Evaluator:
    """
    Asks a policy about transitions.

    :param policy: that is asked
    :param unpack: takes the observations of a minibatch apart: what the policy takes as observations, and what it takes
        besides, by name, as masks
    :param source: where the action distribution is found, see :func:`find_source`; None where its divergence is not known
    """

    policy: ActorCriticPolicy
    unpack: Callable[[Observations], tuple[Any, dict[str, Any]]]
    source: str | None

    def ask(self, observations: Observations, actions: th.Tensor) -> Evaluation:
        """
        Let the policy evaluate actions.

        :param observations: of some transitions
        :param actions: of the same
        :return: its answers, with their gradient
        """
        inputs, others = self.unpack(observations)
        return evaluate(self.policy, inputs, actions, self.source, **others)

    def log_prob(self, observations: Observations, actions: th.Tensor) -> tuple[th.Tensor, Callable[[], Any]]:
        """
        Let the policy evaluate actions where nobody asks for values: without its critic, if that makes no difference.

        :param observations: of some transitions
        :param actions: of the same
        :return: log-probabilities, shape (batch,), and what returns the action distribution, as in :class:`Evaluation`
        """
        if self.source == MADE and acts_without_critic(self.policy):
            distribution = self.policy.get_distribution(self.unpack(observations)[0])
            return distribution.log_prob(actions), lambda: distribution
        evaluation = self.ask(observations, actions)
        return evaluation.log_prob, evaluation.distribution

    def parameters(self, observations: Observations, actions: th.Tensor) -> ActionParameters:
        """
        Ask for the policy's action distributions.

        :param observations: of some transitions
        :param actions: of the same
        :return: their parameters, with their gradient
        """
        return parameters_of(self.log_prob(observations, actions)[1]())

    def divergence(self, batch: Transitions) -> th.Tensor:
        """
        Work out KL(old || new) in each state.

        :param batch: some transitions, with the old distributions
        :return: in nats, with its gradient, shape (batch,)
        """
        return kl_divergence(batch.old, self.parameters(batch.observations, batch.actions))

    def freeze(self, rollout: Transitions) -> Transitions:
        """
        Add to a rollout the policy's distributions as they are now, if their divergence is known.

        :param rollout: that the policy has just collected
        """
        if self.source is None:
            return rollout
        with acting(self.policy):
            parts = (self.parameters(chunk.observations, chunk.actions) for chunk in rollout.chunks())
            return rollout._replace(old=concatenate(parts, rollout.size))

    def parts(self, transitions: Transitions) -> Iterator[Transitions]:
        """
        Go once over transitions, in parts that the policy can be asked about one by one.

        :param transitions: a rollout or a minibatch
        """
        return transitions.chunks()

    def moved(self, rollout: Transitions) -> tuple[th.Tensor | None, th.Tensor]:
        """
        Measure how far the policy is from the one that acted.

        :param rollout: with the distributions of the policy that acted
        :return: KL(old || new) in each state, in nats, or None where it is not known, and the log of each action's importance
            ratio, both of shape (n_transitions,)
        """

        def of(chunk: Transitions) -> tuple[th.Tensor, ...]:
            log_prob, distribution = self.log_prob(chunk.observations, chunk.actions)
            log_ratio = log_prob - chunk.old_log_prob
            if chunk.old is None:
                return (log_ratio,)
            return log_ratio, kl_divergence(chunk.old, parameters_of(distribution()))

        with acting(self.policy):
            log_ratio, *exact = collect_rows(map(of, self.parts(rollout)), rollout.size)
        return exact[0] if exact else None, log_ratio


def actor_and_critic_weights(
    policy: ActorCriticPolicy, observations: Any, actions: th.Tensor, **others: Any
) -> ActorCriticWeights:
    """
    Find the weights behind the actions' probabilities and those behind the value.

    :param policy: any that has ``evaluate_actions``
    :param observations: some, shape (batch, *obs_shape), or one such tensor per key
    :param actions: any, as ``evaluate_actions`` takes them
    :param others: what else the policy takes besides observations, as masks
    """
    with acting(policy), th.enable_grad():
        values, log_prob, _ = uncompiled(policy.evaluate_actions)(observations, actions, **others)
    return ActorCriticWeights(weights_behind(policy, [log_prob]), weights_behind(policy, [values]))


class _Question(nn.Module):
    """
    Something asked of a policy, as a module whose weights :func:`torch.func.functional_call` can exchange.

    :param policy: that is asked
    :param ask: uses the policy
    """

    def __init__(self, policy: nn.Module, ask: Callable[[Any], Any]) -> None:
        super().__init__()
        self.policy = policy
        self.ask = ask

    def forward(self, asked: Any) -> Any:
        """
        Ask the policy.

        :param asked: what is handed on
        :return: the policy's answer
        """
        return self.ask(asked)


def with_weights_of_now(policy: nn.Module, ask: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """
    Keep a policy's present weights, to ask it later what it would have answered now.

    :param policy: that moves afterwards
    :param ask: asks it about something
    :return: asks it with the weights that are kept, without gradient
    """
    question = _Question(policy, ask)
    saved = policy.state_dict().keys()
    tensors = itertools.chain(policy.named_parameters(), policy.named_buffers())
    # What no file has follows from the rest, and is compared by identity
    kept = {f"policy.{name}": tensor.detach().clone() for name, tensor in tensors if name in saved}

    @th.no_grad()
    def answer(asked: Any) -> Answer:
        answered: Answer = th.func.functional_call(question, kept, (asked,))
        return answered

    return answer
