"""A calculator for expressions that a model writes: numbers, + - * / // % **, parentheses, and nothing else.

The text is parsed by Python's `ast`, and the tree is evaluated here, never by Python. Length and magnitudes are
limited, so that every call ends at once, with a number or a `ToolError`, whose message the model reads.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

__all__ = ["MAX_CHARACTERS", "MAX_MAGNITUDE", "ToolError", "calculate"]

MAX_CHARACTERS = 120
MAX_MAGNITUDE = 1e15
_ALLOWED = re.compile(r"[\d.+\-*/%() ]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CHARACTER_VARIANTS = str.maketrans({"×": "*", "÷": "/", "−": "-", "$": "", "\t": " "})
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class ToolError(ValueError):
    """A tool call that cannot be answered; its message is shown to the model."""


def calculate(expression: str) -> float:
    """The value of `expression`, a finite float between -1e15 and 1e15; ToolError for anything else."""
    plain = _THOUSANDS.sub("", expression.translate(_CHARACTER_VARIANTS)).strip()
    if len(plain) > MAX_CHARACTERS:
        raise ToolError(f"longer than {MAX_CHARACTERS} characters")
    if not plain.isascii() or not _ALLOWED.fullmatch(plain):
        raise ToolError("only numbers, + - * / // % ** and parentheses")
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ToolError("not a complete expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _within_limits(float(number) if abs(number) <= MAX_MAGNITUDE else math.inf)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            try:
                result = _BINARY[type(sign)](_value(left), _value(right))
            except ZeroDivisionError as error:
                raise ToolError("division by zero") from error
            except OverflowError as error:
                raise ToolError("the result is too large") from error
            return _within_limits(result)
    raise ToolError("not a complete expression")


def _within_limits(number: float | complex) -> float:
    # A negative number to a fractional power is complex in Python.
    if isinstance(number, complex) or math.isnan(number):
        raise ToolError("the result is no real number")
    if abs(number) > MAX_MAGNITUDE:
        raise ToolError("the result is too large")
    return number
