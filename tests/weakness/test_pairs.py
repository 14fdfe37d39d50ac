"""The pair proxy against one cold linear program per pair, and what it proves."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lowland.weakness import pair_proxy
from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings, Proof


def rows(z, labels, classes):
    """``W_y z - W_k z`` for k != y, in all weights."""
    blocks = np.zeros((len(z), classes, classes, z.shape[1]))
    for k in range(classes):
        blocks[np.arange(len(z)), k, labels] += z
        blocks[:, k, k] -= z
    return blocks[np.arange(classes) != labels[:, None]].reshape(-1, classes * z.shape[1])


def cold(train, labels, unseen, classes):
    """One linear program for each pair."""
    train, unseen = (np.column_stack([x, np.ones(len(x))]) for x in (train, unseen))
    fixed = rows(train, labels, classes)
    feasible = np.zeros((len(unseen), classes), bool)
    for x in range(len(unseen)):
        for c in range(classes):
            matrix = np.vstack([fixed, rows(unseen[x : x + 1], np.array([c]), classes)])
            result = linprog(
                np.zeros(matrix.shape[1]),
                A_ub=-matrix,
                b_ub=-np.ones(len(matrix)),
                bounds=(None, None),
                method="highs",
            )
            assert result.status in (0, 2)
            feasible[x, c] = result.status == 0
    return feasible


def ask(train, labels, unseen, classes):
    return pair_proxy(
        torch.as_tensor(train, dtype=torch.float64),
        torch.as_tensor(labels),
        torch.as_tensor(unseen, dtype=torch.float64),
        classes,
    )


def problem(seed, classes, features, train, unseen, *, grid=0, separable=True):
    """Points in general position, or on a grid with rectified zeros where ``grid`` is positive."""
    rng = np.random.default_rng(seed)
    x, u = rng.standard_normal((train, features)), rng.standard_normal((unseen, features))
    if grid:
        x, u = np.maximum(np.round(x * grid), 0), np.maximum(np.round(u * grid), 0)
    layer = rng.standard_normal((classes, features))
    labels = (x @ layer.T + rng.standard_normal(classes)).argmax(1)
    return x, (labels if separable else rng.integers(classes, size=train)), u


problems = st.builds(
    lambda seed, classes, features, train, grid, separable: (
        *problem(seed, classes, features, train, 6, grid=grid, separable=separable),
        classes,
    ),
    st.integers(0, 2**32 - 1),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(1, 25),
    st.sampled_from([0, 0, 1, 2]),
    st.booleans(),
)


@pytest.mark.slow
@given(problems)
def test_agrees_with_one_cold_program_per_pair(drawn):
    proxy = ask(*drawn)
    assert not proxy.undecided.any()
    assert np.array_equal(proxy.feasible.numpy(), cold(*drawn))
    assert proxy.count == proxy.feasible.sum()
    assert proxy.total == proxy.feasible.numel()
    assert proxy.verify()


@pytest.mark.slow
@given(problems)
def test_every_pair_has_a_witness_or_a_certificate(drawn):
    train, labels, unseen, classes = drawn
    proxy = ask(*drawn)
    train, unseen = torch.as_tensor(train), torch.as_tensor(unseen)
    for x, c in np.ndindex(*proxy.feasible.shape):
        if proxy.feasible[x, c]:
            witness = proxy.witness(x, c)
            assert torch.equal(witness.scores(train).argmax(1), torch.as_tensor(labels))
            assert witness.scores(unseen[x : x + 1]).argmax() == c
            continue
        found = proxy.certificate(x, c)
        assert (found.weights > 0).all()
        assert (found.rival_weights > 0).all()
        z = torch.cat([train[found.samples], unseen[x].expand(len(found.rivals), -1)])
        z = torch.cat([z, torch.ones(len(z), 1)], 1).double().numpy()
        own = np.append(labels[found.samples], np.full(len(found.rivals), c))
        against = torch.cat([found.against, found.rivals]).numpy()
        weights = torch.cat([found.weights, found.rival_weights]).numpy()
        total = np.zeros((classes, z.shape[1]))
        np.add.at(total, own, weights[:, None] * z)
        np.add.at(total, against, -weights[:, None] * z)
        assert np.abs(total).max() <= 1e-7 * weights.max() * max(np.abs(z).max(), 1)


@pytest.mark.slow
@given(problems, st.integers(0, 2**32 - 1))
def test_affine_maps_of_the_features_change_nothing(drawn, seed):
    train, labels, unseen, classes = drawn
    rng = np.random.default_rng(seed)
    size = train.shape[1]
    # A product of unimodular matrices with small entries keeps points of a grid exact.
    change = np.tril(rng.integers(-1, 2, (size, size)), -1) + np.eye(size)
    change = change @ (np.triu(rng.integers(-1, 2, (size, size)), 1) + np.eye(size))
    shift = rng.integers(-4, 5, size)
    if not np.array_equal(train, np.round(train)):
        change, shift = change * 0.37, shift * 0.1
    mapped = ask(train @ change + shift, labels, unseen @ change + shift, classes)
    assert torch.equal(mapped.feasible, ask(*drawn).feasible)


def test_large_offsets_and_scales_change_nothing():
    train, labels, unseen = problem(0, 4, 3, 40, 12)
    plain = ask(train, labels, unseen, 4)
    scaled = ask(1e-9 * train, labels, 1e-9 * unseen, 4)
    moved = ask(train + 1e6, labels, unseen + 1e6, 4)
    assert torch.equal(scaled.feasible, plain.feasible)
    assert torch.equal(moved.feasible, plain.feasible)
    assert 0 < plain.count < plain.total


def test_of_points_that_cannot_be_separated_it_says_so():
    train = torch.tensor([[0.0], [1.0], [2.0]])
    proxy = pair_proxy(train, torch.tensor([0, 1, 0]), torch.tensor([[0.5]]), 2)
    assert proxy.separable is False
    assert proxy.count == 0
    assert not proxy.undecided.any()
    assert proxy.verify()
    assert len(proxy.certificate(0, 1).rivals) == 0


def test_a_point_on_the_boundary_is_infeasible():
    train = torch.tensor([[0.0, 0.0], [2.0, 2.0], [2.0, 0.0], [0.0, 2.0]]).double()
    middle = torch.tensor([[1.0, 1.0]]).double()
    proxy = pair_proxy(train[:2], torch.tensor([0, 0]), middle, 2)
    assert proxy.feasible.tolist() == [[True, False]]
    twice = pair_proxy(train[:2], torch.tensor([0, 1]), train[:2], 2)
    assert twice.feasible.tolist() == [[True, False], [False, True]]
    crossed = pair_proxy(train, torch.tensor([0, 0, 1, 1]), middle, 2)
    assert crossed.separable is False


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("bits", [24, 40, 52])
@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_what_is_just_inside_or_outside_is_proved(side, bits, offset):
    train = torch.tensor([[0.0], [1.0], [3.0]]).double() + offset
    point = torch.tensor([[1.0 + offset]], dtype=torch.float64) + side * 2.0**-bits
    proxy = pair_proxy(train, torch.tensor([0, 0, 1]), point, 2)
    assert proxy.feasible.tolist() == [[True, side > 0]]
    assert not proxy.undecided.any()
    assert proxy.verify()


@settings(max_examples=15)
@given(problems, st.integers(0, 2**32 - 1))
def test_next_to_training_points_proofs_do_not_depend_on_how_close(drawn, seed):
    train, labels, _, classes = drawn
    train = np.round(8 * train)
    some = train[:4]
    if ask(train, labels, some, classes).separable is False:
        return
    direction = np.random.default_rng(seed).integers(-2, 3, some.shape)
    # On this grid both steps are exact, and no border of the cone lies between them.
    near, nearer = (ask(train, labels, some + 2.0**-bits * direction, classes) for bits in (26, 28))
    settled = ~(near.undecided | nearer.undecided)
    assert torch.equal(near.feasible[settled], nearer.feasible[settled])


@pytest.mark.parametrize("bits", [20, 26, 32])
def test_next_to_training_points_every_pair_is_settled(bits):
    train, labels, _ = problem(7, 3, 2, 30, 1)
    moved = train + 2.0**-bits * np.random.default_rng(0).standard_normal(train.shape)
    proxy = ask(train, labels, moved, 3)
    assert not proxy.undecided.any()
    assert 30 < proxy.count < 90
    assert proxy.verify()


def degenerate():
    """Problems as they go wrong, with what they must agree with."""
    train, labels, unseen = problem(4, 4, 3, 40, 12)
    change = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, -2.0], [0.0, 0.0, 1.0, 1.0]])
    grid, grid_unseen = np.round(8 * train), np.round(8 * unseen)
    single = np.float32
    return {
        "training points twice": (
            (np.tile(train, (2, 1)), np.tile(labels, 2), unseen),
            (train, labels, unseen),
        ),
        "a feature that is zero": (
            (np.pad(train, ((0, 0), (0, 1))), labels, np.pad(unseen, ((0, 0), (0, 1)))),
            (train, labels, unseen),
        ),
        "features that depend on one another": (
            (grid @ change, labels, grid_unseen @ change),
            (grid, labels, grid_unseen),
        ),
        "single precision far from zero": (
            (single(train + 1e6), labels, single(unseen + 1e6)),
            (single(train + 1e6) - 1e6, labels, single(unseen + 1e6) - 1e6),
        ),
        "features at other scales than in training": (
            (1e-8 * train, labels, unseen),
            (train, labels, 1e8 * unseen),
        ),
    }


@pytest.mark.parametrize("name", list(degenerate()))
def test_degenerate_features_change_nothing(name):
    given_, plain = (ask(*part, 4) for part in degenerate()[name])
    assert given_.separable is plain.separable
    assert not given_.undecided.any()
    assert torch.equal(given_.feasible, plain.feasible)
    assert 0 < given_.count < given_.total
    assert given_.verify()


def test_training_points_keep_their_classes():
    train, labels, _ = problem(5, 4, 3, 40, 1)
    proxy = ask(train, labels, train, 4)
    assert torch.equal(proxy.feasible, torch.nn.functional.one_hot(torch.tensor(labels), 4).bool())


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_classes_with_one_point_or_none_are_open(classes):
    train = np.eye(3)[:2]
    proxy = ask(train, np.arange(2), np.random.default_rng(0).standard_normal((5, 3)), classes)
    assert proxy.separable
    assert not proxy.undecided.any()
    # Three features and a bias leave a point outside the hull of two others free.
    assert proxy.count == proxy.total


@pytest.mark.slow
def test_out_of_the_hull_by_rounding_is_left_open_in_bounded_time():
    train, labels, unseen = problem(6, 3, 2, 30, 40)
    change = np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 0.7]])
    proxy = ask(train @ change, labels, unseen @ change, 3)
    plain = ask(train, labels, unseen, 3)
    assert torch.equal(proxy.feasible & plain.feasible, plain.feasible)
    assert proxy.verify()


def test_a_feature_that_only_unseen_points_have_frees_them():
    train, labels, unseen = problem(1, 3, 2, 30, 5)
    train, unseen = np.pad(train, ((0, 0), (0, 1))), np.pad(unseen, ((0, 0), (0, 1)))
    unseen[:, 2] = 1
    assert ask(train, labels, unseen, 3).count == 15


def test_a_false_certificate_is_refused():
    train, labels, unseen = problem(2, 3, 2, 30, 10)
    proxy = ask(train, labels, unseen, 3)
    cone = build_cone(torch.as_tensor(train), torch.as_tensor(labels), torch.as_tensor(unseen), 3)
    proves = Findings(cone).proves
    (pair, proof), *_ = proxy.findings.proofs.items()
    assert proves(proof, pair)
    assert not proves(Proof(proof.point[1:], proof.against[1:], proof.weight[1:]), pair)
    assert not proves(Proof(proof.point, proof.against, proof.weight * 0), pair)
    swapped = Proof(proof.point, (proof.against + 1) % 3, proof.weight)
    assert not proves(swapped, pair)
    for feasible in np.argwhere(proxy.feasible.numpy()):
        assert not proves(proof, tuple(feasible.tolist()))


def test_findings_that_were_tampered_with_do_not_hold():
    train, labels, unseen = problem(2, 3, 2, 30, 10)

    def found():
        findings = ask(train, labels, unseen, 3).findings
        assert findings.hold()
        return findings

    findings = found()
    findings.layers[0] = -findings.layers[0]
    assert not findings.hold()

    findings = found()
    x, c = np.argwhere(findings.witness >= 0)[0]
    others = [
        index
        for index, layer in enumerate(findings.layers)
        if (layer @ findings.cone.unseen[x]).argmax() != c
    ]
    findings.witness[x, c] = others[0]
    assert not findings.hold()

    # A layer that puts every point into one class does not classify the training points.
    findings = found()
    constant = np.zeros_like(findings.layers[0])
    constant[c, -1] = 1.0
    findings.witness[x, c] = len(findings.layers)
    findings.layers.append(constant)
    assert not findings.hold()

    findings = found()
    (pair, proof), *_ = findings.proofs.items()
    findings.proofs[pair] = Proof(proof.point[1:], proof.against[1:], proof.weight[1:])
    assert not findings.hold()


def test_a_layer_settles_only_the_pairs_that_it_puts():
    # Its scores at the unseen point are equal, so that the point is in no class.
    cone = build_cone(
        torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), torch.tensor([[0.0], [0.5]]), 2
    )
    layer = np.array([[-1.0, 0.0], [1.0, 0.0]])
    findings = Findings(cone)
    findings.note(layer[None])
    assert findings.open.tolist() == [[True, True], [True, False]]
    assert not findings.note_exactly(layer, (0, 0))
    assert not findings.note_exactly(layer, (0, 1))
    assert findings.note_exactly(layer, (1, 1))
    assert not findings.note_exactly(-layer, (1, 0))
    assert findings.witness.tolist() == [[-1, -1], [-1, 0]]
    assert findings.hold()


def test_certificates_hold_in_rational_numbers():
    train = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]).double()
    proxy = pair_proxy(train, torch.tensor([0, 0, 0]), torch.tensor([[1.0, 1.0]]).double(), 2)
    found = proxy.certificate(0, 1)
    weights = [Fraction(w) for w in (found.weights / found.rival_weights).tolist()]
    assert sorted(found.samples.tolist()) == [0, 1, 2]
    assert all(abs(w - Fraction(1, 3)) < Fraction(1, 10**12) for w in weights)


def test_the_table_counts_classes():
    train, labels, unseen = problem(3, 3, 2, 20, 4)
    proxy = ask(train, labels, unseen, 3)
    assert proxy.to_frame()["feasible"].tolist() == proxy.feasible.sum(1).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"y_train": torch.tensor([0, 5])}, "labels from 0 to 2"),
        ({"y_train": torch.tensor([0])}, "one label for each of 2"),
        ({"features_unseen": torch.zeros(2, 3)}, "as many"),
        ({"features_train": torch.full((2, 2), torch.nan)}, "NaN"),
    ],
)
def test_wrong_input_is_refused_at_the_door(as_installed, change, message):
    good = {
        "features_train": torch.eye(2),
        "y_train": torch.tensor([0, 1]),
        "features_unseen": torch.zeros(2, 2),
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        pair_proxy(**{**good, **change})


def test_pairs_out_of_range_and_of_the_other_kind_are_refused():
    train, labels, unseen = problem(2, 3, 2, 30, 10)
    proxy = ask(train, labels, unseen, 3)
    (x, c), (u, k) = (np.argwhere(proxy.feasible.numpy() == flag)[0] for flag in (True, False))
    with pytest.raises(ValueError, match="expected an infeasible pair"):
        proxy.certificate(int(x), int(c))
    with pytest.raises(ValueError, match="expected a feasible pair"):
        proxy.witness(int(u), int(k))
    with pytest.raises(ValueError, match="from 0 to 9"):
        proxy.witness(10, 0)


def test_the_result_tells_its_count():
    torch.manual_seed(0)
    found = pair_proxy(torch.randn(6, 2), torch.arange(6) % 2, torch.randn(3, 2), 2)
    assert repr(found).startswith(
        f"PairProxy(count={found.count}, total=6, undecided=0, separable="
    )


def test_labels_that_are_no_tensor_are_refused(as_installed):
    with pytest.raises(TypeError, match=r"y_train must be a torch\.Tensor; got builtins\.list"):
        pair_proxy(torch.randn(6, 2), [0, 1] * 3, torch.randn(3, 2), 2)
