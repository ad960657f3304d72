"""
A pytest plugin that runs another project's tests on a class of this package.

The class is bound over the algorithm that the tests are written for before they are imported, and only the cases that concern
that algorithm are run.
"""

import pkgutil
import re
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType

import pytest
from excused import EXCUSED
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_penalty import PPOClip, RecurrentPPOClip


class TRPOWithFixedCovariance(TRPO):
    """sb3-contrib's TRPO, where the names of policies stand for this package's."""

    policy_aliases = PPOClip.policy_aliases


class RecurrentPPOClipWithStockPolicies(RecurrentPPOClip):
    """The recurrent clip, where the names of policies stand for sb3-contrib's: ``RecurrentPPO`` bit for bit."""

    policy_aliases = RecurrentPPO.policy_aliases


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("upstream")
    group.addoption("--over", required=True, type=pkgutil.resolve_name, help="the algorithm that the tests are written for")
    group.addoption("--bind", required=True, type=pkgutil.resolve_name, help="the class to put in its place")
    group.addoption("--at-least", required=True, type=int, help="the number of cases that must pass")


def pytest_configure(config: pytest.Config) -> None:
    bind(config.option.over, config.option.bind)
    config.pluginmanager.register(Tally(config.option.at_least), "tally")


def bind(over: type, bound: type) -> None:
    """Put ``bound`` wherever a module holds ``over``."""
    for module in list(sys.modules.values()):
        if vars(module).get(over.__name__) is over:
            setattr(module, over.__name__, bound)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    over, bound = config.option.over, config.option.bind
    chosen = [item for item in items if concerns(item, over.__name__, bound)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    cases = {item.nodeid.removeprefix("tests/"): item for item in chosen}
    for case, (says, reason) in EXCUSED.get((over.__name__, bound.__name__), {}).items():
        if case not in cases:
            raise pytest.UsageError(f"excused.py lists {case}, and there is no such case")
        cases[case].add_marker(pytest.mark.xfail(reason=reason, raises=pytest.RaisesExc(match=re.escape(says)), strict=True))


def concerns(item: pytest.Function, name: str, bound: type) -> bool:
    """
    Where the case has algorithms as parameters, whether one of them is ours; else, whether its code names it.

    :param name: what the tests call the algorithm
    """
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    known = {algorithm.__name__.lower(): algorithm for algorithm in subclasses(BaseAlgorithm)} | {name.lower(): bound}
    algorithms = {
        known.get(value) if isinstance(value, str) else value for value in parameters if isinstance(value, (str, type))
    }
    algorithms &= {*known.values()}
    return bound in algorithms if algorithms else mentions(item.function, name)


def subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def mentions(function: FunctionType, name: str) -> bool:
    """Whether the function's code, or that of a function beside it that it uses, has the name in it."""
    names = {*names_in(function.__code__)}
    used = [function.__globals__.get(other) for other in names - {function.__name__}]
    helpers = [value for value in used if isinstance(value, FunctionType) and value.__module__ == function.__module__]
    return name in names or any(mentions(helper, name) for helper in helpers)


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


class Tally:
    """Counts the cases that pass, and fails the run if there are too few: a case that is skipped or lost is missed."""

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.passed < self.at_least and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.passed < self.at_least:
            terminalreporter.line(f"{self.passed} cases passed, {self.at_least} should", red=True)
