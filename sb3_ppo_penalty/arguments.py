"""Checks of what a user passes in: each error names the argument, its value and what is allowed."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

#: Characters of a name or of a foreign message that are repeated in an error
LONGEST_QUOTE = 300


class ArgumentError(ValueError, AssertionError):
    """
    An argument that is not allowed.

    Also an ``AssertionError``, because SB3 raises that for some of the same mistakes and existing code may catch it.
    """


def quote(text: str) -> str:
    """
    Cut a text to what fits an error message, without characters that move a terminal's cursor.

    :param text: a name or a message, perhaps from a file of unknown origin
    :return: at most ``LONGEST_QUOTE`` printable characters
    """
    return "".join(character if character.isprintable() else "?" for character in text[:LONGEST_QUOTE])


def require(
    condition: bool,
    name: str,
    value: Any,
    allowed: str,
    error: type[ValueError] = ArgumentError,
    show: Callable[[Any], str] = repr,
) -> None:
    """
    Raise an error that names the argument, its value and what is allowed, unless a condition holds.

    :param condition: whether the value is allowed
    :param name: name of the argument, or of an entry of a file
    :param value: value that was passed
    :param allowed: values that may be passed, as the end of the sentence "must be ..."
    :param error: class of the error
    :param show: function that turns the value into a text
    :raises ArgumentError: if the condition is false, or ``error`` if that is another class
    """
    if not condition:
        raise error(f"`{quote(name)}` must be {allowed}, got {show(value)}")


def require_integer(name: str, value: Any, lowest: int) -> None:
    """
    Require an integer of at least some size.

    :param name: name of the argument
    :param value: value that was passed; numpy's integers are allowed, booleans are not
    :param lowest: smallest allowed integer
    :raises ArgumentError: if the value is no integer or too small
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and value >= lowest, name, value, f"an integer of at least {lowest}")


def _fits_float(value: Real) -> bool:
    """
    Tell whether a float can hold a number; a Python integer may be too large.

    :param value: any real number
    :return: whether ``float(value)`` does not overflow
    """
    try:
        float(value)
    except OverflowError:
        return False
    return True


def as_number(value: Any) -> Any:
    """
    Take the number out of a tensor or an array that holds exactly one, as SB3 does by ``float(value)``.

    :param value: any object
    :return: a Python number; the object itself if it does not hold exactly one
    """
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return value


def require_number(
    name: str,
    value: Any,
    lowest: float = -math.inf,
    highest: float = math.inf,
    *,
    open_below: bool = False,
    infinite: bool = False,
    optional: bool = False,
    schedule: bool = False,
) -> None:
    """
    Require a real number within limits.

    :param name: name of the argument
    :param value: value that was passed; numpy's numbers are allowed, booleans are not
    :param lowest: smallest allowed number
    :param highest: largest allowed number
    :param open_below: whether ``lowest`` itself is forbidden
    :param infinite: whether infinity is allowed
    :param optional: whether None is allowed
    :param schedule: whether a function of the remaining progress is allowed (it is not called here)
    :raises ArgumentError: if the value is no number within the limits and none of the allowed alternatives
    """
    if (optional and value is None) or (schedule and callable(value)):
        return
    number = isinstance(value, Real) and not isinstance(value, bool)
    inside = number and (lowest < value if open_below else lowest <= value) and value <= highest
    finite = number and _fits_float(value) and (infinite or math.isfinite(value))
    limits = [f"{'above' if open_below else 'at least'} {lowest:g}"] if lowest > -math.inf else []
    limits += [f"at most {highest:g}"] if highest < math.inf else []
    kind = "a number" if infinite else "a finite number"
    others = ["a schedule"] * schedule + ["None"] * optional
    allowed = " or ".join([" ".join([kind, " and ".join(limits)]).strip(), *others])
    require(inside and finite, name, value, allowed)


def schedule_at(name: str, schedule: Callable[[float], Any], progress: float, *, infinite: bool = False) -> float:
    """
    Return the value of a schedule and require it to be a number of at least 0.

    0 is allowed even for arguments that must be positive as constants, because schedules usually end at 0.

    :param name: name of the argument
    :param schedule: function of the remaining progress that was passed
    :param progress: remaining progress, from 1 to 0
    :param infinite: whether infinity is allowed
    :return: the schedule's value
    :raises ArgumentError: if the value is anything else; names the schedule and the progress
    """
    number = as_number(schedule(progress))
    require_number(f"{name}({progress:g})", number, 0, infinite=infinite)
    return float(number)
