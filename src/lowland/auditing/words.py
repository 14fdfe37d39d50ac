"""An audit in words: its table, and what follows from it."""

from __future__ import annotations

from math import isfinite, isnan

from lowland import display
from lowland.auditing.findings import Findings
from lowland.auditing.measures import COMPARABLE, HEADINGS, Measure

_DEFINITIONS = (
    "Largest eigenvalue, trace, and upper bound m + s sqrt(P - 1) on the former, of the Hessian H "
    "of the training loss; adaptive: of diag(|w|) H diag(|w|)."
)
_SMALL = 1.1  # ratios below are told in percent


def number(value: float) -> str:
    """Four digits, as many as :func:`lowland.display.number` needs of them."""
    return display.number(value, 4, zeros=False)


def shown(measure: Measure, value: float) -> str:
    """A value of a measure."""
    return f"{value:,.0f}" if measure.is_count else number(value)


def change(audit: Findings, measure: Measure) -> str:
    """By how much a measure changes over all factors."""
    row = audit.values[measure.name]
    if audit.stays(measure.name):
        return "stays"
    if measure.is_count or measure.is_change or not min(row) > 0:
        return f"{shown(measure, min(row))} to {shown(measure, max(row))}"
    ratio = audit.change(measure.name)
    return f"x {number(ratio)}" if ratio >= _SMALL else f"{100 * (ratio - 1):.2g} %"


def table(audit: Findings) -> str:
    """Measures down, factors across; notes; the verdict as the last line."""
    head = ["factor", *(f"{factor:g}" for factor in audit.factors), "changes by"]
    lines: list[list[str]] = [head]
    kind = None
    for measure in audit.measures:
        if measure.kind != kind:
            kind = measure.kind
            lines += [[], [HEADINGS[kind]]]
        cells = [shown(measure, value) for value in audit.values[measure.name]]
        lines.append([f"  {measure.title}", *cells, change(audit, measure)])
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[column]) for line in full) for column in range(len(head))]
    text = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths[: len(line)], strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([_title(audit), "", *text, "", *_notes(audit), "", verdict(audit)])


def _title(audit: Findings) -> str:
    first, second = audit.layers[audit.layer : audit.layer + 2]
    return (
        f"Layer {audit.layer}, {first}, times the factor; layer {audit.layer + 1}, {second}, "
        f"divided by it.\n{audit.parameters:,} trainable parameters in {_bits(audit)}, "
        f"{audit.samples:,} training points, {audit.unseen:,} unseen points."
    )


def _notes(audit: Findings) -> list[str]:
    notes = [_DEFINITIONS, *audit.notes]
    titles = {measure.name: measure.title for measure in audit.measures}
    for name, errors in audit.stderr.items():
        relative = max(
            error / abs(value) if value else 0.0
            for error, value in zip(errors, audit.values[name], strict=True)
        )
        beside = ", and with it the upper bound" if name == "trace" else ""
        notes.append(
            f"Estimated from {audit.probes} directions, the same at all factors: "
            f"{titles[name]}{beside}; relative standard error at most {100 * relative:.2g} %."
        )
    reasons: dict[str, list[str]] = {}
    for name, why in audit.left_out.items():
        reasons.setdefault(why, []).append(name)
    notes += [f"Left out: {', '.join(names)}: {why}." for why, names in reasons.items()]
    return notes


def verdict(audit: Findings) -> str:
    """What may and may not be concluded, from the numbers alone."""
    if not audit.stays("outputs"):
        return _not_preserved(audit)
    lost = [m for m in audit.measures if not all(map(isfinite, audit.values[m.name]))]
    known = [measure for measure in audit.measures if measure not in lost]
    moved = [m for m in known if m.kind == "sharpness" and not audit.stays(m.name)]
    broken = [m for m in known if m.invariant and not audit.stays(m.name)]
    held = [m for m in known if m.kind in COMPARABLE and audit.stays(m.name)]
    mute = [measure for measure in held if audit.saturated(measure.name)]
    held = [measure for measure in held if measure not in mute]
    parts = [_of_sharpness(audit, moved)]
    if lost:
        parts.append(
            f"{_listed([m.title for m in lost])} went beyond what {_bits(audit)} can hold: use "
            "model.double(), or factors closer to 1."
        )
    if broken:
        parts.append(_of_broken(audit, broken))
    if held:
        names = [measure.title for measure in held]
        parts.append(f"{_listed(names)} stay{'s' if len(held) == 1 else ''}")
        parts[-1] += (
            ": networks can be compared by those, which does not show that they generalize, and by "
            "sharpness only where they were trained the same way and not rescaled."
            if moved
            else ", too."
        )
    if mute:
        listed = _listed([f"{m.title} ({shown(m, audit.values[m.name][0])})" for m in mute])
        parts.append(
            f"{listed} stay{'s' if len(mute) == 1 else ''} too, but at a limit, zero or as many as "
            "the unseen points allow: no differences between networks show there."
        )
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _of_sharpness(audit: Findings, moved: list[Measure]) -> str:
    if not moved:
        return (
            "Sharpness did not move beyond rounding, so that these rescalings show nothing against "
            "it: the Hessian is zero, the layers are frozen, or the factors are too close to 1."
        )
    changes = [audit.change(m.name) for m in moved]
    low, high = (number(float(f"{value:.3g}")) for value in (min(changes), max(changes)))
    names = [measure.title for measure in moved]
    if any(map(isnan, changes)):  # a ratio says nothing of what changes its sign
        names, by = [f"{m.title} {change(audit, m)}" for m in moved], ""
    elif max(changes) < _SMALL:
        by = f"by up to {100 * (max(changes) - 1):.2g} % "
    else:
        by = f"by a factor of {high} " if low == high else f"by factors of {low} to {high} "
    predictions = audit.values.get("predictions")
    kept = (
        "without one prediction changing"
        if predictions and not any(predictions)
        else "without an output changing beyond rounding"
    )
    return (
        f"sharpness ({_listed(names)}) moves {by}between factors "
        f"{audit.factors[0]:g} and {audit.factors[-1]:g} {kept}: its absolute value says nothing "
        "about this network against another one."
    )


def _of_broken(audit: Findings, broken: list[Measure]) -> str:
    names = _listed([f"{measure.title} ({change(audit, measure)})" for measure in broken])
    return (
        f"{names} should have stayed and did not, while outputs changed by at most "
        f"{number(max(audit.values['outputs']))} of the largest one: a unit or a score within "
        f"rounding of zero, or derivatives beyond what {_bits(audit)} can hold; use "
        "model.double(), or factors that are powers of two, before concluding anything from it."
    )


def _not_preserved(audit: Findings) -> str:
    outputs, predictions = audit.values["outputs"], audit.values.get("predictions")
    worst = max(outputs)
    flips = f", and {max(predictions):,.0f} predictions change" if predictions else ""
    return (
        f"Outputs did not stay: at factor {audit.factors[outputs.index(worst)]:g} they differ by "
        f"up to {number(worst)} of the largest one{flips}. In {_bits(audit)} these rescalings do "
        "not preserve this network, so that nothing about its sharpness follows from this table: "
        "use model.double(), or factors closer to 1."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _bits(audit: Findings) -> str:
    return str(audit.dtype).removeprefix("torch.")
