import sys

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from lowland import display


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.500"),
        (-0.00012345, "-0.000123"),
        (0.000012345, "1.23e-05"),
        (9.996, "10.00"),
        (99.96, "100.0"),
        (123.456, "123"),
        (12345.6, "12,300"),
        (1234567.0, "1.23e+06"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_a_number_has_three_digits_and_rarely_an_exponent(value, text):
    assert display.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (1.0, "1"), (1200.0, "1,200"), (0.123456, "0.1235"), (2e-5, "2e-05")],
)
def test_zeros_at_the_end_can_be_left_out(value, text):
    assert display.number(value, 4, zeros=False) == text


def test_the_look_ends_with_the_block():
    before = dict(mpl.rcParams)
    with display.styled():
        assert mpl.rcParams["axes.grid"]
    assert dict(mpl.rcParams) == before


def test_logarithmic_ticks_are_plain_numbers():
    ax = Figure().subplots()
    ax.set_yscale("log")
    linear = ax.xaxis.get_major_formatter()
    display.plain_log_ticks(ax)
    assert ax.yaxis.get_major_formatter()(0.05) == "0.05"
    assert [ax.yaxis.get_minor_formatter()(value) for value in (0.02, 0.03)] == ["0.02", ""]
    assert ax.xaxis.get_major_formatter() is linear


@pytest.mark.parametrize(
    ("package", "use", "call"),
    [
        ("matplotlib", "plot", lambda: display.styled().__enter__()),
        ("pandas", "to_frame", lambda: display.frame({"a": [1]})),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, use, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{use} needs {package} .*lowland\[cli\]"):
        call()
