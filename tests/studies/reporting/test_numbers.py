import pytest

from lowland.studies.reporting.numbers import p_value, plus_minus


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (0.14159, 0.0234, "0.14 ± 0.02"),
        (0.10712, 0.0101, "0.107 ± 0.010"),
        (0.9755, 0.00196, "0.976 ± 0.002"),
        (0.9755, 0.00194, "0.9755 ± 0.0019"),
        (123.4, 32.0, "123 ± 32"),
        (-0.0031, 0.0003, "-0.0031 ± 0.0003"),
        (3e-12, 2e-13, "3.00e-12 ± 2e-13"),
        (0.0, 2e-13, "0.00e+00 ± 2e-13"),
        (3.14159e9, 2e4, "3.14159e+09 ± 2e+04"),
        (3.14159e9, 2e8, "3.14e+09 ± 2e+08"),
        (95.0, 3e-9, "95.000000 ± 3e-09"),
        (-95.0, 8e-15, "-95.0 ± 0"),
        (0.95, 1.2e-16, "0.950 ± 0"),
        (3e-12, 1e-27, "3e-12 ± 0"),
        (1e-16, 1e-16, "1.00e-16 ± 1e-16"),
        (0.5, 0.0, "0.500 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (float("inf"), float("nan"), "inf"),
    ],
)
def test_a_mean_has_the_digits_that_its_error_leaves(mean, stderr, text):
    assert plus_minus(mean, stderr) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0001, "p < 0.001"),
        (0.00456, "p = 0.0046"),
        (0.034, "p = 0.034"),
        (1.0, "p = 1.00"),
        (float("nan"), "p not defined"),
    ],
)
def test_p_values_are_rounded(p, text):
    assert p_value(p) == text
