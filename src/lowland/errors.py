"""What a person at the command line can cause."""


class UserError(Exception):
    """Something only the user can put right.

    The message is one line: what was expected, what came, what to do.
    """
