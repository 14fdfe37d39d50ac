r"""The matrices of curvature that are measured, by their names.

A loss is a criterion of a model's outputs, :math:`L(\theta) = \ell(f_\theta(x), y)`. With the
Jacobian :math:`J = \partial f / \partial \theta`, its Hessian splits at the outputs ``z``:

.. math:: H = G + R, \qquad G = J^T \, \nabla_z^2 \ell \, J, \qquad
    R = \sum_c \frac{\partial \ell}{\partial z_c} \nabla_\theta^2 z_c

* ``"hessian"`` is ``H``.
* ``"ggn"`` is ``G``, the generalized Gauss-Newton matrix: what is left where the model is taken for
  linear. It is positive semi-definite wherever the criterion is convex in the outputs.
* ``"residual"`` is ``R = H - G``: the model's own second derivatives, weighed by the slopes of the
  criterion, which vanish on samples that are fitted. So the traces add up,
  :math:`\mathrm{Tr} H = \mathrm{Tr} G + \mathrm{Tr} R`.
* ``"fisher"`` is the Fisher information of the model's own predictive distribution,

  .. math:: F = \frac1n \sum_i J_i^T \, E_{y \sim p(y | z_i)} \left[
      \nabla_z \log p(y | z_i) \, \nabla_z \log p(y | z_i)^T \right] J_i,

  with that expectation exact, not sampled: the labels of the data are not in it, as they are in the
  "empirical" Fisher matrix, the second moment of the samples' gradients, which is another one.
  It is weighed as the criterion is, by ``1 / n`` for a mean (:mod:`lowland.likelihoods`).

References:
    N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 14 (2002); J. Martens, New insights and perspectives on the natural gradient
    method, Journal of Machine Learning Research 21 (2020), sections 8 to 11.
"""

from __future__ import annotations

from typing import Literal, get_args

Matrix = Literal["hessian", "ggn", "fisher", "residual"]

SYMBOLS: dict[Matrix, str] = {"hessian": "H", "ggn": "G", "fisher": "F", "residual": "R"}


def check_matrix(matrix: object) -> None:
    """Refuse what is no matrix.

    Raises:
        ValueError: If there is none of that name.
    """
    if matrix not in get_args(Matrix):
        known = ", ".join(map(repr, get_args(Matrix)))
        raise ValueError(f"unknown matrix {matrix!r}: expected one of {known}")
