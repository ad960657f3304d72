"""
The optimizer's step, and the acting policy's networks, as compiled graphs.

On one rank a graph is the whole step: loss, gradient, clipping and Adam. Where several ranks have to sum their gradients in
between, it is loss and gradient alone. A program is traced once for each kind of minibatch and compiled by what is behind
``torch.compile``, on the CPU in a process of its own (:mod:`~sb3_ppo_penalty.compiled.worker`).
"""

import logging
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_penalty.compiled.acting import GraphForward, no_acting_reason
from sb3_ppo_penalty.compiled.module_state import UntraceableError, module_state
from sb3_ppo_penalty.compiled.step import (
    AdamOptions,
    LossModule,
    StepInputs,
    optimized_names,
    unpack_gradient,
    unpack_step,
)
from sb3_ppo_penalty.compiled.trace import ActorProgram, Graph, Program, StepProgram, key_of, trace, traceable
from sb3_ppo_penalty.compiled.worker import CompileWorker, CompileWorkerError, pickled
from sb3_ppo_penalty.rollouts.rollout import Transitions
from sb3_ppo_penalty.updates.step import EagerStepper, Evaluate, Stepper

LOGGER = logging.getLogger(__name__)
Result = TypeVar("Result")

#: A policy or a loss that needs more graphs than that keeps changing: compiling would take longer than it saves
MAX_GRAPHS = 8


def cannot_compile_reason(policy: ActorCriticPolicy) -> str | None:
    """
    Return why the step of a policy and its optimizer cannot be a graph, or None if it can.

    :param policy: the policy with its optimizer
    """
    return _unsupported_optimizer(policy) or _hooks(policy)


def _unsupported_optimizer(policy: ActorCriticPolicy) -> str | None:
    """
    Return what the optimizer does that :func:`~.adam_step` does not, or None.

    :param policy: the policy with its optimizer
    """
    optimizer = policy.optimizer
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"the optimizer is {type(optimizer).__name__}, not Adam"
    if len(optimizer.param_groups) > 1:
        return "the optimizer has more than one group of parameters"
    unusual = [name for name in ("amsgrad", "maximize", "differentiable") if optimizer.param_groups[0][name]]
    if unusual:
        return f"the optimizer is an Adam with {unusual[0]}"
    own = {id(weight) for weight in policy.parameters()}
    if any(id(weight) not in own for weight in optimizer.param_groups[0]["params"]):
        return "the optimizer holds weights that are not the policy's"
    if not optimized_names(policy):
        return "the optimizer holds no weight of the policy that learns"
    complex_valued = [name for name, weight in policy.named_parameters() if weight.is_complex()]
    return f"the weight {complex_valued[0]} is complex" if complex_valued else None


def _hooks(policy: ActorCriticPolicy) -> str | None:
    """
    Return where a user has registered hooks, which torch calls and a graph would not, or None.

    :param policy: the policy with its optimizer
    """
    optimizer = policy.optimizer
    # A learning-rate scheduler of torch's replaces the instance's own `step`
    if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in policy.parameters()):
        return "a weight has hooks"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [type(module).__name__ for module in policy.modules() if any(getattr(module, kind) for kind in kinds)]
    return f"a module, {hooked[0]}, has hooks" if hooked else None


class Compiler:
    """
    Makes compiled steps, and keeps their graphs from update to update.

    :param policy: the policy whose weights move
    :param evaluate: returns the loss; depends on nothing but that policy, the minibatch and the settings
    :param say: tells the user what takes long, in one line
    """

    def __init__(self, policy: ActorCriticPolicy, evaluate: Evaluate, say: Callable[[str], None] = LOGGER.info) -> None:
        self.policy = policy
        self.say = say
        self.loss = LossModule(policy, evaluate)
        #: Graphs of steps and of the acting policy, by the key of their program
        self.graphs: dict[Any, Graph] = {}
        self.actors: dict[Any, Graph] = {}
        self.worker = CompileWorker()
        self.n_compiled = 0
        #: Why there is no compiled step, once that is known
        self.refusal: str | None = None
        #: Why the policy acts without a graph, once that is known
        self.eager_actor: str | None = None

    def stepper(self, eager: EagerStepper, batch_size: int) -> Stepper:
        """
        Return the compiled step, or the eager one where torch cannot compile it.

        :param eager: the eager step of one update
        :param batch_size: the minibatch size to compile for; minibatches of any other size take the eager step
        """
        loss, settings = eager.loss, eager.settings
        idle = settings.learning is not None and not {*settings.learning} & {*optimized_names(self.policy)}
        if idle or not self.can_compile():
            return eager
        if eager.descent.ranks.size == 1:
            options, inputs = AdamOptions.of(self.policy.optimizer), StepInputs.for_step(self.policy, loss, settings)
            return CompiledStep(self, inputs, options, batch_size, eager, partial(unpack_step, settings))
        inputs = StepInputs.for_gradient(self.policy, loss, settings)
        unpack = partial(unpack_gradient, eager.descent)
        eager.differentiate = CompiledStep(self, inputs, None, batch_size, eager.differentiate_eagerly, unpack)
        return eager

    def can_compile(self) -> bool:
        """Return whether steps can be compiled; warn once if they cannot."""
        reason = cannot_compile_reason(self.policy)
        if self.refusal is None and reason is not None:
            self.refuse(reason)
        return self.refusal is None

    def refuse(self, reason: str) -> None:
        """
        Compile nothing from now on, and warn about it.

        :param reason: why, in one line
        """
        self.refusal = reason
        self.worker.close()
        warnings.warn(f"`compile=True` has no effect, training goes on without it: {reason}", RuntimeWarning, stacklevel=2)

    def graph(self, graphs: dict[Any, Graph], program: Program) -> Graph | None:
        """
        Look up the graph of a program, or make it; None where torch cannot make one.

        :param graphs: the graphs made so far, by key; a new one is added
        :param program: the program; its tensors are not changed
        """
        if self.refusal is not None:
            return None
        try:
            return self._lookup(graphs, program)
        # Whatever torch's tracer, its compiler or the machine's C++ compiler raises for a policy of the user's
        except Exception as error:
            self.refuse(in_one_line(error))
            return None

    def _lookup(self, graphs: dict[Any, Graph], program: Program) -> Graph:
        """
        Look up the graph of a program, or make it.

        :param graphs: the graphs made so far, by key; a new one is added
        :param program: the program; its tensors are not changed
        """
        key = (key_of(program), *module_state(self.policy).items())
        with traceable(self.policy):
            if key not in graphs or not program.still_matches(graphs[key]):
                what, start = "acting" if isinstance(program, ActorProgram) else "the update's step", time.perf_counter()
                self.say(f"Compiling {what}: some seconds, or up to a minute the first time on a machine")
                graphs[key] = self._compile(program)
                self.say(f"Compiled {what} in {time.perf_counter() - start:.0f} s")
        return graphs[key]

    def _compile(self, program: Program) -> Graph:
        """
        Compile a program in another process, or in this one where that does not work.

        :param program: the program
        :return: its graph
        :raises UntraceableError: if no graph does what the program does, or none does so for long
        """
        self.n_compiled += 1
        if self.n_compiled > MAX_GRAPHS:
            reason = f"the policy, or the loss, has changed so often that it would need {self.n_compiled} graphs"
            raise UntraceableError(reason)
        failure = None
        if self.policy.device.type == "cpu":
            # The other process knows the code only as it is on disk
            failure = "it came out different there"
            try:
                graph = self.worker(program)
                if program.matches(graph):
                    return graph
            except UntraceableError:
                raise
            # Whatever it was: if the program cannot be compiled here either, the error below says why
            except Exception as error:
                failure = in_one_line(error)
            if isinstance(program, ActorProgram):
                # Acting alone is not worth the compiler's memory
                raise CompileWorkerError(failure)
        graph = compile_here(program)
        if not program.matches(graph):
            raise UntraceableError("the compiled graph comes out different from the policy's own step")
        if failure:
            LOGGER.warning("compiled in the training process, which takes 90 MB more of its memory: %s", failure)
        return graph

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the policy act through one graph, with the random numbers that it would draw itself."""
        attributes = vars(self.policy)
        reason = no_acting_reason(self.policy) if self.can_compile() else None
        if self.refusal is not None or self._acts_eagerly(reason):
            yield
            return
        attributes["forward"] = GraphForward(self.policy, self.actor)
        try:
            yield
        finally:
            del attributes["forward"]

    def actor(self, program: ActorProgram) -> Graph | None:
        """
        Look up the graph by which the policy acts, or make it; None where there is none, which is logged once.

        :param program: the program; its tensors are not changed
        """
        if self.refusal is not None or self.eager_actor is not None:
            return None
        try:
            return self._lookup(self.actors, program)
        except UntraceableError as error:
            # The steps could not be traced either, or not for long
            self.refuse(in_one_line(error))
        # Whatever torch's tracer, its compiler or the machine's C++ compiler raises for a policy of the user's
        except Exception as error:
            self._acts_eagerly(in_one_line(error))
        return None

    def _acts_eagerly(self, reason: str | None) -> bool:
        """
        Note why the policy acts without a graph, and log it once; the steps are compiled all the same.

        :param reason: why, in one line; None if nothing new is known
        :return: whether it does
        """
        if reason is not None and self.eager_actor is None:
            LOGGER.warning("the policy acts without a compiled graph: %s", reason)
        self.eager_actor = self.eager_actor or reason
        return self.eager_actor is not None


class CompiledStep(Generic[Result]):
    """
    Runs one update's minibatches of one size through a graph, and all others eagerly.

    :param compiler: gives the graph when the first minibatch comes
    :param inputs: inputs of the update's steps
    :param options: Adam's constants for whole steps; None for the gradient alone
    :param batch_size: the minibatch size that has a graph; an epoch's last minibatch may be smaller
    :param eager: does the same without a graph
    :param unpack: turns the graph's outputs into what ``eager`` returns
    """

    def __init__(
        self,
        compiler: Compiler,
        inputs: StepInputs,
        options: AdamOptions | None,
        batch_size: int,
        eager: Callable[[Transitions], Result],
        unpack: Callable[[list[th.Tensor]], Result],
    ) -> None:
        self.compiler = compiler
        self.inputs = inputs
        self.options = options
        self.batch_size = batch_size
        self.eager = eager
        self.unpack = unpack
        self.graph: Graph | None = None
        self.fixed: list[th.Tensor] = []

    def __call__(self, batch: Transitions) -> Result:
        """
        Make one step, or compute one gradient.

        :param batch: the minibatch
        """
        if len(batch.actions) != self.batch_size:
            return self.eager(batch)
        if self.graph is None and self.compiler.refusal is None:
            self._find_graph(batch)
        if self.graph is None:
            return self.eager(batch)
        with th.no_grad():
            return self.unpack(self.graph(*self.fixed, *batch.columns))

    def _find_graph(self, batch: Transitions) -> None:
        """
        Look up, or make, the graph of this update.

        :param batch: the first minibatch
        """
        program = StepProgram(self.compiler.loss, self.inputs, batch, self.options)
        self.graph = self.compiler.graph(self.compiler.graphs, program)
        self.fixed = program.fixed_tensors()
        # Further graphs are seldom needed
        self.compiler.worker.close()


def copy_module(module: nn.Module) -> nn.Module:
    """
    Copy a module to trace it: what it does to itself on the way is not done to the original.

    :param module: a module with the policy inside
    :return: the copy; the module itself where it cannot be pickled
    """
    try:
        copy: nn.Module = pickle.loads(pickled(module))
    # Whatever a class's own pickling raises
    except Exception:
        return module
    return copy


def compile_here(program: Program) -> Graph:
    """
    Compile a program in this process.

    :param program: the program
    """
    from torch import _inductor as inductor

    copy: Any = program._replace(module=copy_module(program.module))  # type: ignore[arg-type]
    traced, examples = trace(copy), copy.tensors()
    if examples[0].device.type == "cuda":
        # Launched as one CUDA graph
        return copy_outputs(th.compile(traced, fullgraph=True, dynamic=False, mode="reduce-overhead"))
    # Straight to the compiler behind `torch.compile`, which finds out and checks more at each call than is needed here
    with th.no_grad():
        graph: Graph = inductor.compile(traced, list[Any](examples), {"size_asserts": False})
    return graph


def copy_outputs(graph: Graph) -> Graph:
    """
    Copy what a CUDA graph returns, because its next replay writes to the same memory.

    :param graph: returns tensors that its next call overwrites
    :return: a graph whose results stay as they are
    """
    return lambda *tensors: [tensor.clone() for tensor in graph(*tensors)]


def in_one_line(error: Exception) -> str:
    """
    Return the class of an error and the first line of its message.

    :param error: raised by torch's tracer or compiler
    """
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
