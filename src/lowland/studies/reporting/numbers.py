"""Numbers with their errors and p-values, as people read them."""

from __future__ import annotations

import math

from lowland.display import number

__all__ = ["number", "p_value", "plus_minus"]

ROUNDING = 1e-14
"""What differs by less of its own size is one number, computed in two ways in double precision."""

_MOST_DECIMALS = 6  # more are written with an exponent


def p_value(p: float) -> str:
    """``p = 0.034``, or ``p < 0.001``."""
    if math.isnan(p):
        return "p not defined"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def plus_minus(mean: float, stderr: float) -> str:
    """``mean ± standard error``, to the digits that the error leaves; zero if it is rounding."""
    if not math.isfinite(stderr):
        return f"{mean:.3g}"
    if stderr <= ROUNDING * abs(mean):
        return f"{number(mean)} ± 0"
    # One digit of the error, two if it starts with a 1: a second 9 would say nothing.
    # Rounded before the look, or 0.195 would come out as 0.20.
    first, exponent = f"{stderr:.1e}".split("e")
    digits = max(0, (1 if float(first) < 2 else 0) - int(exponent))
    if digits > _MOST_DECIMALS and abs(mean) >= 10.0 ** (2 - _MOST_DECIMALS):
        return f"{mean:.{_MOST_DECIMALS}f} ± {stderr:.0e}"
    if digits > _MOST_DECIMALS or abs(mean) >= 1e7:
        left = math.floor(math.log10(abs(mean))) - int(exponent) if mean else 0
        return f"{mean:.{min(max(left, 2), _MOST_DECIMALS)}e} ± {stderr:.0e}"
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"
