"""The closed form: exact moments, their gradient, and what contributes to it."""

from lowland.exact.api import hessian, moments, trace

__all__ = ["hessian", "moments", "trace"]
