"""The check that an update is finite, and its undoing where it is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.step import Evaluate, LossSettings
from sb3_ppo_penalty.updates.update import Update


@contextmanager
def undone_if_not_finite(model: OnPolicyAlgorithm, update: Update, evaluate: Evaluate) -> Iterator[None]:
    """
    Set policy, optimizer and count of updates back to what they were if an update fails or is not finite.

    Checked once per update: checking every step would synchronise the device. It may not come to the check, because torch's
    distributions refuse parameters that are not finite.

    :param model: that is updated
    :param update: that is made meanwhile
    :param evaluate: gives the loss
    :raises FloatingPointError: if a loss, a gradient or a weight is not finite
    """
    policy = model.policy
    before = deepcopy((policy.state_dict(), policy.optimizer.state_dict(), model._n_updates))
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    figures = [figure for step in update.steps for figure in (step.terms.loss, *step.grad_norms)]
    weights = th.nn.utils.get_total_norm(policy.parameters())
    finite = update.ranks.agree(bool(th.isfinite(th.cat([*figures, weights.reshape(1)])).all()), failure)
    if finite and failure is None:
        return
    policy.load_state_dict(before[0])
    policy.optimizer.load_state_dict(before[1])
    model._n_updates = before[2]
    if finite and failure is not None:
        raise failure
    raise FloatingPointError(
        f"an update of {type(model).__name__} after {model.num_timesteps} steps is not finite: "
        f"{_what_is_not_finite(model, update, evaluate)}. "
        "The update was undone: the policy is the last good one and can be saved"
    ) from failure


def _what_is_not_finite(model: OnPolicyAlgorithm, update: Update, evaluate: Evaluate) -> str:
    """
    Say where an update went wrong.

    :param model: with the policy of before the update
    :param update: that failed
    :param evaluate: gives the loss
    """
    bad = _of_the_loss(model, update.rollout, update.loss, evaluate)
    buffer = model.rollout_buffer
    names = ("actions", "rewards", "values", "returns", "advantages", "log_probs")
    seen = buffer.observations if isinstance(buffer.observations, dict) else {"observations": buffer.observations}
    arrays = {**seen, **{name: getattr(buffer, name) for name in names}}
    bad["rollout"] = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    found = ", ".join(f"{place} {list(dict.fromkeys(names)) or 'all finite'}" for place, names in bad.items())
    largest = float(np.abs(buffer.returns).max())
    if float(np.finfo(np.float32).max) ** 0.5 < largest < np.inf:
        return f"{found} (returns reach {largest:.3g}, whose square is too large for float32: scale the rewards)"
    if any(bad.values()):
        return found
    elsewhere = f", or on another rank than this, {update.ranks.rank}" if update.ranks.size > 1 else ""
    return f"{found} (it went wrong within the update{elsewhere}: try a lower `learning_rate`)"


def _of_the_loss(
    model: OnPolicyAlgorithm, rollout: Transitions, settings: LossSettings, evaluate: Evaluate
) -> dict[str, list[str]]:
    """
    Find the terms of the loss and the gradients that are not finite.

    :param model: with the policy of before the update
    :param rollout: that was learned from
    :param settings: of the loss
    :param evaluate: gives the loss
    :return: their names
    """
    bad: dict[str, list[str]] = {"terms of the loss": [], "gradients": []}
    for batch in rollout.chunks():
        model.policy.optimizer.zero_grad()
        terms = evaluate(batch, settings)
        terms.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in model.policy.named_parameters() if weight.grad is not None}
        for place, tensors in zip(bad, (terms._asdict(), gradients), strict=True):
            bad[place] += [name for name, tensor in tensors.items() if not th.isfinite(tensor).all()]
    model.policy.optimizer.zero_grad()
    return bad
