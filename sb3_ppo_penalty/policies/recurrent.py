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
