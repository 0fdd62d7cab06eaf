"""A calculator for expressions that a model writes: numbers, + - * / // % **, parentheses, and nothing else.

The text is read by Python's own parser (`ast`) and its tree walked here; nothing is ever evaluated by Python. Lengths,
magnitudes and exponents are bounded, so that every call ends at once, with a number or a `CallError` that says what is
wrong in words meant for the model.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

__all__ = ["LARGEST", "LONGEST", "CallError", "calculate"]

LONGEST = 120  # characters
LARGEST = 1e15
_ALLOWED = re.compile(r"[\d.+\-*/%() ]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "$": "", "\t": " "})
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


class CallError(ValueError):
    """A tool's call that cannot be answered; its message is what the model is told."""


def calculate(expression: str) -> float:
    """The value of `expression`, a finite float of at most 1e15 either way; CallError for anything else."""
    plain = _THOUSANDS.sub("", expression.translate(_SIGNS)).strip()
    if len(plain) > LONGEST:
        raise CallError(f"longer than {LONGEST} characters")
    if not plain.isascii() or not _ALLOWED.fullmatch(plain):
        raise CallError("only numbers, + - * / // % ** and parentheses")
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise CallError("not a complete expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(float(number) if abs(number) <= LARGEST else math.inf)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            try:
                result = _BINARY[type(sign)](_value(left), _value(right))
            except ZeroDivisionError as error:
                raise CallError("division by zero") from error
            except OverflowError as error:
                raise CallError("the result is too large") from error
            return _bounded(result)
    raise CallError("not a complete expression")


def _bounded(number: float | complex) -> float:
    # A negative number to a fractional power is complex in Python.
    if isinstance(number, complex) or math.isnan(number):
        raise CallError("the result is no real number")
    if abs(number) > LARGEST:
        raise CallError("the result is too large")
    return number
