"""Distinct values and membership, as numpy's own functions find them, without what those import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.distinct import among, distinct, distinct_counts, distinct_places

numbers = st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 5), max_size=40)


@given(numbers)
def test_distinct_values_are_those_of_numpy(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert distinct(array).tolist() == np.unique(array).tolist()
    assert distinct(array).dtype == np.uint64
    found, places = distinct_places(array)
    wanted, wanted_places = np.unique(array, return_inverse=True)
    assert (found.tolist(), places.tolist()) == (wanted.tolist(), wanted_places.tolist())
    assert list(distinct_counts(array).items()) == [(value, values.count(value)) for value in sorted(set(values))]


@given(numbers, numbers)
def test_membership_is_that_of_numpy(values: list[int], wanted: list[int]) -> None:
    these, those = np.array(values, np.uint64), np.array(wanted, np.uint64)
    assert among(these, those).tolist() == np.isin(these, those).tolist()


def test_negative_numbers_count_as_well() -> None:
    assert distinct_counts(np.array([-1, 3, -1, -14], np.int32)) == {-14: 1, -1: 2, 3: 1}


def test_none_of_it_imports_numpys_masked_arrays() -> None:
    code = """
import sys
import numpy as np
from memtier_engine.distinct import among, distinct, distinct_counts, distinct_places
values = np.arange(1000, dtype=np.uint64) << np.uint64(40)
distinct(values), distinct_counts(values), distinct_places(values), among(values, values[::2])
print("numpy.ma" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
