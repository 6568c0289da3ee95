"""How sure a mean is: intervals of a ratio of sums, from units that are drawn together."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def ratio_interval(
    numerators: npt.NDArray[np.float64], denominators: npt.NDArray[np.float64]
) -> tuple[float, float] | None:
    """The 95 % interval of Σ numerators / Σ denominators, each entry one unit (a document, a run of tokens).

    The cluster-robust normal interval: units are independent, what is inside a unit need not be. The variance is that
    of the linearised ratio (Cochran, Sampling Techniques, eq. 2.46 without the finite-population factor), the quantile
    Student's with one degree less than units. Nothing is drawn, so it needs no seed. None for fewer than two units.
    """
    units = len(numerators)
    if units < 2:
        return None
    total = float(denominators.sum())
    ratio = float(numerators.sum()) / total
    residual = numerators - ratio * denominators
    error = math.sqrt(units / (units - 1) * float(residual @ residual)) / total
    reach = student_975(units - 1) * error
    return ratio - reach, ratio + reach


def student_975(degrees: int) -> float:
    """The 97.5 % point of Student's distribution: tabled below 6 degrees, from there by expansion around the normal one
    (Abramowitz & Stegun 26.7.5; wrong by less than 0.001)."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
    if degrees <= len(table):
        return table[degrees - 1]
    z, n = _Z, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `hits` of `n`, after Wilson (1927): it stays within 0 and 1, and is no point at
    either end."""
    share, z2 = hits / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - reach), min(1.0, middle + reach)
