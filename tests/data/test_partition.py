"""Partitions: laws of all of them, label skew, whole groups, and refusals."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine.core.errors import BadInput
from fedspine.data.partition import column_of, partition


def split(how="iid", *, devices=4, rows=40, labels=None, groups=None, alpha=1.0, seed=0):
    """`partition` with small defaults; makes labels and groups if it needs them."""
    if how.startswith(("dirichlet", "dominant")) and labels is None:
        labels = np.arange(rows) % 5
    return partition(
        how, devices=devices, rows=rows, labels=labels, groups=groups, alpha=alpha, seed=seed
    )


def counts(parts):
    return [len(part) for part in parts]


@st.composite
def cases(draw):
    rows = draw(st.integers(1, 200))
    devices = draw(st.integers(1, rows))
    how = draw(
        st.sampled_from(["iid", "dirichlet", "p:10", "dominant:0.8", "natural", "column:author"])
    )
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    # The first rows name every group once, so that there are never fewer groups than devices.
    names = [str(row) for row in range(devices)]
    groups = names + draw(
        st.lists(st.sampled_from(names), min_size=rows - devices, max_size=rows - devices)
    )
    alpha = draw(st.sampled_from([1e-9, 0.01, 0.1, 1.0, 100.0]))
    return {
        "how": how,
        "devices": devices,
        "rows": rows,
        "labels": labels,
        "groups": groups,
        "alpha": alpha,
        "seed": draw(st.integers(0, 9)),
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_row_is_on_exactly_one_device_and_no_device_is_empty(case):
    parts = partition(**case)
    assert len(parts) == case["devices"]
    assert min(counts(parts)) >= 1
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(case["rows"]))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_same_seed_same_bytes(case):
    once, again = partition(**case), partition(**case)
    assert [part.tobytes() for part in once] == [part.tobytes() for part in again]


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_another_seed_gives_another_division(how):
    assert [p.tolist() for p in split(how, seed=0)] != [p.tolist() for p in split(how, seed=1)]


@given(st.integers(1, 300), st.integers(1, 50))
def test_iid_shares_differ_by_one_row_at_most(rows, devices):
    devices = min(rows, devices)
    sizes = counts(split("iid", rows=rows, devices=devices))
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 120), st.integers(1, 60), st.sampled_from([1e-9, 0.1, 10.0]))
def test_dirichlet_leaves_two_rows_on_every_device_where_there_are_enough(rows, devices, alpha):
    devices = min(rows, devices)
    assert min(counts(split("dirichlet", rows=rows, devices=devices, alpha=alpha))) >= min(
        2, rows // devices
    )


def mean_entropy(parts, labels):
    """The entropy of the labels of a device in nats, averaged over devices."""
    entropies = []
    for part in parts:
        share = np.bincount(labels[part]) / len(part)
        share = share[share > 0]
        entropies.append(-np.sum(share * np.log(share)))
    return float(np.mean(entropies))


def test_label_skew_grows_as_alpha_falls():
    labels = np.arange(4000) % 8
    entropy = [
        np.mean(
            [
                mean_entropy(
                    split("dirichlet", devices=20, rows=4000, labels=labels, alpha=a, seed=s),
                    labels,
                )
                for s in range(3)
            ]
        )
        for a in (100.0, 1.0, 0.1)
    ]
    assert all(before > after for before, after in pairwise(entropy))
    assert entropy[0] > 0.95 * np.log(8)  # alpha 100: next to the uniform ln 8 = 2.08
    # alpha 0.1: the mean entropy of a Dirichlet(0.1) over 8 classes is digamma(1.8) - digamma(1.1)
    # = 0.71
    assert entropy[2] < 0.5 * np.log(8)


@pytest.mark.parametrize("level", [0, 1, 2, 4, 5, 10])
def test_level_p_is_alpha_turned_over(level):
    labels = np.arange(400) % 5
    parts = split(f"p:{level}", devices=8, rows=400, labels=labels, alpha=7.0)
    same = split(
        "dirichlet" if level else "iid", devices=8, rows=400, labels=labels, alpha=1 / max(level, 1)
    )
    assert [part.tolist() for part in parts] == [part.tolist() for part in same]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_dominant_class_is_on_its_device(share):
    labels = np.arange(1000) % 10  # 100 rows of each class, on 10 devices as in the authors' code
    parts = split(f"dominant:{share}", devices=10, rows=1000, labels=labels)
    held = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    others = 100 * (1 - share) / 9
    assert np.abs(np.diag(held) - 100 * share).max() <= 1
    assert np.abs(held - np.diag(np.diag(held)) - others * (1 - np.eye(10))).max() <= 1


def test_dominant_classes_go_round_and_round():
    labels = np.arange(600) % 3
    # two devices share 0.8 of 200 rows
    twice = split("dominant:0.8", devices=6, rows=600, labels=labels)
    held = np.stack([np.bincount(labels[part], minlength=3) for part in twice])
    assert np.abs(held[[0, 3], 0] - 80).max() <= 1 and np.abs(held[[1, 2, 4, 5], 0] - 10).max() <= 1
    # class 2 is the first device's again
    few = split("dominant:1", devices=2, rows=600, labels=labels)
    assert [len(part) for part in few] == [400, 200]
    assert len(split("dominant:0.5", devices=1, rows=600, labels=labels)[0]) == 600


def test_a_column_keeps_groups_whole_and_balances_greedily():
    groups = list("aaaaabbbbcccdde")
    parts = split("column:by", devices=3, rows=15, groups=groups)
    held = sorted("".join(sorted({groups[row] for row in part})) for part in parts)
    # Largest first to the emptiest: a 5, b 4, c 3, then d to c (5), e to b (5).
    assert held == ["a", "be", "cd"]
    assert counts(parts) == [5, 5, 5]


def test_groups_of_equal_size_fall_by_seed():
    groups = [str(row // 2) for row in range(40)]
    divisions = {tuple(map(tuple, split("natural", groups=groups, seed=seed))) for seed in range(5)}
    assert len(divisions) > 1


@pytest.mark.parametrize("how", ["iid", "dirichlet", "natural"])
@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_ten_thousand_devices_in_seconds(how, alpha):
    rows, devices = 100_000, 10_000
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 10, rows), [str(row % 20_000) for row in range(rows)]
    begin = time.process_time()
    parts = split(how, devices=devices, rows=rows, labels=labels, groups=groups, alpha=alpha)
    assert time.process_time() - begin < 6  # quadratic work would take minutes
    assert min(counts(parts)) >= 2 and sum(counts(parts)) == rows


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"devices": 41}, "expected 1 to 40 devices"),
        ({"devices": 0}, "got 0"),
        ({"how": "dirichlet", "alpha": 0.0}, "alpha above 0, got 0.0"),
        ({"how": "dirichlet", "alpha": -1.0}, "alpha above 0, got -1.0"),
        ({"how": "dirichlet", "alpha": float("nan")}, "alpha above 0, got nan"),
        ({"how": "dirichlet", "labels": np.zeros(3)}, "each of 40 rows, got 3"),
        ({"how": "column:by", "groups": ["a"] * 39 + ["b"]}, "4 devices, found 2 groups"),
        ({"how": "column:by", "groups": ["a"] * 3}, "each of 40 rows, got 3"),
        ({"how": "natural"}, "each of 40 rows, got none"),
        ({"how": "dirichlett"}, "did you mean 'dirichlet'?"),
        ({"how": "p:-1"}, "partition 'p:-1' expects a number of at least 0 after 'p:'"),
        ({"how": "p:nan"}, "expects a number of at least 0"),
        ({"how": "p:"}, "write for example 'p:10'"),
        ({"how": "p:1"}, "partition 'p:1' needs labels"),
        ({"how": "dominant:1.1"}, "at least 0 and at most 1 after 'dominant:'"),
        ({"how": "dominant:most"}, "write for example 'dominant:0.8'"),
        ({"how": "dominant:0.8", "labels": np.zeros(3)}, "each of 40 rows, got 3"),
    ],
)
def test_refuses_what_would_leave_a_device_without_rows(case, said):
    with pytest.raises(BadInput) as error:
        split(**case)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_dirichlet_without_labels_is_refused():
    with pytest.raises(BadInput, match="needs labels, and this task has none"):
        partition("dirichlet", devices=2, rows=10, labels=None, groups=None, alpha=1.0, seed=0)


def test_the_column_of_a_partition():
    assert column_of("iid", "file") is None
    assert column_of("dirichlet", None) is None
    assert column_of("natural", "file") == "file"
    assert column_of("column:a:b", None) == "a:b"
    assert column_of("p:10", "file") is None and column_of("dominant:0.8", "file") is None


@pytest.mark.parametrize("how", ["column:", "column", "natural:file", "", "random"])
def test_an_unknown_partition_names_the_known_ones(how):
    with pytest.raises(
        BadInput,
        match="unknown .* known: column:NAME, dirichlet, dominant:SHARE, iid, natural, p:LEVEL",
    ):
        column_of(how, "file")


def test_natural_needs_a_column():
    with pytest.raises(BadInput, match="does not; use 'column:NAME'"):
        column_of("natural", None)
