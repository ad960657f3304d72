"""
PPO with an adaptive KL penalty where memory is needed, with sb3-contrib's recurrent policies and buffers.

Nothing of sb3-contrib is repeated: its buffer makes the minibatches, what a policy with a memory needs besides observations
travels with them, and what it answers about padding is left out before anything is made of its answers. The package does not
import this module: sb3-contrib takes its time.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ppo_penalty.algorithms.ppo_clip import PPOClip
from sb3_ppo_penalty.algorithms.ppo_penalty import PPOPenalty
from sb3_ppo_penalty.algorithms.proximal import ProximalAlgorithm
from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer
from sb3_ppo_penalty.objectives.losses import mean_square, value_loss
from sb3_ppo_penalty.policies.recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from sb3_ppo_penalty.rollouts.rollout import MEMORY, Observations, Transitions, as_tensor, sampled_minibatches
from sb3_ppo_penalty.rollouts.sequences import (
    EPISODE_STARTS,
    OBSERVATION,
    REAL,
    SEQUENCE_STARTS,
    STATES,
    by_name,
    shown_rows,
    spread,
    watched_get,
)
from sb3_ppo_penalty.updates.evaluation import Evaluator
from sb3_ppo_penalty.updates.sequences import SequenceEvaluator

#: Keys that a recurrent policy is not shown among the observations
BESIDES = {EPISODE_STARTS, SEQUENCE_STARTS, REAL, *STATES}
#: ``sb3_contrib.RecurrentPPO``'s defaults where they are not PPO's
DEFAULTS = {"n_steps": 128, "batch_size": 128}


def signature_with(algorithm: type, defaults: dict[str, Any]) -> inspect.Signature:
    """
    Describe a constructor that differs from another in defaults only.

    :param algorithm: the class with the other constructor
    :param defaults: by name of the argument
    """
    signature = inspect.signature(algorithm)
    changed = {name: signature.parameters[name].replace(default=value) for name, value in defaults.items()}
    return signature.replace(parameters=list({**signature.parameters, **changed}.values()))


def only_empties_memory(policy: BasePolicy) -> bool:
    """
    Return whether all that the start of an episode does to a policy is to empty its memory: true of sb3-contrib's own methods.

    :param policy: with a memory
    """
    names = ("evaluate_actions", "get_distribution", "_process_sequence")
    return all(getattr(type(policy), name, None) is getattr(RecurrentActorCriticPolicy, name) for name in names)


class RecurrentAlgorithm(ProximalAlgorithm):
    """
    What the recurrent variants of PPO-clip and PPO-penalty share.

    :param policy: a ``RecurrentActorCriticPolicy`` of sb3-contrib, a subclass of one, or one of the names that
        ``RecurrentPPO`` takes, which stand for this package's policies: on Box action spaces their covariance does not learn
    :param env: to train in
    :param learning_rate: as in PPO
    :param n_steps: 128, as in ``RecurrentPPO``
    :param batch_size: 128, as in ``RecurrentPPO``; None stands for the whole rollout
    :param others: further arguments of the variant that does not remember, in its order
    :param named: the same by name
    """

    #: After the last step that was made; of a file's model there is none
    _last_lstm_states: RNNStates
    _rollout_buffer_classes: ClassVar[tuple[type[RolloutBuffer], ...]] = (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)
    _collect: ClassVar[Callable[..., bool]] = RecurrentPPO.collect_rollouts
    #: Policies that a file may be of beside the package's own
    _foreign_policies = (RecurrentActorCriticPolicy, RecurrentActorCriticCnnPolicy, RecurrentMultiInputActorCriticPolicy)
    _value_loss: ClassVar[Callable[..., th.Tensor]] = staticmethod(partial(value_loss, squared_error=mean_square))
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = DEFAULTS["n_steps"],
        batch_size: int | None = DEFAULTS["batch_size"],
        *others: Any,
        **named: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, n_steps, batch_size, *others, **named)  # type: ignore[arg-type]

    def _check_arguments(self) -> None:
        if self.rollout_buffer_class is None:
            dicts = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = RecurrentDictRolloutBuffer if dicts else RecurrentRolloutBuffer
        batch_size: Any = self.batch_size
        if batch_size is None:
            self.batch_size = self.n_steps * self.n_envs
        if self._ranks.size > 1:
            raise ArgumentError(
                f"{type(self).__name__} trains in a single process: sb3-contrib's buffer draws sequences that several ranks "
                "cannot cut together"
            )
        super()._check_arguments()
        given = self.rollout_buffer_kwargs
        require("hidden_state_shape" not in given, "rollout_buffer_kwargs", given, "without the size of the policy's memory")
        for name in ("lstm_hidden_size", "n_lstm_layers"):
            require_integer(f"policy_kwargs[{name!r}]", self.policy_kwargs.get(name, 1), 1)

    def _check_policy(self) -> None:
        policy_class = self.policy_class
        recurrent = isinstance(policy_class, type) and issubclass(policy_class, RecurrentActorCriticPolicy)
        require(recurrent, "policy", policy_class, "a RecurrentActorCriticPolicy of sb3-contrib, or its name")

    def _build(self) -> None:
        buffer_class: Any = self.rollout_buffer_class
        # SB3 makes the buffer first, for a memory whose size only the policy knows
        self.rollout_buffer_class = partial(buffer_class, hidden_state_shape=(0, 0, 0, 0))  # type: ignore[assignment]
        try:
            super()._build()
        except AssertionError as error:
            # sb3-contrib's words for memories that exclude each other
            raise ArgumentError(f"`policy_kwargs`: {error}") from error
        finally:
            self.rollout_buffer_class = buffer_class
        lstm: Any = self.policy.lstm_actor
        buffer: Any = self.rollout_buffer
        buffer.hidden_state_shape = (self.n_steps, lstm.num_layers, self.n_envs, lstm.hidden_size)
        buffer.reset()
        self._last_lstm_states = self._empty_memory(self.n_envs)

    def _empty_memory(self, n_sequences: int) -> RNNStates:
        """
        Give the states of a memory before anything has been seen.

        :param n_sequences: number of environments, or of sequences
        """
        lstm: Any = self.policy.lstm_actor
        zeros = [th.zeros(lstm.num_layers, n_sequences, lstm.hidden_size, device=self.device) for _ in STATES]
        return RNNStates((zeros[0], zeros[1]), (zeros[2], zeros[3]))

    @staticmethod
    def _memory_size(policy_kwargs: dict[str, Any]) -> int:
        """
        Count the numbers of memory that the rollout buffer keeps for every step.

        :param policy_kwargs: of the policy; what they leave out is as in sb3-contrib
        """
        return len(STATES) * int(policy_kwargs.get("lstm_hidden_size", 256)) * int(policy_kwargs.get("n_lstm_layers", 1))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_lstm_states"]

    def _get_compiler(self) -> Any:
        compiler = super()._get_compiler()
        if compiler.refusal is None:
            compiler.refuse("minibatches of padded sequences differ in shape")
        return compiler

    def _evaluator(self, source: str | None) -> SequenceEvaluator:
        return SequenceEvaluator(self.policy, self._unpacked, source, only_empties_memory(self.policy))

    def _examples(self) -> tuple[Observations, th.Tensor]:
        observations, actions = super()._examples()
        count = len(actions)
        states = [each.swapaxes(0, 1) for pair in self._empty_memory(count) for each in pair]
        starts = th.ones(count, device=self.device)
        return {**by_name(observations), EPISODE_STARTS: starts, **dict(zip(STATES, states, strict=True))}, actions

    def _unpacked(self, observations: Observations) -> tuple[Any, dict[str, Any]]:
        assert isinstance(observations, dict)
        hidden_pi, cell_pi, hidden_vf, cell_vf = (observations[name].swapaxes(0, 1).contiguous() for name in STATES)
        states = RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf))
        several = isinstance(self.observation_space, spaces.Dict)
        seen = (
            {key: value for key, value in observations.items() if key not in BESIDES} if several else observations[OBSERVATION]
        )
        return seen, {"lstm_states": states, "episode_starts": observations[EPISODE_STARTS]}

    def _observed(self, observations: Observations, source: Any) -> Observations:
        device = self.rollout_buffer.device
        episode_starts = as_tensor(source.episode_starts, device).flatten()
        sequence_starts = episode_starts > 0
        # Environment after environment, each of whose steps begin anew
        sequence_starts[:: source.buffer_size] = True
        states = {name: as_tensor(getattr(source, array), device) for name, array in zip(STATES, MEMORY, strict=True)}
        return {**by_name(observations), EPISODE_STARTS: episode_starts, SEQUENCE_STARTS: sequence_starts, **states}

    def _sampler(self, rollout: Transitions, evaluator: Evaluator) -> Callable[[], Iterator[Transitions]]:
        # Of sequences, and the buffer makes them all; each step's old distribution is the frozen rollout's
        old: Any = rollout.old
        get, drawn = watched_get(self.rollout_buffer)

        def take(sample: Any) -> Transitions:
            if len(drawn) != 1:
                raise ArgumentError("`rollout_buffer_class` must be one whose `get` calls `_get_samples` once a minibatch")
            rows = drawn.pop()
            frozen = old and old._replace(per_state=tuple(each[rows] for each in old.per_state))
            return self._of_sample(sample, frozen)

        return lambda: sampled_minibatches(get, self.batch_size, take)

    def _of_sample(self, sample: Any, old: Any) -> Transitions:
        """
        Take a minibatch over from the buffer, without what is padding.

        :param sample: of a recurrent buffer
        :param old: the action distributions of the policy that acted, one for every real step, or None
        """
        real = sample.mask > 1e-8
        states = [state.swapaxes(0, 1) for pair in sample.lstm_states for state in pair]
        longest = len(real) // len(states[0])
        first = th.arange(0, len(real), longest, device=real.device)
        shown = shown_rows(first, real.view(-1, longest).sum(dim=1))
        seen = {key: column[shown] for key, column in by_name(sample.observations).items()}
        starts = spread(sample.episode_starts[real], real)
        actions = sample.actions[real]
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        elif not actions.is_floating_point():
            # A Bernoulli's log-probability does not take int8
            actions = actions.float()
        names = ("old_values", "old_log_prob", "advantages", "returns")
        columns = {name: getattr(sample, name)[real] for name in names}
        observations = {**seen, EPISODE_STARTS: starts, REAL: real, **dict(zip(STATES, states, strict=True))}
        return Transitions(observations, actions, **columns, old=old)


class RecurrentPPOPenalty(RecurrentAlgorithm, PPOPenalty):
    """
    Proximal Policy Optimization with an adaptive KL penalty where memory is needed.

    The policies are sb3-contrib's with an LSTM, and so is the way in which their steps are collected and cut into minibatches
    of padded sequences. Every mean of the loss, the divergence and the log is over steps that were made. The divergence over
    the rollout is that of the whole episodes, each from the state that its memory had when the rollout began.

    The arguments are those of :class:`~.PPOPenalty` with ``sb3_contrib.RecurrentPPO``'s defaults:

    :param policy: ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"`` or ``"MultiInputLstmPolicy"``, whose covariance does not learn on
        Box action spaces, or a ``RecurrentActorCriticPolicy`` of sb3-contrib, or a subclass of one
    :param n_steps: 128
    :param batch_size: 128; None stands for the whole rollout
    """

    __signature__ = signature_with(PPOPenalty, DEFAULTS)


class RecurrentPPOClip(RecurrentAlgorithm, PPOClip):
    """
    PPO-clip where memory is needed; with sb3-contrib's policies it is ``sb3_contrib.RecurrentPPO`` bit for bit.

    The arguments are those of :class:`~.PPOClip` with ``RecurrentPPO``'s defaults; see :class:`RecurrentPPOPenalty`.
    """

    __signature__ = signature_with(PPOClip, DEFAULTS)
