"""The compiled step trains the same weights as the eager one, saves SB3's own files, and says so where it cannot be had."""

import copy
import pickle
import re
import subprocess
import sys
import threading
from types import MethodType

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import Sound
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from tracing import TRACED

from sb3_ppo_penalty import MaskablePPOPenalty, PPOClip, PPOPenalty
from sb3_ppo_penalty.compiled import compiler as room
from sb3_ppo_penalty.compiled.acting import GraphForward
from sb3_ppo_penalty.compiled.step import AdamOptions, adam_step
from sb3_ppo_penalty.compiled.worker import CompileWorker, CompileWorkerError, answer

SMALL = {"n_steps": 48, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu"}
TINY = {"net_arch": [16]}


@pytest.fixture
def compiled_here(monkeypatch) -> list[str]:
    """Record what is compiled in the training process instead of the worker."""
    seen, original = [], room.compile_here

    def watched(program):
        seen.append("here")
        return original(program)

    monkeypatch.setattr(room, "compile_here", watched)
    return seen


def made(algorithm, compile: bool = False, env="Pendulum-v1", policy="MlpPolicy", **options):
    env = env if isinstance(env, str) else env()
    return algorithm(policy, env, compile=compile, **{**SMALL, "policy_kwargs": TINY, **options})


def trained(model, updates: int = 3):
    return model.learn(updates * model.n_steps, reset_num_timesteps=False)


def distance(model, other) -> float:
    """Return the largest difference of a weight, relative to the largest weight of its tensor."""
    pairs = zip(model.policy.parameters(), other.policy.parameters(), strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def images() -> gym.Env:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    env.observation_space.seed(0)
    env.action_space.seed(0)
    return env


def several_inputs() -> gym.Env:
    np.random.seed(0)  # it draws its images when it is made
    return SimpleMultiObsEnv(discrete_actions=False)


def masked() -> gym.Env:
    return InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)


def several_masked() -> gym.Env:
    return InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=2)


#: So that large ratios and divergences, which some options are about, occur
FAST = {"learning_rate": 3e-3, "target_kl": 0.001}
CASES = {
    "penalty": (PPOPenalty, {}),
    "penalty, everything": (
        PPOPenalty,
        # Small enough that both clips cut something off
        {"clip_range": lambda p: 0.02 + 0.02 * p, "clip_range_vf": 0.02, "ent_coef": 0.1, "learning_rate": lambda p: 3e-3 * p}
        | {"policy_kwargs": {**TINY, "learn_covariance": True, "optimizer_kwargs": {"weight_decay": 0.01}}},
    ),
    "penalty, full covariance": (
        PPOPenalty,
        {"env": "Reacher-v5", "policy_kwargs": {**TINY, "covariance": [[0.5, 0.1], [0.1, 0.3]]}},
    ),
    "penalty, Discrete, clipped apart": (PPOPenalty, {"env": "CartPole-v1", "max_grad_norm": (0.05, 0.5)}),
    "penalty, images": (*(PPOPenalty, {"env": images, "policy": "CnnPolicy", "n_steps": 16, "batch_size": 8}),),
    "penalty, Dict": (PPOPenalty, {"env": several_inputs, "policy": "MultiInputPolicy", "n_steps": 16, "batch_size": 8}),
    "penalty, MultiDiscrete": (PPOPenalty, {"env": lambda: Sound(spaces.MultiDiscrete([2, 3]))}),
    "penalty, MultiBinary, symmetric": (
        PPOPenalty,
        {
            **FAST,
            "learning_rate": 1e-2,
            "kl_coef": 10.0,
            "env": lambda: Sound(spaces.MultiBinary(3)),
            "kl_penalty": "symmetric",
        },
    ),
    "penalty, masks": (MaskablePPOPenalty, {"env": masked}),
    "penalty, masks of several actions, new_old": (MaskablePPOPenalty, {"env": several_masked, "kl_penalty": "new_old"}),
    "penalty, cutoff, truncated": (PPOPenalty, {**FAST, "kl_penalty": {"cutoff_coef": 100.0}, "max_ratio": 1.1}),
    # Where the covariance stays, both directions are the same
    "penalty, learned covariance, symmetric, cutoff per state": (
        PPOPenalty,
        {**FAST, "kl_penalty": {"direction": "symmetric", "cutoff_coef": 100.0, "per_state": True}}
        | {"policy_kwargs": {**TINY, "learn_covariance": True}},
    ),
    "penalty, sampled, weighted": (PPOPenalty, {**FAST, "kl_penalty": {"sampled": True, "advantage_weighted": True}}),
    "penalty, Discrete, new_old, weighted, constant": (
        PPOPenalty,
        {**FAST, "kl_penalty": {"direction": "new_old", "advantage_weighted": True}, "kl_controller": "fixed"}
        | {"env": "CartPole-v1"},
    ),
    "clip, early stop": (PPOClip, {"target_kl": 0.0005, "learning_rate": 1e-3, "n_epochs": 6}),
    "clip, ragged, gSDE": (PPOClip, {"batch_size": 20, "use_sde": True}),
}


@pytest.mark.filterwarnings("ignore:.*truncated mini-batch.*")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_eager_step(case: str, compiled_here) -> None:
    algorithm, options = CASES[case]
    start = made(algorithm, **options)
    # Each is trained as soon as it is made: its seed is that of the whole process
    eager, compiled = (trained(made(algorithm, compile, **options)) for compile in (False, True))
    assert distance(start, eager) > 1e-2
    assert distance(eager, compiled) < 1e-4
    assert all(type(weight) is th.nn.Parameter for weight in compiled.policy.parameters())
    # One graph, whatever the schedules did and although an epoch's last minibatch may be smaller
    assert eager._compiler is None
    assert len(compiled._compiler.graphs) == 1
    assert compiled_here == []
    assert compiled._n_updates == eager._n_updates
    assert (eager._n_updates < 3 * 6) == (case == "clip, early stop") or eager._n_updates == 9
    for name, value in eager.logger.name_to_value.items():
        if name.startswith("train/"):
            assert compiled.logger.name_to_value[name] == pytest.approx(value, rel=2e-2, abs=1e-5), name
    # PyTorch's own format: what the eager optimizer holds, weight by weight
    states = (model.policy.optimizer.state_dict()["state"] for model in (eager, compiled))
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert ours["step"].item() == theirs["step"].item() > 0
        for mean in ("exp_avg", "exp_avg_sq"):
            scale = ours[mean].abs().max().item()
            th.testing.assert_close(ours[mean] / scale, theirs[mean] / scale, rtol=0, atol=1e-3)


def test_files_know_nothing_of_it(tmp_path) -> None:
    """Files of an eager and a compiled model can be loaded into either, and into stock PPO, and train on alike."""
    options = {"policy": ActorCriticPolicy}
    eager, compiled = (trained(made(PPOClip, compile, **options)) for compile in (False, True))
    for model, name in ((eager, "eager"), (compiled, "compiled")):
        model.save(tmp_path / name)
    continued = {}
    for name in ("eager", "compiled"):
        for compile in (False, True):
            model = PPOClip.load(tmp_path / name, env=gym.make("Pendulum-v1"), compile=compile, device="cpu")
            assert model.compile is compile
            continued[name, compile] = trained(model, 1)
            assert (model._compiler is not None) == compile
    stock = PPO.load(tmp_path / "compiled", env=gym.make("Pendulum-v1"), device="cpu")
    assert distance(stock, compiled) == 0
    trained(stock, 1)
    for model in continued.values():
        assert distance(compiled, model) > 1e-3
        assert distance(stock, model) < 1e-4


class Undecided(FlattenExtractor):
    """Branches on the data, which no graph can do."""

    def forward(self, observations):
        features = super().forward(observations)
        return features if features.sum() > 0 else 0.5 * features


@TRACED
@pytest.mark.parametrize(
    ("policy_kwargs", "reason"),
    [
        ({**TINY, "features_extractor_class": Undecided}, "compile=True.*DataDependent"),
        ({**TINY, "optimizer_class": th.optim.RMSprop}, "compile=True.*RMSprop, not Adam"),
        ({**TINY, "optimizer_kwargs": {"amsgrad": True}}, "compile=True.*Adam with amsgrad"),
    ],
    ids=["policy", "optimizer", "option of Adam"],
)
def test_what_cannot_be_compiled_trains_eagerly_and_says_so(policy_kwargs, reason: str) -> None:
    eager = trained(made(PPOPenalty, policy_kwargs=policy_kwargs))
    compiled = made(PPOPenalty, compile=True, policy_kwargs=policy_kwargs)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        trained(compiled)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert distance(eager, compiled) == 0
    # Nothing of the attempt stays behind: no tensor without data in the policy
    held = [value for value in vars(compiled.policy.action_dist).values() if isinstance(value, th.Tensor)]
    assert held
    assert all(type(value) is th.Tensor for value in held)


@TRACED
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.AdamW])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_step_is_torchs_adam(optimizer, weight_decay: float) -> None:
    generator = th.Generator().manual_seed(0)
    weight = th.randn(7, 3, dtype=th.float64, generator=generator, requires_grad=True)
    adam = optimizer([weight], lr=0.03, betas=(0.8, 0.95), eps=1e-5, weight_decay=weight_decay)
    ours, means = weight.detach().clone(), (th.zeros_like(weight), th.zeros_like(weight))
    for step in range(1, 6):
        weight.grad = th.randn(7, 3, dtype=th.float64, generator=generator)
        count, rate = (th.tensor(x, dtype=th.float64) for x in (step, 0.03))
        ours, *means = adam_step(ours, weight.grad, *means, count, rate, AdamOptions.of(adam))
        adam.step()
        th.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=1e-12)


def test_a_failed_compiled_update_is_undone() -> None:
    model = trained(made(PPOPenalty, compile=True), 1)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in model.policy.optimizer.state.values()]
    model.learning_rate = 1e30
    model._setup_lr_schedule()
    with pytest.raises(FloatingPointError, match="The update was undone"):
        trained(model, 1)
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    restored = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
    assert all(th.equal(old, new) for old, new in zip(moments, restored, strict=True))
    model.learning_rate = 3e-4
    model._setup_lr_schedule()
    trained(model, 1)
    assert len(model._compiler.graphs) == 1
    assert any(not th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


def test_the_guard_leaves_the_compiled_policy_where_it_leaves_the_eager_one() -> None:
    """The guard goes back to the second of six epochs, after which a second graph trains the critic alone."""
    options = {"n_epochs": 6, "learning_rate": 5e-3, "target_kl": 0.001, "guard": "rollback", "max_grad_norm": float("inf")}
    eager, compiled = (trained(made(PPOPenalty, compile, **options), 1) for compile in (False, True))
    epochs = [model.logger.name_to_value["train/guard_epochs"] for model in (eager, compiled)]
    assert epochs == [2, 2]
    assert distance(eager, compiled) < 1e-4
    assert len(compiled._compiler.graphs) == 2
    # With a step size at which neither networks nor rounding agree any more, the bound holds all the same
    compiled.learning_rate = 10.0
    compiled._setup_lr_schedule()
    before = [weight.detach().clone() for weight in compiled.policy.mlp_extractor.policy_net.parameters()]
    trained(compiled, 2)
    assert compiled.logger.name_to_value["train/guard_kl"] > 0.1
    assert compiled.logger.name_to_value["train/kl"] == 0
    assert all(th.equal(a, b) for a, b in zip(before, compiled.policy.mlp_extractor.policy_net.parameters(), strict=True))
    assert len(compiled._compiler.graphs) == 2


class Random(gym.Env):
    """Random observations of any space, whatever is done, in episodes of seven steps."""

    def __init__(self, observation_space, action_space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_space.seed(0)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self.steps == 7, {}

    def action_masks(self):
        """Another action is forbidden at each step; asked for by the algorithm with masks alone."""
        choices = spaces.flatdim(self.action_space) * (2 if isinstance(self.action_space, spaces.MultiBinary) else 1)
        return np.arange(choices) != self.steps % choices


BOX = spaces.Box(-1, 1, (3,), np.float32)
ACTING = {
    "fixed": (BOX, BOX, {}),
    "full": (BOX, BOX, {"policy_kwargs": {**TINY, "covariance": [[0.5, 0.1, 0], [0.1, 0.3, 0], [0, 0, 0.2]]}}),
    "learned": (BOX, BOX, {"policy": ActorCriticPolicy}),
    "gSDE": (BOX, BOX, {"use_sde": True, "sde_sample_freq": 4}),
    "gSDE, squashed": (
        BOX,
        BOX,
        {"policy": ActorCriticPolicy, "use_sde": True, "policy_kwargs": {**TINY, "squash_output": True}},
    ),
    "Discrete": (spaces.Discrete(6), spaces.Discrete(4), {}),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 2]), spaces.MultiDiscrete([3, 4, 2]), {}),
    "MultiBinary": (spaces.MultiBinary(4), spaces.MultiBinary(5), {}),
    "Dict": (spaces.Dict(a=BOX, b=spaces.Discrete(3)), BOX, {"policy": "MultiInputPolicy"}),
    "masks": (BOX, spaces.Discrete(4), {"algorithm": MaskablePPOPenalty}),
    "masks of several actions": (BOX, spaces.MultiDiscrete([3, 4, 2]), {"algorithm": MaskablePPOPenalty}),
    "masks, Dict": (
        spaces.Dict(a=BOX, b=spaces.Discrete(3)),
        spaces.MultiBinary(3),
        {"policy": "MultiInputPolicy", "algorithm": MaskablePPOPenalty},
    ),
}


@pytest.mark.parametrize("case", ACTING)
def test_the_policy_acts_through_a_graph_only_while_it_collects(case: str, caplog) -> None:
    """Actions and random numbers are the eager policy's, and copies of the policy have no graph."""
    observation_space, action_space, options = ACTING[case]
    seen, models = [], []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                policy = self.model.policy
                # torch copies no matrices of gSDE
                copies = () if self.model.use_sde else (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)))
                seen.append((type(policy.forward), *copies))
            return True

    for compile in (False, True):
        options = {"algorithm": PPOClip, "learning_rate": 0.0, **options}
        model = made(compile=compile, env=lambda: Random(observation_space, action_space), **options)
        models.append(model.learn(2 * model.n_steps, callback=Watch()))
    compiled = models[1]
    assert [forward for forward, *_ in seen] == [MethodType, GraphForward]
    assert "forward" not in vars(compiled.policy)
    assert (len(compiled._compiler.actors), caplog.messages) == (1, [])
    buffers = [model.rollout_buffer for model in models]
    for name in ("actions", "values", "log_probs", "rewards"):
        ours, theirs = (getattr(buffer, name) for buffer in buffers)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    observation = compiled.policy.obs_to_tensor(compiled._last_obs)[0]
    for copied in seen[1][1:]:
        with th.no_grad():
            copied.value_net.bias.add_(7.0)
            expected = compiled.policy.forward(observation)[1] + 7
            th.testing.assert_close(copied.forward(observation)[1], expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_the_policys_own_error() -> None:
    """The graph checks nothing, but what comes out of it is checked: the error is that of the eager policy."""
    messages = []
    for compile in (False, True):
        model = made(PPOPenalty, compile).learn(48)
        with th.no_grad():
            model.policy.action_net.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="mean action is not finite") as raised:
            model.learn(48)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


class OwnDraws(ActorCriticPolicy):
    """Draws random numbers that no graph knows."""

    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions + 0 * th.randint(2, actions.shape), values, log_prob


def test_a_policy_that_no_graph_can_act_for_acts_eagerly_and_says_so(caplog) -> None:
    eager, compiled = (made(PPOClip, compile, policy=OwnDraws).learn(96) for compile in (False, True))
    assert (len(compiled._compiler.graphs), len(compiled._compiler.actors)) == (1, 0)
    assert distance(eager, compiled) < 1e-4
    (said,) = caplog.messages
    assert "acts without a compiled graph" in said
    assert "UnknownDrawError: the policy draws random numbers of its own, with aten.randint" in said


@pytest.mark.slow
@TRACED
def test_the_training_process_does_without_the_compiler() -> None:
    """No compiler, which takes 90 MB, is imported here, and the compiling process ends with the first update."""
    options = {**SMALL, "policy_kwargs": TINY}
    code = (
        "import sys; from sb3_ppo_penalty import PPOPenalty; "
        f"model = PPOPenalty('MlpPolicy', 'Pendulum-v1', compile=True, **{options!r}).learn(48); "
        "print(len(model._compiler.graphs), len(model._compiler.actors), model._compiler.worker.process, "
        # torch.optim brings the front of the compiler into every process, stock PPO's too
        "*[name for name in ('torch._inductor.compile_fx', 'torch._inductor.graph') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("1 1 None\n", "")


def test_whoever_listens_is_told_what_takes_long(capsys) -> None:
    made(PPOPenalty, True, verbose=1, env="CartPole-v1").learn(48)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Compil")]
    assert [line.split()[:2] for line in lines] == [
        ["Compiling", "acting:"],
        ["Compiled", "acting"],
        ["Compiling", "the"],
        ["Compiled", "the"],
    ]
    assert all(re.fullmatch(r"Compiled .* in \d+ s", line) for line in lines[1::2])


class Reluctant(FlattenExtractor):
    """Cannot be pickled, so it cannot be sent to the worker."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()


@pytest.mark.parametrize("why", ["not to be pickled", "patched"])
def test_what_another_process_cannot_know_is_compiled_here_and_says_so(why: str, compiled_here, monkeypatch, caplog) -> None:
    options = {"env": "CartPole-v1", "n_epochs": 1}
    if why == "patched":
        # The other process imports the file, which knows nothing of it
        original = PPOPenalty._policy_objective
        monkeypatch.setattr(PPOPenalty, "_policy_objective", lambda *args: tuple(2 * x for x in original(*args)))
    else:
        options["policy_kwargs"] = {**TINY, "features_extractor_class": Reluctant}
    eager, compiled = (trained(made(PPOPenalty, compile, **options), 1) for compile in (False, True))
    assert compiled_here == ["here"]
    assert distance(eager, compiled) < 1e-4
    reason = "it came out different there" if why == "patched" else "cannot pickle '_thread.lock' object"
    *acting, said = [record.getMessage() for record in caplog.records if record.name == room.__name__]
    assert reason in said
    # The same policy cannot be sent to be compiled to act either, but that is nothing that a patched loss is in the way of
    assert ["acts without a compiled graph" in each and reason in each for each in acting] == [True] * (why != "patched")


@TRACED
def test_a_process_that_cannot_be_started_or_understood_is_no_harm(monkeypatch) -> None:
    for nonsense in (b"nonsense", pickle.dumps(None)):
        worked, why = answer(nonsense)
        assert not worked
        assert "Error: " in why
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CompileWorkerError, match="FileNotFoundError"):
        CompileWorker()(None)
    monkeypatch.undo()
    short_lived = CompileWorker()
    monkeypatch.setattr("sb3_ppo_penalty.compiled.worker.SERVE", "{path!r}")
    with pytest.raises(CompileWorkerError, match=r"EOFError|BrokenPipeError"):
        short_lived(None)
    short_lived.close()
    assert short_lived.process is None
