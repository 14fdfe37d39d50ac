import re
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from lowland.studies.compare import figures
from lowland.studies.ensembles.training import METHODS
from lowland.studies.reporting import look


@pytest.fixture
def networks():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"method": np.repeat(list(METHODS), 6), "seed": list(range(6)) * 4})
    table["lambda_max"] = random.uniform(0.05, 0.3, len(table))
    table["upper_bound"] = table["lambda_max"] * 1.3
    table["trace"] = table["lambda_max"] * 3
    table["lambda_min"] = -table["lambda_max"] / 50
    table["lower_bound"] = -table["upper_bound"]
    table["accuracy"] = random.uniform(0.9, 1, len(table))
    return table


@pytest.fixture
def history():
    steps = [0, 10, 20]
    rows = [
        {"method": m, "seed": s, "step": t, "loss": (s + 1) / (t + 1), "lambda_max": 0.1 * (s + 1)}
        for m in METHODS
        for s in range(5)
        for t in steps
    ]
    return pd.DataFrame(rows)


def drawings(networks, history):
    return {
        "curves": figures.training_curves(history, active_steps=10),
        "spectrum": figures.spectrum_boxes(networks),
        "bound": figures.bound_against_eigenvalue(networks),
    }


def test_every_method_has_a_look_of_its_own():
    assert look.COLORS.keys() == look.MARKERS.keys() == METHODS.keys()
    assert len(set(look.COLORS.values())) == len(set(look.MARKERS.values())) == len(METHODS)


def test_curves_are_medians_between_quartiles(history):
    figure = figures.training_curves(history, active_steps=10)
    loss, eigenvalue = figure.axes
    for line in loss.lines:
        np.testing.assert_allclose(line.get_xdata(), [0, 10, 20])
        np.testing.assert_allclose(line.get_ydata(), 3 / np.array([1, 11, 21]))
    assert len(loss.lines) == len(eigenvalue.lines) == len(METHODS)
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2 / 21, 4))
    assert loss.get_yscale() == eigenvalue.get_yscale() == "log"


@pytest.mark.parametrize(("active", "shaded"), [(10, 1), (0, 0)])
def test_the_time_of_the_penalty_is_shaded(history, active, shaded):
    figure = figures.training_curves(history, active_steps=active)
    assert [len(ax.patches) for ax in figure.axes] == [shaded] * 2
    assert [len(ax.texts) for ax in figure.axes] == [shaded, 0]
    if shaded:
        assert figure.axes[0].patches[0].get_extents().width > 0
        assert figure.axes[0].patches[0].get_width() == active


def test_boxes_show_every_network(networks):
    figure = figures.spectrum_boxes(networks)
    assert len(figure.axes) == 6
    for ax, column in zip(
        figure.axes,
        ["lambda_max", "upper_bound", "trace", "lambda_min", "lower_bound", "accuracy"],
        strict=True,
    ):
        points = np.concatenate(
            [line.get_ydata() for line in ax.lines if line.get_linestyle() == "None"]
        )
        np.testing.assert_allclose(np.sort(points[points != 0]), np.sort(networks[column]))
        low, high = ax.get_ylim()
        assert low < networks[column].min()
        assert high > networks[column].max()


def test_the_bound_lies_above_the_line(networks):
    figure = figures.bound_against_eigenvalue(networks)
    (ax,) = figure.axes
    line, *groups = ax.lines
    np.testing.assert_allclose(line.get_xdata(), line.get_ydata())
    assert sum(len(group.get_xdata()) for group in groups) == len(networks)
    assert ax.get_xlim() == ax.get_ylim()


def test_legends_name_the_methods_drawn(networks, history):
    two = ["baseline", "hsr"]
    some = networks[networks["method"].isin(two)], history[history["method"].isin(two)]
    for figure in drawings(*some).values():
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["Baseline", "HSR"]


def test_nothing_is_cut_or_overlaps_the_legend(networks, history):
    for figure in drawings(networks, history).values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # lays it out
        renderer = canvas.get_renderer()
        legend = figure.legends[0].get_window_extent(renderer)
        for ax in figure.axes:
            box = ax.get_tightbbox(renderer)
            assert not box.overlaps(legend)
            assert box.x0 >= -1
            assert box.y0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1
            assert box.y1 <= figure.bbox.y1 + 1


@pytest.mark.slow
def test_figures_are_files_of_their_kind_and_the_same_each_time(networks, history):
    for first, second in zip(
        drawings(networks, history).values(), drawings(networks, history).values(), strict=True
    ):
        svg = look.render(first, "svg")
        assert svg == look.render(second, "svg")
        assert b"<dc:date>" not in svg
        image = Image.open(BytesIO(look.render(first, "png")))
        assert image.format == "PNG"
        assert image.width >= 800
        texts = re.findall(rb"<text[ >]", svg)
        assert not texts  # glyphs are drawn, so no font has to be at hand


@pytest.mark.slow
def test_the_process_settings_are_left_alone(networks, history):
    before = dict(mpl.rcParams)
    for figure in drawings(networks, history).values():
        look.render(figure, "png")
    assert dict(mpl.rcParams) == before


def test_a_single_network_and_negative_values_are_drawn(networks, history):
    one = networks.groupby("method", sort=False).head(1)
    for figure in drawings(one, history[history["seed"] == 0]).values():
        assert look.render(figure, "png")


def test_saturated_networks_have_no_point_but_a_figure(networks):
    networks["lambda_max"] = 0.0
    figure = figures.bound_against_eigenvalue(networks)
    assert look.render(figure, "svg")
    assert len(figure.legends[0].get_texts()) == len(METHODS)
