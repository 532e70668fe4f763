"""Count the floating-point operations of a traced function: products and convolutions, loops multiplied out.

XLA's own cost analysis counts the body of a scan once, which would make a 24-block model look like one block.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs (2 per multiply-add) of `function(*args)`; arguments may be ShapeDtypeStructs.

    Counts dot_general and conv_general_dilated only; element-wise work, a few per cent in these models, is left out.
    Branches count as the most expensive one, loops of unknown length as one round.
    """
    return count_equations(jax.make_jaxpr(function)(*args))


def count_equations(traced: ClosedJaxpr) -> float:
    """Return the FLOPs of a function that `jax.make_jaxpr` has traced already; see `count_flops`."""
    return _count(traced.jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (left_contract, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in left_contract)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = parameters["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(kernel) / kernel[outputs]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
    if name == "cond":
        return max((_count(branch.jaxpr) for branch in parameters["branches"]), default=0.0)
    inner = sum(_count(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value))
    return inner * parameters["length"] if name == "scan" else inner


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
