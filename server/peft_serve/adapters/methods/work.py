"""How many floating-point operations linear algebra takes: estimates from shapes, for `SiteLayout.work`.

After the counts of Golub and Van Loan, "Matrix Computations", rounded up.
"""

from __future__ import annotations


def product(rows: int, inner: int, columns: int) -> int:
    """A matrix [rows, inner] times one [inner, columns]."""
    return 2 * rows * inner * columns


def singular_values(rows: int, columns: int) -> int:
    """A singular value decomposition with vectors on both sides, reduced."""
    small, large = sorted((rows, columns))
    return 6 * large * small**2 + 16 * small**3


def orthogonal(rows: int, columns: int) -> int:
    """A reduced QR decomposition, Q formed."""
    small, large = sorted((rows, columns))
    return 4 * large * small**2


def solutions(count: int, size: int) -> int:
    """Square systems with as many right-hand sides as unknowns."""
    return 3 * count * size**3
