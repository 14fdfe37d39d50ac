import re

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from study_in_small import PRESET

from lowland.studies.hsr import figures
from lowland.studies.hsr.landscape import rise
from lowland.studies.hsr.run import KINDS
from lowland.studies.reporting import look

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds

BY_METHOD = (10, 11, 12, 14)
METHODS = PRESET.methods | PRESET.ours


def colors_of(figure):
    found = set()
    for ax in figure.axes:
        found |= {to_hex(line.get_color()) for line in ax.lines}
        found |= {to_hex(patch.get_edgecolor()) for patch in ax.patches}
    return found


def test_there_is_every_figure_from_2_to_17():
    assert list(figures.FIGURES) == list(range(2, 18))
    for number, figure in figures.FIGURES.items():
        assert figure.number == number
        assert figure.title
        assert figure.caption.endswith(".")
    assert len({figure.title for figure in figures.FIGURES.values()}) == 16


def test_every_method_has_a_color_that_nothing_else_has():
    assert figures.COLORS.keys() >= METHODS.keys()
    assert look.COLORS.items() <= figures.COLORS.items()
    others = [figures.FIRST, figures.SECOND, figures.INK, figures.PALE]
    everything = [*figures.COLORS.values(), *others]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("number", figures.FIGURES)
def test_each_draws_with_labels_and_the_same_each_time(study, number):
    draw = figures.FIGURES[number].draw
    figure = draw(study)
    assert isinstance(figure, Figure)
    for ax in figure.axes:
        assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title(loc="left")
    assert any(ax.get_xlabel() for ax in figure.axes) or number in {12, 14}
    svg = look.render(figure, "svg")
    assert svg == look.render(draw(study), "svg")
    assert not re.findall(rb"<text[ >]", svg)  # glyphs are drawn, so no font has to be at hand


@pytest.mark.parametrize("number", BY_METHOD)
def test_methods_keep_their_colors(study, number):
    figure = figures.FIGURES[number].draw(study)
    assert colors_of(figure) >= {figures.COLORS[method] for method in METHODS}
    # What is not the paper's says so, in the legend and below the figure.
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in texts if "ours" in text] == [r"$\lambda_{\max}$ (ours)"]
    assert "ours and not the paper's" in figures.FIGURES[number].caption


def test_curves_are_medians_over_the_seeds(study):
    panels = figures.figure_10(study).axes
    for panel, kind in zip(panels[1::2], KINDS, strict=True):
        for line, method in zip(panel.lines, METHODS, strict=True):
            curves = study.controlled[kind, method]["curve_lambda_max"].T.numpy()
            np.testing.assert_allclose(line.get_ydata(), np.median(curves, 1))


def test_boxes_show_every_network(study):
    (ax,) = figures.figure_14(study).axes
    points = [line.get_ydata() for line in ax.lines if line.get_linestyle() == "None"]
    expected = [result["macro_f1"].numpy() for result in study.controlled.values()]
    np.testing.assert_allclose(np.sort(np.concatenate(points)), np.sort(np.concatenate(expected)))


def test_the_loss_along_an_eigenvector_bends_as_its_eigenvalue_says(study):
    result = study.controlled["sharp", "baseline"]
    change = rise(PRESET, result["parameters"], result["top"], (-1e-3, 0, 1e-3)).numpy()
    np.testing.assert_array_equal(change[1], 0)
    curvature = (change[0] + change[2]) / 1e-6
    np.testing.assert_allclose(curvature, result["eigenvalues"][:, -1].numpy(), rtol=1e-3)


def test_thresholds_stand_in_the_histogram(study):
    _, right = figures.figure_9(study).axes
    marks = [line.get_xdata()[0] for line in right.lines]
    assert marks == [study.selection.low, study.selection.high]


def test_the_linear_order_stands_beside_the_quadratic_one(study):
    for ax, name in zip(figures.figure_2(study).axes, ("samples", "parameters"), strict=True):
        table = study.theory["timing"][name].numpy()
        for line, seconds in zip(ax.lines, table[:, 1:].T, strict=True):
            known = ~np.isnan(seconds)
            np.testing.assert_allclose(line.get_ydata(), 1e3 * seconds[known])
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert all(re.search(r"slope -?\d", text) for text in texts)


def test_every_cosine_is_a_point_shaded_by_its_gap(study):
    *panels, bar = figures.figure_17(study).axes
    assert "gap" in bar.get_ylabel()
    found = study.theory["alignment"]
    for row, name in zip((panels[:3], panels[3:]), ("bound", "trace"), strict=True):
        for ax, place in zip(row, ("random", "training", "critical"), strict=True):
            swarms = [part for part in ax.collections if isinstance(part, PathCollection)]
            drawn = np.concatenate([part.get_offsets()[:, 1] for part in swarms])
            np.testing.assert_array_equal(drawn, found[f"{place}_{name}"].flatten())
            shades = np.concatenate([part.get_array() for part in swarms])
            assert np.isfinite(shades).all()
            own = found[f"{place}_gap"].flatten().numpy()
            np.testing.assert_array_equal(shades, own.clip(max=shades.max()))
