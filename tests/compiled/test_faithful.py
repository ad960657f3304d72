"""The compiled step does what the eager one does, or is not used, for any optimizer and any policy."""

import contextlib
import copy
import pickle
import random
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from tracing import TRACED

from sb3_ppo_penalty import MlpPolicy, PPOClip, PPOPenalty
from sb3_ppo_penalty.compiled import compiler as room
from sb3_ppo_penalty.compiled.compiler import copy_outputs
from sb3_ppo_penalty.compiled.module_state import module_state
from sb3_ppo_penalty.compiled.step import AdamOptions, LossModule, StepInputs, gradient_step, unpack_gradient
from sb3_ppo_penalty.compiled.trace import StepProgram, trace
from sb3_ppo_penalty.distributed import session
from sb3_ppo_penalty.updates.ranks import ALONE
from sb3_ppo_penalty.updates.step import EagerStepper, StepSettings

SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}
TINY = {"net_arch": [8]}


def made(algorithm=PPOPenalty, compile: bool = False, policy="MlpPolicy", **options):
    return algorithm(policy, "Pendulum-v1", compile=compile, **{**SMALL, "policy_kwargs": TINY, **options})


def trained_on(model):
    """Train for one more rollout, with the process's random generators seeded again."""
    model.set_random_seed(1)
    return model.learn(model.n_steps, reset_num_timesteps=False)


def distance(model, other) -> float:
    """Return the largest difference of a weight or a buffer, relative to the largest entry of its tensor."""
    names = model.policy.state_dict()
    pairs = ((names[name], other.policy.state_dict()[name]) for name in names)
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


# What the optimizer holds


class Heads(MlpPolicy):
    """Trains only its last layers."""

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        heads = [*self.action_net.parameters(), *self.value_net.parameters()]
        self.optimizer = self.optimizer_class(heads, lr=lr_schedule(1), **self.optimizer_kwargs)


class ActorOnly(MlpPolicy):
    """Trains only its actor."""

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        actor = [*self.action_net.parameters(), *self.mlp_extractor.policy_net.parameters()]
        self.optimizer = self.optimizer_class(actor, lr=lr_schedule(1), **self.optimizer_kwargs)


class CriticOnly(MlpPolicy):
    """Trains only its critic."""

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        critic = [*self.value_net.parameters(), *self.mlp_extractor.value_net.parameters()]
        self.optimizer = self.optimizer_class(critic, lr=lr_schedule(1), **self.optimizer_kwargs)


HELD = {
    "heads": (Heads, {}),
    "heads, clipped apart": (Heads, {"max_grad_norm": (0.05, 0.5)}),
    "heads, guard": (Heads, {"guard": "rollback", "target_kl": 1e-4, "learning_rate": 3e-2, "n_epochs": 4}),
    "critic": (CriticOnly, {}),
    # Its critic's epochs, which the guard leaves, move nothing
    "actor, guard": (ActorOnly, {"guard": "stop", "target_kl": 1e-4, "learning_rate": 3e-2, "n_epochs": 4}),
}


@pytest.mark.parametrize("case", HELD)
def test_what_the_optimizer_does_not_hold_stays(case: str, tmp_path) -> None:
    policy, options = HELD[case]
    start = made(policy=policy, **options)
    eager, compiled = (made(policy=policy, compile=compile, **options).learn(64) for compile in (False, True))
    assert len(compiled._compiler.graphs) == (2 if case == "heads, guard" else 1)
    assert distance(eager, start) > 0
    assert distance(eager, compiled) < 1e-4
    held = {id(weight) for weight in compiled.policy.optimizer.param_groups[0]["params"]}
    before = dict(start.policy.named_parameters())
    for name, weight in compiled.policy.named_parameters():
        # The guard may have taken all of it back
        assert th.equal(weight, before[name]) == (id(weight) not in held) or "guard" in case, name
        assert th.equal(weight, before[name]) or id(weight) in held, name
    compiled.save(tmp_path / "model")
    states = [model.policy.optimizer.state_dict()["state"] for model in (eager, compiled)]
    assert [state["step"] for state in states[0].values()] == [state["step"] for state in states[1].values()]
    loaded = PPOPenalty.load(tmp_path / "model", env=compiled.get_env(), device="cpu")
    assert distance(loaded, compiled) == 0
    # Replaced between two updates: by one that holds all
    for model in (eager, compiled):
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3, eps=1e-5)
        trained_on(model)
    assert distance(eager, compiled) < 1e-4
    frozen = [name for name in before if th.equal(dict(compiled.policy.named_parameters())[name], before[name])]
    assert frozen == [] or "guard" in case


@pytest.mark.parametrize("compile", [False, True])
def test_a_guard_leaves_no_epochs_to_a_critic_that_does_not_learn(compile: bool) -> None:
    model = made(compile=compile, guard="stop", target_kl=1e-4, learning_rate=3e-2, n_epochs=4)
    for weight in [*model.policy.value_net.parameters(), *model.policy.mlp_extractor.value_net.parameters()]:
        weight.requires_grad_(False)
    model.learn(32)
    assert model.logger.name_to_value["train/guard_acted"] == 1
    assert model._n_updates == 1


def test_another_policy_of_the_model_is_the_one_that_learns() -> None:
    models = [made(compile=compile).learn(64) for compile in (False, True)]
    for model in models:
        model.policy = copy.deepcopy(model.policy)
        trained_on(model)
    assert models[1]._compiler.refusal is None
    assert distance(*models) < 1e-4


def outsider(policy) -> th.optim.Optimizer:
    return th.optim.Adam([*policy.parameters(), nn.Parameter(th.zeros(1))], lr=1e-3)


def groups(policy) -> th.optim.Optimizer:
    first, *rest = policy.parameters()
    return th.optim.Adam([{"params": [first], "weight_decay": 0.1}, {"params": rest}], lr=1e-3)


def hooked(policy) -> th.optim.Optimizer:
    optimizer = th.optim.Adam(policy.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
    return optimizer


def scheduled(policy) -> th.optim.Optimizer:
    optimizer = th.optim.Adam(policy.parameters(), lr=1e-3)
    th.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


def gradient_hook(policy) -> th.optim.Optimizer:
    policy.action_net.weight.register_hook(lambda gradient: 0 * gradient)
    return th.optim.Adam(policy.parameters(), lr=1e-3)


def module_hook(policy) -> th.optim.Optimizer:
    policy.action_net.register_forward_hook(lambda module, inputs, output: 2 * output)
    return th.optim.Adam(policy.parameters(), lr=1e-3)


def nothing(policy) -> th.optim.Optimizer:
    policy.action_net.requires_grad_(False)
    return th.optim.Adam(policy.action_net.parameters(), lr=1e-3)


@TRACED
@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (outsider, "weights that are not the policy's"),
        (groups, "more than one group"),
        (hooked, "the optimizer has hooks"),
        (scheduled, "the optimizer has hooks"),
        (gradient_hook, "a weight has hooks"),
        (module_hook, "a module, Linear, has hooks"),
        (nothing, "no weight of the policy that learns"),
    ],
)
def test_an_optimizer_that_no_graph_follows_is_left_to_itself(optimizer, reason: str) -> None:
    models = []
    for compile in (False, True):
        model = made(compile=compile)
        model.policy.optimizer = optimizer(model.policy)
        said = pytest.warns(RuntimeWarning, match=f"compile=True.*{reason}") if compile else contextlib.nullcontext()
        with said:
            models.append(model.learn(64))
    assert distance(*models) == 0


@TRACED
def test_gradients_of_weights_outside_the_policy_do_not_pile_up() -> None:
    """Weights that only the optimizer holds get a new gradient at each step, as in stock PPO."""

    class Scaled(FlattenExtractor):
        """Uses a weight that no module has registered."""

        def forward(self, observations):
            return super().forward(observations) * scale

    ends = []
    for algorithm in (PPO, PPOClip):
        scale = nn.Parameter(th.ones(1))
        options = {"policy_kwargs": {**TINY, "features_extractor_class": Scaled}, **SMALL}
        model = algorithm(ActorCriticPolicy, "Pendulum-v1", **options)
        model.policy.optimizer = th.optim.Adam([*model.policy.parameters(), scale], lr=1e-3, eps=1e-5)
        model.learn(64)
        ends.append(scale.item())
    assert ends[0] == ends[1] != 1


# What a policy does to itself, and what it reads


class Lab(FlattenExtractor):
    """Has one of each thing that an extractor may use."""

    factor = 1.0

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("mean", th.zeros(3))
        self.register_buffer("late", None)
        self.plain = th.ones(3)
        self.calls = 0
        self.seen: list[int] = []
        self.numbers = np.random.default_rng(0)
        self.layer = nn.Linear(3, 3)
        self.tied = [self.layer.weight]
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.3)


class Assigned(Lab):
    def forward(self, observations):
        self.mean = 0.9 * self.mean + 0.1 * observations.mean(0)
        return observations - self.mean


class AssignedInTraining(Lab):
    def forward(self, observations):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * observations.mean(0)
        return observations - self.mean


class AssignedWhenActing(Lab):
    def forward(self, observations):
        if not self.training:
            self.mean = 0.9 * self.mean + 0.1 * observations.mean(0)
        return observations - self.mean


class AssignedLate(Lab):
    def forward(self, observations):
        self.late = observations.mean(0) if self.late is None else 0.9 * self.late
        return observations - self.late


class InPlace(Lab):
    def forward(self, observations):
        self.mean.mul_(0.9).add_(0.1 * observations.mean(0))
        return observations - self.mean


class Normed(Lab):
    def forward(self, observations):
        return self.norm(observations)


class DroppedOut(Lab):
    def forward(self, observations):
        return self.dropout(observations)


class Clamped(Lab):
    def forward(self, observations):
        with th.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(observations)


class Counted(Lab):
    def forward(self, observations):
        self.calls += 1
        return observations * (1 + 0.01 * self.calls)


class Listed(Lab):
    def forward(self, observations):
        self.seen.append(len(observations))
        return observations


class Remembered(Lab):
    def forward(self, observations):
        self.last = observations
        return observations


class PlainInPlace(Lab):
    def forward(self, observations):
        self.plain.mul_(0.99)
        return observations * self.plain


class Tied(Lab):
    def forward(self, observations):
        return nn.functional.linear(self.layer(observations), self.tied[0])


class Noisy(Lab):
    def forward(self, observations):
        return observations + 0.1 * self.numbers.normal()


class NoisyGlobally(Lab):
    def forward(self, observations):
        return observations + 0.1 * random.random()


TOTAL = {"calls": 0}


class CountedGlobally(Lab):
    def forward(self, observations):
        TOTAL["calls"] += 1
        return observations * (1 + 0.01 * TOTAL["calls"])


class CountedByClass(Lab):
    def forward(self, observations):
        CountedByClass.factor += 0.01
        return observations * self.factor


FOLLOWED = [InPlace, Normed, DroppedOut, Clamped]
REFUSED = {
    Assigned: "assigns `policy.features_extractor.mean`",
    AssignedInTraining: "assigns `policy.features_extractor.mean`",
    AssignedWhenActing: "assigns `policy.features_extractor.mean`",
    AssignedLate: "features_extractor.late",
    Counted: "changes `features_extractor.calls`",
    Listed: "changes `features_extractor.seen`",
    Remembered: "changes `features_extractor.last`",
    PlainInPlace: "",
    Tied: "",
    Noisy: "changes `features_extractor.numbers`",
    NoisyGlobally: "changes `random`",
    CountedGlobally: "changes `CountedGlobally.forward: TOTAL`",
    CountedByClass: "changes `CountedByClass.factor`",
}


def reset() -> None:
    TOTAL["calls"], CountedByClass.factor = 0, 1.0


def trained_with(extractor, algorithm, compile: bool):
    reset()
    return made(algorithm, compile, policy_kwargs={**TINY, "features_extractor_class": extractor}).learn(64)


@pytest.mark.parametrize(("extractor", "algorithm"), [*((each, PPOPenalty) for each in FOLLOWED), (InPlace, PPOClip)])
def test_what_a_module_does_to_its_tensors_in_place_is_followed(extractor, algorithm) -> None:
    eager, compiled = (trained_with(extractor, algorithm, compile) for compile in (False, True))
    assert (len(compiled._compiler.graphs), len(compiled._compiler.actors)) == (1, 1)
    assert distance(eager, compiled) < 1e-4


@TRACED
@pytest.mark.parametrize(
    ("extractor", "algorithm"), [*((each, PPOPenalty) for each in REFUSED), (Assigned, PPOClip), (Counted, PPOClip)]
)
def test_what_no_graph_can_follow_trains_eagerly_and_says_so(extractor, algorithm, caplog) -> None:
    eager = trained_with(extractor, algorithm, False)
    with pytest.warns(RuntimeWarning, match=f"compile=True.*{REFUSED[extractor]}") as caught:
        compiled = trained_with(extractor, algorithm, True)
    assert len(caught) == 1
    # Once, in one place; what a graph of the step alone could follow is not known when the policy first acts
    said = [record.getMessage() for record in caplog.records if record.name == room.__name__]
    assert ["acts without a compiled graph" in each for each in said] == [True] * (extractor in (PlainInPlace, Tied))
    assert distance(eager, compiled) == 0
    ours, theirs = (model.policy.features_extractor for model in (eager, compiled))
    assert (ours.calls, ours.seen, ours.plain.tolist()) == (theirs.calls, theirs.seen, theirs.plain.tolist())


SCALE = [1.0]


class Reader(FlattenExtractor):
    """Reads numbers from an attribute, its class, a global and another class."""

    factor = 1.0

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = 1.0
        self.dropout = nn.Dropout(0.0)

    def forward(self, observations):
        return self.dropout(observations) * self.scale * self.factor * SCALE[0] * hidden()


class Hidden:
    """Holds a number where the analysis of the extractor's code does not look."""

    value = 1.0


@pytest.fixture
def fresh():
    """Reset what the tests change in this module."""
    yield
    Reader.factor, SCALE[0], Hidden.value = 1.0, 1.0, 1.0


def hidden() -> float:
    return Hidden.value


def attribute(model) -> None:
    model.policy.features_extractor.scale = 0.9999


def class_attribute(model) -> None:
    Reader.factor = 0.9999


def global_value(model) -> None:
    SCALE[0] = 0.9999


def submodule(model) -> None:
    model.policy.features_extractor.dropout.p = 0.5


def out_of_sight(model) -> None:
    Hidden.value = 0.5


def closure(model) -> None:
    model.policy.features_extractor.activation = th.tanh


CHANGES = [attribute, class_attribute, global_value, submodule, closure]


@TRACED
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_module_reads_tells_graphs_apart(change, fresh) -> None:
    model = made(policy_kwargs={**TINY, "features_extractor_class": Reader}).learn(32)
    before = module_state(model.policy)
    model.learn(64, reset_num_timesteps=False)
    assert module_state(model.policy) == before
    change(model)
    assert module_state(model.policy) != before


@pytest.mark.parametrize("change", [attribute, out_of_sight])
def test_what_a_graph_has_read_is_read_again(change, fresh) -> None:
    ends = []
    for compile in (False, True):
        Hidden.value = 1.0
        model = made(compile=compile, policy_kwargs={**TINY, "features_extractor_class": Reader}).learn(32)
        change(model)
        ends.append(trained_on(model))
    assert ends[1]._compiler.refusal is None
    # The small change counts too, to the last digits
    assert distance(*ends) < 2e-5


class Restless(BaseCallback):
    """Changes a number that the policy reads, before every rollout."""

    def _on_rollout_start(self) -> None:
        self.model.policy.features_extractor.scale *= 0.99

    def _on_step(self) -> bool:
        return True


@TRACED
def test_a_policy_that_keeps_changing_ends_the_compiling(monkeypatch) -> None:
    monkeypatch.setattr(room, "MAX_GRAPHS", 2)
    options = {"policy_kwargs": {**TINY, "features_extractor_class": Reader}}
    eager = made(**options).learn(64, callback=Restless())
    compiled = made(compile=True, **options)
    with pytest.warns(RuntimeWarning, match=r"compile=True.*changed so often that it would need 3 graphs"):
        compiled.learn(64, callback=Restless())
    assert distance(eager, compiled) < 1e-4


# The check of a compiled step

EVERYTHING = {
    "clip_range": 0.2,
    "clip_range_vf": 0.5,
    "ent_coef": 0.01,
    "kl_coef": 1.0,
    "target_kl": 0.01,
    "kl_penalty": {"cutoff_coef": 10.0},
    "max_ratio": 2.0,
    "policy_kwargs": {**TINY, "learn_covariance": True},
}
WRONG = {
    "penalty": lambda given: {"kl_coef": 1.5 * given.kl_coef},
    "no penalty": lambda given: {"kl_coef": 0.0},
    "direction": lambda given: {"kl_penalty": replace(given.kl_penalty, direction="new_old")},
    "clip": lambda given: {"clip_range": 1.5 * given.clip_range},
    "no clip": lambda given: {"clip_range": None},
    "truncation": lambda given: {"clip_range": None, "max_ratio": 3.0},
    "no truncation": lambda given: {"clip_range": None, "max_ratio": None},
    "cutoff": lambda given: {"kl_penalty": replace(given.kl_penalty, cutoff_coef=15.0)},
    "no cutoff": lambda given: {"kl_penalty": replace(given.kl_penalty, cutoff_coef=0.0)},
    "target": lambda given: {"target_kl": 3.0 * given.target_kl},
    "value clip": lambda given: {"clip_range_vf": 1.5 * given.clip_range_vf},
    "no value clip": lambda given: {"clip_range_vf": None},
    "value coefficient": lambda given: {"vf_coef": 1.1 * given.vf_coef},
    "entropy": lambda given: {"ent_coef": 2.0 * given.ent_coef},
    "no entropy": lambda given: {"ent_coef": None},
}


@TRACED
@pytest.mark.parametrize("activation", [pytest.param(nn.Tanh, marks=pytest.mark.slow), nn.ReLU])
def test_the_check_sees_each_term_by_itself(activation) -> None:
    """A wrong term of the loss is found, also one that vanishes at the old policy, where the KL divergence is 0."""
    options = {**EVERYTHING, "policy_kwargs": {**EVERYTHING["policy_kwargs"], "activation_fn": activation}}
    model = made(**options).learn(64)
    update = model._new_update()
    batch = next(update.minibatches(normalize=False))

    def right(wrong, common) -> bool:
        """Return whether a graph of the loss with wrong settings passes for one with the right ones."""
        loss = update.loss._replace(**common)
        inputs, adam = StepInputs.for_step(model.policy, loss, update.settings), AdamOptions.of(model.policy.optimizer)
        broken = LossModule(model.policy, lambda some, inside: model._evaluate(some, inside._replace(**wrong(inside))))
        program = StepProgram(LossModule(model.policy, model._evaluate), inputs, batch, adam)
        return program.matches(trace(program._replace(module=broken)))

    for name, wrong in WRONG.items():
        # The clip hides what the truncation does to ratios beyond it
        common = {"clip_range": None} if "truncation" in name else {}
        assert not right(wrong, common), name
    for common in ({}, {"clip_range": None}):
        assert right(lambda inside: {}, common)


@pytest.mark.parametrize("learning", [None, "actor"])
def test_the_compiled_gradient_is_the_one_that_pytorch_leaves_with_the_weights(learning) -> None:
    """A weight that the loss does not depend on, or that does not learn, has no gradient rather than one of 0."""
    model = made(policy_kwargs={**TINY, "features_extractor_class": Lab}).learn(32)
    update, policy = model._new_update(), model.policy
    settings = update.settings._replace(learning=learning and model._actor_and_critic().actor)
    batch = next(update.minibatches(normalize=False))
    eager = EagerStepper(policy, model._evaluate, update.loss, settings, ALONE)
    expected = eager.differentiate_eagerly(batch)
    gradients = {name: weight.grad for name, weight in policy.named_parameters()}
    outputs = gradient_step(StepInputs.for_gradient(policy, update.loss, settings), batch, LossModule(policy, model._evaluate))
    for weight in policy.parameters():
        weight.grad = th.ones_like(weight)
    th.testing.assert_close(unpack_gradient(eager.descent, outputs), expected)
    for name, weight in policy.named_parameters():
        assert (weight.grad is None) == ("features_extractor" in name or bool(learning and "value" in name)), name
        th.testing.assert_close(weight.grad, gradients[name])


# Pickles and copies


@pytest.mark.parametrize("algorithm", [PPOPenalty, PPOClip])
def test_a_model_that_was_trained_compiled_can_be_pickled_and_copied(algorithm) -> None:
    options = {"guard": "stop"} if algorithm is PPOPenalty else {}
    model = made(algorithm, True, **options).learn(64)
    observation = model.env.reset()
    expected = model.predict(observation, deterministic=True)[0]
    copies = [pickle.loads(pickle.dumps(model)), cloudpickle.loads(cloudpickle.dumps(model)), copy.deepcopy(model)]
    ends = []
    for each in copies:
        assert each._compiler is None
        np.testing.assert_array_equal(each.predict(observation, deterministic=True)[0], expected)
        ends.append(trained_on(each))
        assert len(each._compiler.graphs) == 1
    assert distance(ends[0], ends[1]) == 0
    assert len(model._compiler.graphs) == 1


@TRACED
def test_a_copy_belongs_to_the_session_that_is_open_where_it_is_made(tmp_path) -> None:
    th.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/found", rank=0, world_size=1)
    try:
        with session() as ranks:
            model = made(PPOClip)
            assert copy.deepcopy(model)._ranks is ranks
            content = pickle.dumps(model)
    finally:
        th.distributed.destroy_process_group()
    alone = pickle.loads(content)
    assert alone._ranks.size == 1
    alone.learn(32)


# The optimizer's own implementation


@TRACED
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        (None, True),
        ({}, True),
        ({"weight_decay": 0.1}, True),
        ({"foreach": None, "differentiable": False}, True),
        ({"fused": False}, False),
        ({"fused": None}, None),
        ({"foreach": True}, None),
        ({"foreach": False}, None),
        ({"differentiable": True}, None),
    ],
)
def test_fused_is_a_default_that_no_choice_contradicts(options, fused) -> None:
    model = made(policy_kwargs={**TINY, "optimizer_kwargs": options})
    group = model.policy.optimizer.param_groups[0]
    if not group["differentiable"]:
        # torch's own step fails there, in stock PPO too
        model.learn(32)
    assert group["fused"] is fused
    for name, value in (options or {}).items():
        assert group[name] is value
    # SB3's, which gives its own to those who ask for nothing
    stock = PPO("MlpPolicy", "Pendulum-v1", **{**SMALL, "policy_kwargs": {**TINY, "optimizer_kwargs": options}})
    assert group["eps"] == stock.policy.optimizer.param_groups[0]["eps"]


class OwnAdam(th.optim.Adam):
    """Takes other arguments than torch's Adam."""

    def __init__(self, params, lr: float = 1e-3, eps: float = 1e-8) -> None:
        super().__init__(params, lr=lr, eps=eps)


@TRACED
@pytest.mark.parametrize("optimizer", [OwnAdam, th.optim.AdamW, th.optim.SGD])
def test_other_optimizers_are_given_nothing(optimizer) -> None:
    model = made(policy_kwargs={**TINY, "optimizer_class": optimizer}).learn(32)
    assert model.policy.optimizer_kwargs == {}


class Complex(FlattenExtractor):
    """Has a complex weight, which torch's fused kernel does not take."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.phase = nn.Parameter(th.ones(3, dtype=th.complex64))

    def forward(self, observations):
        return (observations * self.phase).real


@TRACED
def test_a_complex_weight_learns_with_torchs_other_adam() -> None:
    options = {"policy_kwargs": {**TINY, "features_extractor_class": Complex}}
    eager = made(**options).learn(64)
    with pytest.warns(RuntimeWarning, match=r"compile=True.*phase is complex"):
        compiled = made(compile=True, **options).learn(64)
    assert distance(eager, compiled) == 0
    assert not th.equal(eager.policy.features_extractor.phase, th.ones(3, dtype=th.complex64))


# What only a GPU does


@TRACED
def test_what_a_replayed_graph_has_returned_stays() -> None:
    memory = th.zeros(2)
    graph = copy_outputs(lambda increment: [memory.add_(increment)])
    first, second = graph(th.tensor(1.0)), graph(th.tensor(1.0))
    assert (first[0].tolist(), second[0].tolist()) == ([1, 1], [2, 2])


@TRACED
def test_step_counts_are_where_the_weights_are() -> None:
    """Step counts move to the weights' device, those of earlier steps and new ones."""
    # A device whose tensors do not mix with those of the CPU, as a GPU's do not
    policy = made().policy.to("meta")
    weights = list(policy.parameters())
    policy.optimizer = th.optim.Adam(weights, fused=True)
    for weight, device in zip(weights[:2], ("cpu", "meta"), strict=True):
        step = th.tensor(3.0, device=device)
        policy.optimizer.state[weight] = {"step": step, "exp_avg": weight.detach(), "exp_avg_sq": weight.detach()}
    inputs = StepInputs.for_step(policy, made()._loss_settings(), StepSettings(0.5))
    assert {state["step"].device.type for state in policy.optimizer.state.values()} == {"meta"}
    assert inputs.steps.shape == (len(weights),)
