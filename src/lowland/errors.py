"""Errors with names of their own."""


class UserError(Exception):
    """Something only the user of the command line can put right.

    The message is one line: what was expected, what came, what to do.
    """


# What to do with a model that an engine does not cover.
ANY_MODULE = "use method='probes' or, for few parameters, method='dense', which take any module"


class UnsupportedModelError(ValueError):
    """The closed form does not cover a model, a criterion, or what is asked of them."""
