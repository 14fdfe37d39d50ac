"""What is true of last layers, in rational numbers and by no code of the library."""

from fractions import Fraction


def exactly(array):
    """The floats of an array as fractions, in nested lists."""
    if array.ndim:
        return [exactly(part) for part in array]
    return Fraction(float(array))


def dot(one, other):
    return sum((a * b for a, b in zip(one, other, strict=True)), Fraction(0))


def difference(point, own, against, classes):
    """``(W_own - W_against) z`` as coefficients of the weights of all classes but the last."""
    row = [[Fraction(0)] * len(point) for _ in range(classes)]
    row[own] = [a + b for a, b in zip(row[own], point, strict=True)]
    row[against] = [a - b for a, b in zip(row[against], point, strict=True)]
    return [value for part in row[:-1] for value in part]


def contradictory(rows):
    """Whether no ``w`` makes all of ``rows @ w`` positive.

    That is so if and only if nonnegative weights of the rows, with the sum 1, add up to zero
    (Gordan). Those are sought by the simplex method with Bland's rule, which always ends.
    """
    equations = [[*column, Fraction(0)] for column in zip(*rows, strict=True)]
    equations.append([Fraction(1)] * (len(rows) + 1))
    missing = [-sum(column) for column in zip(*equations, strict=True)]
    basis = [len(rows) + index for index in range(len(equations))]
    while True:
        entering = next((j for j, value in enumerate(missing[:-1]) if value < 0), None)
        if entering is None:
            return missing[-1] == 0
        _, _, leaving = min(
            (row[-1] / row[entering], basis[index], index)
            for index, row in enumerate(equations)
            if row[entering] > 0
        )
        basis[leaving] = entering
        pivot = equations[leaving]
        pivot[:] = [value / pivot[entering] for value in pivot]
        for row in (*equations, missing):
            factor = row[entering]
            if row is not pivot and factor:
                row[:] = [a - factor * b if b else a for a, b in zip(row, pivot, strict=True)]
