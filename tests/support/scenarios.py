"""Scenarios of a guest script that run side by side in one go, and are asked for one by one by tests."""

from __future__ import annotations

from typing import Any

from support.vm import VmSession


class ScenarioGroups:
    """Runs a group when the first of its scenarios is asked for."""

    def __init__(self, vm: VmSession, script: str, *, timeout_s: float = 400) -> None:
        self._vm, self._script, self._timeout_s = vm, script, timeout_s
        self._found: dict[str, list[dict[str, Any]]] = {}

    def record(self, group: str, name: str | None = None) -> dict[str, Any]:
        """The measurements of the scenario `name`, or of the group's only one.

        Raises:
            AssertionError: the guest noticed a problem in the group, or the scenario said nothing.
        """
        if group not in self._found:
            result = self._vm.run_script(self._script, group, timeout_s=self._timeout_s).check()
            self._found[group] = result.records()
        records = self._found[group]
        problems = [each["text"] for each in records if each["kind"] == "problem"]
        assert not problems, "\n".join(problems)
        found = [each for each in records if each["kind"] == (name or group)]
        assert len(found) == 1, records
        print({key: value for key, value in found[0].items() if not isinstance(value, str) or len(value) < 100})
        return found[0]


def expect_swapped(found: dict[str, Any]) -> None:
    """Cold out and hot kept; a stopped process goes out whole; its hot part comes back."""
    assert found["cold_out_s"] is not None
    assert found["cold_out"] >= 0.95
    assert found["hot_out_worst"] <= 0.02
    assert found["all_out_after_stop_s"] is not None
    assert found["hot_back_after_cont_s"] is not None


def share(places: dict[str, float], node: int) -> float:
    """Of memory that is spread over `places`, the part on `node`; -1 is swap."""
    return places.get(str(node), 0.0)
