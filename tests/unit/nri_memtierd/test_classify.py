"""Which class and which memory values a container gets from its pod's annotations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_cli.nri_memtierd.classify import (
    REMARKS_MOST,
    ContainerRefused,
    Decision,
    classify,
    memory_value,
    read_annotations,
)
from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass

SWAP = WorkloadClass("swap-idle-data", True, "policy: {}")
TRACK = WorkloadClass("track-working-set-size", False, "policy: {}")
PLAIN = WorkloadClass("plain", None, None)
PRIVATE = WorkloadClass("private", True, None, ("kube-system",))
CONFIG = PluginConfig((SWAP, TRACK, PLAIN, PRIVATE))

CLASS = "class.memtierd.nri.io"
SWAP_MAX = "memory.swap.max.memtierd.nri.io"
HIGH = "memory.high.memtierd.nri.io"


def decide(annotations: dict[str, str], container: str = "c0", **options: object) -> Decision:
    return classify(annotations, container, "default", CONFIG, **options)  # type: ignore[arg-type]


def test_a_pod_without_our_annotations_is_left_alone() -> None:
    assert decide({"class.memory-qos.nri.io": "gold", "app": "x"}) == Decision()


@pytest.mark.parametrize(
    ("workload_class", "unified"),
    [(SWAP, {"memory.swap.max": "max"}), (TRACK, {"memory.swap.max": "0"}), (PLAIN, {})],
)
def test_allowswap_has_three_states(workload_class: WorkloadClass, unified: dict[str, str]) -> None:
    """True: max; false: 0; absent: whatever the kubelet and the runtime chose stays."""
    assert decide({CLASS: workload_class.name}) == Decision(workload_class, unified)


@pytest.mark.parametrize("form", ["c0", "container.c0"])
def test_the_containers_form_beats_the_pods_form(form: str) -> None:
    annotations = {CLASS: "swap-idle-data", f"{CLASS}/{form}": "track-working-set-size"}
    assert decide(annotations).workload_class is TRACK
    assert decide(annotations, "c1").workload_class is SWAP


def test_the_reference_form_beats_the_long_form_of_the_same_container() -> None:
    annotations = {f"{CLASS}/container.c0": "plain", f"{CLASS}/c0": "swap-idle-data"}
    assert decide(annotations).workload_class is SWAP


def test_the_order_of_the_annotations_does_not_matter() -> None:
    pairs = [
        (CLASS, "plain"),
        (f"{CLASS}/c0", "track-working-set-size"),
        (SWAP_MAX, "1048576"),
        (f"{SWAP_MAX}/container.c0", "2097152"),
        (HIGH, "max"),
    ]
    decisions = [decide(dict(order)) for order in itertools.permutations(pairs)]
    assert all(each == decisions[0] for each in decisions)
    assert decisions[0].unified == {"memory.swap.max": "2097152", "memory.high": "max"}


def test_keys_do_not_inherit_as_a_group() -> None:
    """A class for the container leaves the pod's memory.swap.max in force."""
    decision = decide({SWAP_MAX: "4096", f"{CLASS}/c0": "track-working-set-size"})
    assert decision.unified == {"memory.swap.max": "4096"}
    assert decision.workload_class is TRACK


def test_an_empty_class_is_no_class_and_hides_the_pods() -> None:
    annotations = {CLASS: "swap-idle-data", f"{CLASS}/c2": ""}
    assert decide(annotations, "c2") == Decision()
    assert decide({CLASS: ""}) == Decision()


def test_an_empty_memory_value_is_not_unset_it_hides_the_pods_and_the_class() -> None:
    """Handing an empty string on would change nothing with one cgroup driver and fail with the other."""
    annotations = {CLASS: "swap-idle-data", SWAP_MAX: "max", f"{SWAP_MAX}/c0": ""}
    assert decide(annotations).unified == {}
    assert decide(annotations, "c1").unified == {"memory.swap.max": "max"}


def test_an_annotation_for_memory_swap_max_beats_the_class() -> None:
    assert decide({CLASS: "track-working-set-size", SWAP_MAX: "max"}).unified == {"memory.swap.max": "max"}


def test_memory_high_comes_only_from_its_annotation() -> None:
    assert decide({HIGH: "64M"}).unified == {"memory.high": str(64 << 20)}
    assert decide({CLASS: "swap-idle-data"}).unified.keys() == {"memory.swap.max"}


def test_memory_annotations_work_without_any_configuration() -> None:
    decision = classify({SWAP_MAX: "max", HIGH: "1073741824"}, "c0", "default", None)
    assert decision.unified == {"memory.swap.max": "max", "memory.high": "1073741824"}


@pytest.mark.parametrize("annotations", [{CLASS: "gold"}, {f"{CLASS}/c0": "Swap-Idle-Data"}])
def test_an_unknown_class_fails_the_container_and_says_which_exist(annotations: dict[str, str]) -> None:
    """Names are compared exactly, upper and lower case too."""
    with pytest.raises(ContainerRefused) as caught:
        decide(annotations)
    text = str(caught.value)
    assert "is not configured" in text
    assert "plain, private, swap-idle-data, track-working-set-size" in text


def test_an_unknown_class_can_be_ignored_and_is_remarked() -> None:
    decision = decide({CLASS: "gold", SWAP_MAX: "0"}, on_unknown_class="ignore")
    assert decision.workload_class is None
    assert decision.unified == {"memory.swap.max": "0"}
    assert decision.remarks == ("class 'gold' (class.memtierd.nri.io) is not configured; ignored",)


def test_a_class_without_any_configuration_fails_the_container() -> None:
    with pytest.raises(ContainerRefused, match="no configuration"):
        classify({CLASS: "swap-idle-data"}, "c0", "default", None)


def test_a_class_with_namespaces_can_only_be_used_there() -> None:
    assert classify({CLASS: "private"}, "c0", "kube-system", CONFIG).workload_class is PRIVATE
    with pytest.raises(ContainerRefused, match="may not be used in namespace 'default'"):
        decide({CLASS: "private"})


def test_a_memory_annotation_outside_the_allow_list_is_ignored_with_a_remark() -> None:
    config = PluginConfig(CONFIG.classes, allow_annotations=("memory.high",))
    decision = classify({CLASS: "track-working-set-size", SWAP_MAX: "max"}, "c0", "default", config)
    assert decision.unified == {"memory.swap.max": "0"}, "the class is the administrator's word and stays"
    assert "allowannotations" in decision.remarks[0]
    assert decide({"memory.max.memtierd.nri.io": "4096"}).unified == {}, "not in the default list"


def test_an_administrator_can_allow_more_memory_annotations() -> None:
    config = PluginConfig(allow_annotations=("memory.low",))
    decision = classify({"memory.low.memtierd.nri.io/c0": "16Mi"}, "c0", "default", config)
    assert decision.unified == {"memory.low": str(16 << 20)}


def test_an_unknown_key_of_our_suffix_is_remarked_and_ignored() -> None:
    decision = decide({"clas.memtierd.nri.io": "swap-idle-data", "memory.memtierd.nri.io/c0": "1"})
    assert decision.workload_class is None
    assert len(decision.remarks) == 2


def test_what_a_pod_says_is_shown_in_part() -> None:
    """Its annotations may be 256 KiB long, and each of its containers has them in the log and in the status."""
    much = "x" * 250_000
    with pytest.raises(ContainerRefused) as caught:
        decide({CLASS: much})
    assert len(str(caught.value)) < 400
    with pytest.raises(ContainerRefused) as caught:
        decide({f"{CLASS}/c0": "gold", HIGH: "1"} | {f"{CLASS}/container.c0": much})
    assert "'gold'" in str(caught.value)
    with pytest.raises(ContainerRefused) as caught:
        decide({HIGH: much})
    assert len(str(caught.value)) < 400
    decision = decide({f"a{number}.memtierd.nri.io": "" for number in range(5000)})
    assert len(decision.remarks) == REMARKS_MOST + 1
    assert decision.remarks[-1] == f"{5000 - REMARKS_MOST} more annotations are not known and ignored"
    assert len(decide({f"{much}.memtierd.nri.io": ""}).remarks[0]) < 200


@pytest.mark.parametrize("name", [f"{CLASS}/", f"{CLASS}/c0/x", f"{CLASS}/c00", f"{CLASS}/container.c00"])
def test_a_scope_of_another_container_does_not_count(name: str) -> None:
    assert decide({name: "swap-idle-data"}) == Decision()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max", "max"),
        ("0", "0"),
        (" 4096 ", "4096"),
        ("256K", str(256 << 10)),
        ("1g", str(1 << 30)),
        ("1Gi", str(1 << 30)),
        ("9223372036854775807", "9223372036854775807"),
        ("9223372036854775808", None),
        ("99999999999999999999999", None),
        ("9999999T", None),
        ("-1", None),
        ("1.5G", None),
        ("1 G", None),
        ("MAX", None),
        ("0x10", None),
        ("10%", None),
        ("1\n2", None),
        ("\u0661", None),
    ],
)
def test_memory_values_are_max_or_bytes(text: str, value: str | None) -> None:
    assert memory_value(text) == value


def test_a_bad_memory_value_fails_the_container_before_the_runtime_does() -> None:
    with pytest.raises(ContainerRefused) as caught:
        decide({f"{HIGH}/c0": "lots"})
    assert str(caught.value) == (
        "annotation 'memory.high.memtierd.nri.io/c0' has value 'lots' (use max, or bytes such as 268435456 or 256M)"
    )


@given(
    st.dictionaries(
        st.one_of(
            st.text(max_size=20),
            st.builds(
                lambda key, scope: f"{key}.memtierd.nri.io{scope}",
                st.sampled_from(["class", "memory.high", "memory.swap.max", "", "x"]),
                st.one_of(st.just(""), st.text(max_size=12).map(lambda scope: f"/{scope}")),
            ),
        ),
        st.text(max_size=30),
    ),
    st.text(max_size=12),
)
def test_whatever_a_pod_says_the_result_is_a_decision_or_a_refusal(annotations: dict[str, str], name: str) -> None:
    """Nothing but known files with checked values ever reaches the runtime."""
    try:
        decision = classify(annotations, name, "default", CONFIG)
    except ContainerRefused:
        return
    assert decision.unified.keys() <= {"memory.high", "memory.swap.max"}
    assert all(value == "max" or (value.isascii() and value.isdigit()) for value in decision.unified.values())
    assert decision.workload_class is None or decision.workload_class in CONFIG.classes


@given(st.text(max_size=12))
def test_the_values_found_come_from_annotations_that_exist(name: str) -> None:
    annotations = {CLASS: "a", f"{CLASS}/{name}": "b", f"{CLASS}/container.{name}": "c"}
    found = read_annotations(annotations, name)
    assert annotations[found.names["class"]] == found.values["class"]
