"""What is drawn of a surface, and the page with the one to turn."""

import builtins
import json
import math
import re
from html.parser import HTMLParser

import matplotlib as mpl
import pytest
import torch
from any_models import build
from matplotlib import pyplot as plt
from torch import nn

import lowland
from lowland.landscape.scales import is_logarithmic, levels

mpl.use("Agg")

MSE = nn.MSELoss()


def plane(points=(5, 4), **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    return lowland.surface(model, MSE, (x, y), points=points, **arguments)


def with_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    path = [{n: p + torch.randn_like(p) for n, p in model.state_dict().items()} for _ in range(3)]
    return lowland.surface(model, MSE, (x, y), path=path, points=5)


def made(losses, surface=None):
    """A surface with losses of one's own."""
    surface = surface or plane(tuple(losses.shape))
    return type(surface)(**{**vars(surface), "losses": losses})


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


# Scales


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        ([1.0, 99.0], "auto", False),
        ([1.0, 100.0], "auto", True),
        ([1.0, 100.0, math.inf, math.nan], "linear", False),
        ([1.0, 2.0, math.nan], "log", True),
        ([0.0, 100.0], "auto", False),
        ([-1.0, 100.0], "auto", False),
        ([1.0, math.inf], "auto", False),
    ],
)
def test_the_scale_is_logarithmic_where_losses_span_two_decades(values, scale, expected):
    assert is_logarithmic(torch.tensor(values), scale) is expected


def test_scales_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"smallest one is -1.00: use scale='linear'"):
        is_logarithmic(torch.tensor([-1.0, 2.0]), "log")
    with pytest.raises(ValueError, match=r"no loss on this grid is finite.*smaller extent"):
        is_logarithmic(torch.tensor([math.nan, math.inf]), "auto")


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize(
    ("low", "high"), [(0.03, 4.1), (1e-9, 1e12), (1.0, 1.0), (99.0, 101.0), (1e-30, 2e-30)]
)
def test_levels_rise_from_end_to_end(low, high, logarithmic):
    found = levels(low, high, logarithmic=logarithmic)
    assert found == sorted(set(found))
    assert len(found) <= 11
    assert found[0] <= low
    assert found[-1] >= high
    if high > 2 * low:
        assert len(found) > 4


def test_levels_of_negative_losses_are_round():
    assert levels(-3.2, 2.1, logarithmic=False, count=4)[1:-1] == [-2, -1, 0, 1]


# Figures


def test_contours_have_labels_axes_and_the_models_place():
    surface = with_path()
    ax = surface.plot()
    assert [ax.get_xlabel(), ax.get_ylabel()] == surface.labels
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert legend == {"checkpoints, projected", "the model"}
    path, model = ax.get_lines()
    assert path.get_xydata() == pytest.approx(surface.path.coordinates.numpy())
    assert model.get_xydata().tolist() == [[0, 0]]
    assert ax.get_xlim() == pytest.approx(tuple(surface.coordinates[0][[0, -1]].tolist()))
    (caption,) = [
        t.get_text() for t in ax.figure.findobj(mpl.text.Text) if "Loss on" in t.get_text()
    ]
    assert caption.replace("\n", " ") == surface.caption


def test_the_logarithmic_scale_says_so():
    steep = made(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).double())
    assert steep.plot().figure.axes[1].get_ylabel() == "loss, logarithmic scale"
    assert steep.plot(scale="linear").figure.axes[1].get_ylabel() == "loss"
    assert steep.plot("surface").get_zlabel() == "loss, logarithmic scale"


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_what_is_not_finite_is_seen(kind):
    losses = torch.ones(5, 4).double() + torch.arange(5)[:, None]
    losses[0, 0], losses[3, 2] = math.nan, math.inf
    ax = made(losses).plot(kind)
    assert "no finite loss" in {text.get_text() for text in ax.get_legend().get_texts()}
    ax.figure.canvas.draw()
    whole = made(losses.nan_to_num(1.0, posinf=1.0)).plot(kind)
    assert "no finite loss" not in {text.get_text() for text in whole.get_legend().get_texts()}


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_flat_surfaces_and_single_points_are_drawn(kind):
    made(torch.ones(3, 3).double()).plot(kind).figure.canvas.draw()
    losses = torch.full((3, 3), math.nan).double()
    losses[1, 1], losses[2, 2] = 1.0, 2.0
    ax = made(losses).plot(kind)
    ax.figure.canvas.draw()
    scattered = [c for c in ax.collections if isinstance(c, mpl.collections.PathCollection)]
    assert sum(len(c.get_offsets()) for c in scattered) == 2


def test_points_lie_on_the_surface_that_is_drawn():
    surface = made(torch.tensor([[0.0, 1.0], [2.0, 5.0]]).double())
    places = torch.tensor([[-1.0, -1], [1, 1], [0, 0], [0, 1], [1.5, 0]]).double()
    assert surface.between(places)[:4].tolist() == [0, 5, 2, 3]
    assert surface.between(places)[4].isnan()
    open_edge = made(torch.tensor([[0.0, math.inf], [2.0, math.nan]]).double())
    assert open_edge.between(places[:1]).tolist() == [0]


def test_a_curve_has_one_picture_and_no_page():
    curve = plane(points=9, dimensions=1)
    ax = curve.plot()
    assert ax.get_xlabel() == curve.labels[0]
    assert ax.get_lines()[0].get_ydata() == pytest.approx(curve.losses.numpy())
    with pytest.raises(ValueError, match=r"no surface to turn: use plot\(\)"):
        curve.html()
    assert curve.to_frame().columns.tolist() == ["direction_1", "loss"]
    broken = made(curve.losses.index_fill(0, torch.tensor([8]), math.inf), curve)
    assert "no finite loss" in {text.get_text() for text in broken.plot().get_legend().get_texts()}


def test_axes_of_ones_own_are_drawn_on():
    surface = plane()
    _, ax = plt.subplots()
    assert surface.plot(ax=ax) is ax
    solid = plt.figure().add_subplot(projection="3d")
    assert surface.plot("surface", ax=solid) is solid
    with pytest.raises(ValueError, match="projection='3d'"):
        surface.plot("surface", ax=ax)
    with pytest.raises(ValueError, match="projection=None"):
        surface.plot(ax=solid)


@pytest.mark.usefixtures("as_installed")
def test_unknown_pictures_are_refused():
    surface = plane()
    with pytest.raises(
        ValueError, match="unknown kind 'map': expected one of 'contour', 'surface'"
    ):
        surface.plot("map")
    with pytest.raises(ValueError, match="unknown scale 'root'"):
        surface.html(scale="root")


def test_a_frame_has_a_row_for_each_point():
    surface = plane()
    table = surface.to_frame()
    wide = table.pivot_table(index="direction_1", columns="direction_2", values="loss")
    assert wide.to_numpy() == pytest.approx(surface.losses.numpy())


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    surface, plain = plane(), builtins.__import__

    def without(name, *arguments, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'lowland\[cli\]'"):
        surface.plot()
    assert "<table>" in surface.html()  # which needs nothing


# The page


class Page(HTMLParser):
    """What a browser would see of a page: elements with attributes, and their texts."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text


def embedded(page):
    return json.loads(re.search(r"const data = (\{.*\});", Page(page).scripts[0])[1])


def test_the_page_stands_alone():
    page = with_path().html()
    seen = Page(page)
    assert not seen.open
    assert len(seen.scripts) == 1
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in seen.elements)
    assert "{{" not in page


def test_the_page_has_the_losses_and_says_what_they_are():
    surface = with_path()
    page, data = surface.html(title="Here & <there>"), embedded(surface.html())
    assert torch.tensor(data["z"]) == pytest.approx(surface.losses.numpy(), rel=1e-5)
    assert data["labels"] == surface.labels
    assert torch.tensor(data["path"]["points"]).numpy() == pytest.approx(
        surface.path.coordinates.numpy(), rel=1e-5
    )
    assert data["center"] == pytest.approx(float(surface.between(torch.zeros(1, 2).double())), 1e-5)
    assert "<title>Here &amp; &lt;there&gt;</title>" in page
    (canvas,) = [attributes for tag, attributes in Page(page).elements if tag == "canvas"]
    assert canvas["tabindex"] == "0"
    assert "grid of 5 by 5 points" in canvas["aria-label"]
    assert page.count("<td>") == 25 + 1
    for rule in ("prefers-color-scheme", "prefers-reduced-motion", "<noscript>", "keydown"):
        assert rule in page


def test_points_without_a_loss_are_words_in_the_page():
    losses = torch.ones(5, 4).double()
    losses[0, 0], losses[3, 2], losses[1, 1] = math.nan, math.inf, 3.0
    page = made(losses).html()
    data = embedded(page)
    assert (data["z"][0][0], data["z"][3][2]) == ("nan", "inf")
    assert "<em>nan</em>" in page
    assert "<em>inf</em>" in page
    assert data["canLog"]
    assert not data["log"]
    assert embedded(made(losses).html(scale="log"))["log"]
    assert not embedded(made(losses - 1).html())["canLog"]


def test_what_a_parameter_is_called_cannot_end_the_script():
    surface = plane()
    labelled = type(surface)(**{**vars(surface), "labels": ["</script><b>", "a"]})
    seen = Page(labelled.html())
    assert not seen.open
    assert not any(tag == "b" for tag, _ in seen.elements)


def test_a_table_of_a_fine_grid_has_some_of_its_points():
    losses = torch.ones(120, 3).double() + torch.arange(120)[:, None]
    page = made(losses).html()
    assert "40 by 3 of its points" in page
    assert page.count("<tr>") == 41


def test_the_page_is_written_to_a_file(tmp_path):
    surface = plane()
    surface.to_html(tmp_path / "surface.html", title="λ")
    assert (tmp_path / "surface.html").read_text(encoding="utf-8") == surface.html(title="λ")


def test_progress_is_told_as_studies_tell_it():
    told = []
    model, x, y = build("mlp")
    path = [{n: p + 1 for n, p in model.state_dict().items()} for _ in range(2)]
    lowland.surface(
        model, nn.CrossEntropyLoss(), (x, y), path=path, dimensions=1, points=3,
        on_progress=lambda *piece: told.append(piece),
    )  # fmt: skip
    assert told == [
        *[("checkpoints", i, 2) for i in (1, 2)],
        *[("loss surface", i, 3) for i in (1, 2, 3)],
    ]
