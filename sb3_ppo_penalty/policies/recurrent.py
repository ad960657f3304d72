"""sb3-contrib's recurrent policies with a Gaussian action distribution whose covariance is not learned."""

import inspect
from typing import Any, ClassVar

import torch as th
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import nn

from sb3_ppo_penalty.policies.policies import FixedCovarianceMixin


class RecurrentFixedCovarianceMixin(FixedCovarianceMixin, RecurrentActorCriticPolicy):
    """Gives a recurrent policy of sb3-contrib the fixed covariance: see :class:`~.FixedCovarianceMixin`."""

    argument_names: ClassVar[tuple[str, ...]] = tuple(inspect.signature(RecurrentActorCriticPolicy.__init__).parameters)[4:]

    def forward(  # type: ignore[override]
        self, obs: th.Tensor, lstm_states: RNNStates, episode_starts: th.Tensor, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates]:
        """
        Act, as sb3-contrib's policy does.

        :param obs: observations, shape (batch, *obs_shape), or one such tensor per key
        :param lstm_states: states of actor's and critic's memory, each of shape (n_layers, batch, width)
        :param episode_starts: 1 where an episode begins, so that the memory is empty; shape (batch,)
        :param deterministic: whether to return the mean actions
        :return: actions, shape (batch, *action_shape); values, shape (batch, 1); log-probabilities, shape (batch,); the
            memory's next states
        """
        return RecurrentActorCriticPolicy.forward(self, obs, lstm_states, episode_starts, deterministic)

    @staticmethod
    def _process_sequence(
        features: th.Tensor, lstm_states: tuple[th.Tensor, th.Tensor], episode_starts: th.Tensor, lstm: nn.LSTM
    ) -> Any:
        """
        Run a memory over sequences, in one call of torch where episodes begin with sequences, as in minibatches.

        sb3-contrib then goes step by step, with the same answers, and gradients that round otherwise; it takes many times as
        long.

        :param features: shape (n_sequences * length, features_dim)
        :param lstm_states: before the sequences, each of shape (n_layers, n_sequences, width)
        :param episode_starts: 1 where an episode begins, shape (n_sequences * length,)
        :param lstm: the memory
        :return: its output, shape (n_sequences * length, width), and its states after the sequences
        """
        starts = episode_starts.reshape(lstm_states[0].shape[1], -1)
        if not starts[:, 1:].any():
            kept = 1.0 - starts[:, 0].reshape(1, -1, 1)
            lstm_states = kept * lstm_states[0], kept * lstm_states[1]
            episode_starts = th.zeros_like(episode_starts)
        return RecurrentActorCriticPolicy._process_sequence(features, lstm_states, episode_starts, lstm)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return the arguments that build this policy again, with those of the memory, which sb3-contrib leaves out."""
        lstm = self.lstm_actor
        names = ("lstm_kwargs", "shared_lstm", "enable_critic_lstm")
        own = {"lstm_hidden_size": lstm.hidden_size, "n_lstm_layers": lstm.num_layers}
        return {**super()._get_constructor_parameters(), **own, **{name: getattr(self, name) for name in names}}


class MlpLstmPolicy(RecurrentFixedCovarianceMixin):
    """sb3-contrib's ``MlpLstmPolicy`` with a fixed covariance: see :class:`~.FixedCovarianceMixin` for what it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.MlpLstmPolicy"


class CnnLstmPolicy(RecurrentFixedCovarianceMixin, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's ``CnnLstmPolicy`` with a fixed covariance: see :class:`~.FixedCovarianceMixin` for what it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.CnnLstmPolicy"


class MultiInputLstmPolicy(RecurrentFixedCovarianceMixin, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's ``MultiInputLstmPolicy`` with a fixed covariance: see :class:`~.FixedCovarianceMixin` for what it adds."""

    saved_as: ClassVar[str] = "sb3_ppo_penalty.MultiInputLstmPolicy"
