"""How many lines there are about one matter in the daemon's log."""

from __future__ import annotations

from memtier_cli.logquota import LogQuota, Place


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_matter_has_so_many_lines_in_a_window_and_what_was_left_out_is_told() -> None:
    clock = Clock()
    quota = LogQuota(lines_most=2, window_s=10.0, now_s=clock)
    assert [quota.place("a") for _ in range(4)] == [
        Place(True),
        Place(True),
        Place(False, is_full=True),
        Place(False),
    ]
    assert quota.place("b") == Place(True), "others have their own"
    clock.now_s += 9.9
    assert quota.place("a") == Place(False)
    clock.now_s += 0.1
    assert quota.place("a") == Place(True, left_out=3)
    assert quota.place("a") == Place(True)
    assert quota.place("a") == Place(False, is_full=True)


def test_matters_without_end_take_no_memory_without_end() -> None:
    quota = LogQuota(lines_most=1, window_s=10.0, matters_most=3, now_s=Clock())
    quota.place("kept")
    for number in range(1000):
        quota.place(str(number))
        assert not quota.place("kept").wanted, "the one that is heard of stays"
    assert len(quota._windows) == 3
