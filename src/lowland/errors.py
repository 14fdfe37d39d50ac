"""Errors with names of their own."""


class UserError(Exception):
    """Something only the user of the command line can put right.

    The message is one line: what was expected, what came, what to do.
    """


class UnsupportedModelError(ValueError):
    """The closed form does not cover a model, a criterion, or what is asked of them."""
