"""Numbers as people read them."""

from __future__ import annotations


def digits(value: float, count: int) -> str:
    """So many significant ones; 82540 and not 8.254e+04."""
    told = f"{value:.{count}g}"
    return f"{float(told):.0f}" if "e+" in told else told
