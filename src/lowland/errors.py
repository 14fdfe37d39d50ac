"""Errors with names of their own."""


class UserError(Exception):
    """Something only the user of the command line can put right.

    The message is one line: what was expected, what came, what to do.
    """


# What to do with a model that an engine does not cover.
ANY_MODULE = "use method='probes' or, for few parameters, method='dense', which take any module"


class UnsupportedModelError(ValueError):
    """The closed form does not cover a model, a criterion, or what is asked of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import lowland
        >>> norm, criterion, x = nn.LayerNorm(2), nn.MSELoss(), torch.randn(8, 2)
        >>> lowland.hessian_moments(norm, criterion, x, x, method="exact")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lowland.errors.UnsupportedModelError: the closed form ...
    """
