import re
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from pagecheck import Page

from lowland.studies.compare import report
from lowland.studies.compare.comparison import METRICS, Cell, Comparison, Metric, summarize
from lowland.studies.compare.settings import DEFAULTS, Settings
from lowland.studies.data.dataset import Dataset
from lowland.studies.ensembles.training import BASELINE, METHODS
from lowland.studies.reporting import pages

SHARE = Metric("s", "S", "s", "a share", scale=100, unit=" %")
SVG = dict.fromkeys(("curves", "spectrum", "bound"), b"<svg/>")
ALL = tuple(METHODS.values())


def comparison_of(
    factors, *, methods=ALL, name="Data", converged=False, failed=None, classes=("no", "yes"), **own
):
    """A comparison in which metrics are those of the baseline times these factors, or so."""
    random = np.random.default_rng(0)
    rows = []
    for method in (BASELINE, *(m for m in methods if m != BASELINE)):
        for seed in range(10):
            values = {
                m.name: (-1 if m.name in ("lambda_min", "lower_bound") else 1)
                * factors.get((method.name, m.name), 1.0)
                * (0.9 + 0.01 * seed + 0.002 * random.random())
                for m in METRICS
            }
            learned = seed >= (failed or {}).get(method.name, 0)
            state = {"converged": converged, "learned": learned}
            rows.append({"method": method.name, "seed": seed} | values | state)
    networks = pd.DataFrame(rows)
    x = torch.zeros(4, 2).double()
    y = torch.tensor([0, 1, len(classes) - 1, len(classes) - 1])
    dataset = Dataset(name, x, y, ("u", "v"), classes)
    settings = Settings(methods=methods, seeds=10, **own)
    return Comparison(
        dataset,
        settings,
        networks,
        pd.DataFrame(),
        summarize(networks, test_fraction=1 / 3),
        {method.name: 1.25 for method in settings.methods},
        17,
    )


def test_shares_are_in_percent():
    assert report.with_error(SHARE, Cell(0.975, 0.003, 0.0, 1.0)) == "97.5 ± 0.3"


def test_findings_say_when_flatness_did_not_help():
    said = report.findings(comparison_of({("hsr", "lambda_max"): 0.5}))
    assert len(said) == 4
    assert said[0].startswith("HSR lowered λ_max (0.9")
    assert "did not measurably change test accuracy (" in said[0]
    assert "or test log-loss (" in said[0]
    assert said[1].startswith("Hessian trace did not measurably change λ_max (")
    assert said[-1].endswith("flatter minimum did not come with a measurably better test accuracy.")


def test_findings_say_when_nothing_helped():
    said = report.findings(comparison_of({}))
    assert said[-1].endswith("no method improved test accuracy measurably.")


def test_findings_say_what_got_better_and_what_got_worse():
    factors = {
        ("hsr", "accuracy"): 1.05,
        ("hsr", "lambda_max"): 0.5,
        ("hsr", "log_loss"): 0.5,
        ("flatness-aware", "accuracy"): 0.5,
        ("flatness-aware", "lambda_max"): 2.0,
    }
    said = report.findings(comparison_of(factors))
    assert len(said) == 3  # nothing to regret at the end
    assert re.fullmatch(
        r"HSR lowered λ_max \(.*\) and test log-loss \(.*\)\. It raised test accuracy \(.*\)\.",
        said[0],
    )
    assert "lowered test accuracy (" in said[2]
    assert "raised λ_max (" in said[2]


def test_the_baseline_alone_is_compared_with_nothing():
    said = report.findings(comparison_of({}, methods=(BASELINE,)))
    assert said == ["Only the baseline was trained, so there is nothing to compare it with."]


def test_findings_warn_where_training_failed():
    said = report.findings(comparison_of({}, failed={"baseline": 1, "hsr": 10}))
    assert said[0].startswith(
        "Warning: 1 of 10 networks by Baseline and 10 of 10 networks by HSR learned nothing: "
    )
    assert len(said) == 4  # without a baseline nothing can be concluded
    alone = report.findings(comparison_of({}, methods=(BASELINE,), failed={"baseline": 2}))
    assert alone[0].startswith("Warning: 2 of 10 networks by Baseline learned nothing: ")
    assert len(alone) == 2


def test_networks_that_learned_nothing_do_not_count_in_the_conclusion():
    flat = {("hsr", "lambda_max"): 0.1}
    assert "a flatter minimum did not come" in report.findings(comparison_of(flat))[-1]
    said = report.findings(comparison_of(flat, failed={"hsr": 1}))
    assert "nothing is concluded from these methods" in said[0]
    assert said[-1].endswith("no other method improved test accuracy measurably.")
    better = {("hsr", "accuracy"): 1.5, ("flatness-aware", "lambda_max"): 0.1}
    assert len(report.findings(comparison_of(better))) == 3
    said = report.findings(comparison_of(better, failed={"hsr": 1}))
    assert "a flatter minimum did not come" in said[-1]
    said = report.findings(comparison_of(flat, failed=dict.fromkeys({*METHODS} - {"baseline"}, 1)))
    assert len(said) == 4
    assert "On this data" not in said[-1]


def test_the_page_describes_layers_and_classes():
    classes = ("low", "mid", "high")
    _, parsed = page_of(comparison_of({}, classes=classes, hidden=(32, 16)))
    text = " ".join(parsed.text.split())
    assert "2 inputs, 32 + 16 hidden units (sigmoid), 3 logits: 17 parameters." in text
    assert "classes low (1), mid (1) and high (2)." in text
    assert "descent on cross-entropy" in text
    _, parsed = page_of(comparison_of({}))
    text = " ".join(parsed.text.split())
    assert "4 hidden units (sigmoid), one logit:" in text
    assert "descent on binary cross-entropy" in text


def test_the_table_has_every_measure_and_only_telling_p_values():
    rows = dict(report.table(comparison_of({("hsr", "lambda_max"): 0.5})))
    assert list(rows) == [
        "Test accuracy, %",
        "Test macro-F1, %",
        "Test log-loss",
        "Training loss",
        "λ_max",
        "λ_min",
        "Upper bound",
        "Lower bound",
        "Trace",
        "Seconds",
    ]
    assert [p for _, p in rows["λ_max"]] == ["", "p < 0.001", "", ""]
    assert rows["Seconds"] == [("1.2", "")] * 4


def test_convergence_is_counted_where_it_happened():
    rows = dict(report.table(comparison_of({}, converged=True)))
    assert rows["Converged"] == [("10 of 10", "")] * 4


def page_of(comparison, command="lowland compare --out results"):
    page = report.render_page(comparison, SVG, command=command)
    return page, Page(page)


def test_the_page_needs_no_other_file():
    page, parsed = page_of(comparison_of({}))
    assert parsed.open == []
    assert len(parsed.links) == 3
    assert all(link.startswith("data:image/svg+xml;base64,") for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", page)


def test_the_page_has_everything_that_was_said_and_run():
    comparison = comparison_of({("hsr", "lambda_max"): 0.5}, name="My <data>")
    command = "lowland compare 'a --b.csv' --target 't x' --out results"
    _, parsed = page_of(comparison, command)
    text = " ".join(parsed.text.split())
    assert command in text
    for sentence in report.findings(comparison):
        assert sentence.replace("λ_", "λ") in text
    for method in METHODS.values():
        assert f"{method.title} descends {method.formula}" in text
    for _, cells in report.table(comparison):
        assert all(value in text for value, _ in cells)
    assert "My <data>: 4 samples, 2 features, classes no (1) and yes (3)." in text
    for name, value in pages.versions().items():
        assert f"{name} {value}" in text
    assert "None of the 40 networks did; on data that" in text


def test_the_page_tells_default_weights_from_chosen_ones():
    assert "chosen by the training loss alone on breast-cancer" in page_of(comparison_of({}))[0]
    digits = comparison_of({}, methods=DEFAULTS["digits"].methods)
    assert "chosen by the training loss alone on digits" in page_of(digits)[0]
    chosen = (BASELINE, replace(METHODS["hsr"], weight=2.0))
    page, _ = page_of(comparison_of({}, methods=chosen, converged=True))
    assert "chosen by the training loss alone" not in page
    assert "w = 2<" in page
    assert "20 of the 20 networks did. " in page


def test_names_cannot_break_the_page():
    page, parsed = page_of(comparison_of({}, name="<b>&\"'λ_max"))
    assert "<b>" not in page
    assert "<b>&\"'λ_max" in parsed.text
