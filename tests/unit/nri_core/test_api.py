"""Events, adjustments, updates, the life of a session, and a plugin's identity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nri_core import (
    Adjustment,
    Container,
    ContainerState,
    Device,
    EventMask,
    Mount,
    Plugin,
    Pod,
    Resources,
    Rlimit,
    Update,
)
from nri_core.api.adjust import update_from_message
from nri_core.api.events import FROM_V0_10, HANDLERS, UP_TO_V0_9, known_events, parse_events, pretty
from nri_core.api.model import container_from_message, container_to_message, pod_from_message, pod_to_message
from nri_core.errors import ConfigurationRefused, LocalProtocolError, RemoteProtocolError
from nri_core.pb import nri_pb2
from nri_core.plugin import identity
from nri_core.session import LIFE, MAX_SYNCHRONIZED_BYTES, Session, State, Step

POD = Pod("p1", "web", "default", annotations={"a": "b"}, labels={"l": "m"}, cgroup_parent="/kubepods", ips=("::1",))
CONTAINER = Container(
    "c1",
    "p1",
    "main",
    ContainerState.RUNNING,
    annotations={"x": "y"},
    args=("sh", "-c", "true"),
    env=("A=1",),
    mounts=(Mount("/data", "/srv", "bind", ("ro",)),),
    cgroups_path="/kubepods/c1",
    unified={"memory.high": "1"},
    memory_limit_bytes=0,
    pid=77,
)


def test_records_survive_the_wire() -> None:
    assert pod_from_message(nri_pb2.PodSandbox.FromString(pod_to_message(POD).SerializeToString())) == POD
    message = nri_pb2.Container.FromString(container_to_message(CONTAINER).SerializeToString())
    assert container_from_message(message) == CONTAINER
    assert container_from_message(message).raw == message


def test_a_state_of_a_newer_runtime_is_unknown() -> None:
    message = nri_pb2.Container.FromString(bytes.fromhex("2063"))  # field 4, state 99
    assert container_from_message(message).state is ContainerState.UNKNOWN


def test_an_adjustment_puts_removals_before_settings() -> None:
    message = (
        Adjustment()
        .annotation("keep", "1")
        .remove_annotation("gone")
        .remove_annotation("replaced")
        .annotation("replaced", "2")
        .remove_mount("/old")
        .mount(Mount("/new", "/src", "bind", ("rw",)))
        .remove_env("OLD")
        .env("NEW", "3")
        .command("sleep", "1")
        .unified("memory.swap.max", "max")
        .oom(0)
        .to_message()
    )
    assert dict(message.annotations) == {"-gone": "", "-replaced": "", "keep": "1", "replaced": "2"}
    assert [mount.destination for mount in message.mounts] == ["-/old", "/new"]
    assert [(each.key, each.value) for each in message.env] == [("-OLD", ""), ("NEW", "3")]
    assert list(message.args) == ["", "sleep", "1"]
    assert message.linux.resources.unified["memory.swap.max"] == "max"
    assert message.linux.HasField("oom_score_adj")


def test_the_last_value_of_a_key_holds_and_a_removal_withdraws_it() -> None:
    """A key claimed twice would be a conflict with oneself."""
    twice = Adjustment().annotation("k", "1").annotation("k", "2").env("E", "1").env("E", "2")
    twice = twice.mount(Mount("/m", "/a")).mount(Mount("/m", "/b"))
    message = twice.to_message()
    assert dict(message.annotations) == {"k": "2"}
    assert [each.value for each in message.env] == ["2"]
    assert [each.source for each in message.mounts] == ["/b"]
    assert dict(twice.remove_annotation("k").to_message().annotations) == {"-k": ""}


def test_builders_leave_the_object_they_were_called_on_alone() -> None:
    first = Adjustment().annotation("a", "1")
    first.annotation("b", "2")
    assert dict(first.to_message().annotations) == {"a": "1"}
    assert not Adjustment()
    assert first


@pytest.mark.parametrize("key", ["", "-k"])
def test_a_key_that_would_mean_a_removal_is_refused(key: str) -> None:
    with pytest.raises(LocalProtocolError, match="remove_"):
        Adjustment().annotation(key, "v")
    with pytest.raises(LocalProtocolError):
        Adjustment().unified(key, "v")


def test_every_kind_of_key_can_be_set_removed_and_replaced() -> None:
    message = (
        Adjustment()
        .device(Device("/dev/keep", "c", 1, 3, file_mode=0, uid=0))
        .device(Device("/dev/gone", "c"))
        .remove_device("/dev/gone")
        .sysctl("net.a", "1")
        .remove_sysctl("net.b")
        .remove_namespace("uts")
        .namespace("ipc", "/proc/1/ns/ipc")
        .remove_net_device("eth7")
        .net_device("eth8", "inner")
        .rlimit(Rlimit("RLIMIT_NOFILE", 10, 20))
        .rlimit(Rlimit("RLIMIT_NOFILE", 11, 20))
        .cdi_device("vendor.com/gpu=0")
        .cdi_device("vendor.com/gpu=0")
        .to_message()
    )
    assert [each.path for each in message.linux.devices] == ["-/dev/gone", "/dev/keep"]
    keep = message.linux.devices[1]
    assert keep.HasField("file_mode")
    assert keep.HasField("uid")
    assert not keep.HasField("gid")
    assert dict(message.linux.sysctl) == {"-net.b": "", "net.a": "1"}
    assert [(each.type, each.path) for each in message.linux.namespaces] == [("-uts", ""), ("ipc", "/proc/1/ns/ipc")]
    assert {key: each.name for key, each in message.linux.net_devices.items()} == {"-eth7": "", "eth8": "inner"}
    assert [each.soft for each in message.rlimits] == [11]
    assert [each.name for each in message.CDI_devices] == ["vendor.com/gpu=0"]
    assert not Adjustment().annotation("a", "b").to_message().HasField("linux")


def test_what_has_no_method_is_merged_as_a_message() -> None:
    hooks = nri_pb2.ContainerAdjustment(hooks=nri_pb2.Hooks(prestart=[nri_pb2.Hook(path="/bin/true")]))
    policy = nri_pb2.ContainerAdjustment()
    policy.linux.memory_policy.nodes = "0-1"
    message = Adjustment().oom(5).merge(hooks).merge(policy).to_message()
    assert [hook.path for hook in message.hooks.prestart] == ["/bin/true"]
    assert (message.linux.memory_policy.nodes, message.linux.oom_score_adj.value) == ("0-1", 5)


_OPTIONAL = st.none() | st.integers(0, 2**40)


@given(
    st.builds(
        Resources,
        unified=st.dictionaries(st.text(min_size=1, max_size=9), st.text(max_size=9), max_size=3),
        memory_limit_bytes=_OPTIONAL,
        memory_swap_bytes=st.none() | st.integers(-1, 2**40),
        memory_swappiness=_OPTIONAL,
        cpu_shares=_OPTIONAL,
        cpu_quota_us=st.none() | st.integers(-1, 2**40),
        cpuset_cpus=st.none() | st.text(min_size=1, max_size=5),
        pids_limit=st.none() | st.integers(-1, 2**40),
        hugepage_limits=st.dictionaries(st.sampled_from(["2MB", "1GB"]), st.integers(0, 2**40)),
        blockio_class=st.none() | st.text(max_size=5),
    )
)
def test_limits_survive_the_wire_with_zeros_and_absences_kept_apart(resources: Resources) -> None:
    data = Update("c", resources, True).to_message().SerializeToString()
    assert update_from_message(nri_pb2.ContainerUpdate.FromString(data)) == Update("c", resources, True)


def test_limits_set_one_after_another_add_up() -> None:
    update = Update("c").unified("memory.high", "1").limits(Resources(cpu_shares=0)).limits(Resources(cpuset_mems="1"))
    update = update.unified("memory.high", "2").unified("memory.max", "3")
    wanted = Resources(unified={"memory.high": "2", "memory.max": "3"}, cpu_shares=0, cpuset_mems="1")
    assert update.resources == wanted


def test_zero_is_a_value_and_none_is_an_absence() -> None:
    update = Update("c1").limits(Resources(memory_limit_bytes=0, cpu_quota_us=-1)).unified("memory.high", "max")
    linux = update.to_message().linux.resources
    assert linux.memory.HasField("limit")
    assert not linux.cpu.HasField("shares")
    assert linux.cpu.quota.value == -1
    assert dict(linux.unified) == {"memory.high": "max"}


@pytest.mark.parametrize(
    ("name", "version", "nri", "known"),
    [
        ("containerd", "v1.7.24", "", UP_TO_V0_9),
        ("containerd", "v2.1.6", "", UP_TO_V0_9),
        ("containerd", "v2.2.0", "", FROM_V0_10),
        ("v2", "v2.0.1", "", UP_TO_V0_9),
        ("containerd", "v2.0.0-10-gabcdef.m", "", UP_TO_V0_9),
        ("containerd", "v2.3.0", "v0.12.0", FROM_V0_10),
        ("containerd", "unreadable", "(devel)", UP_TO_V0_9),
        ("cri-o", "1.32.0", "", UP_TO_V0_9),
        ("cri-o", "1.33.1", "", EventMask(0x1FFF)),
        ("cri-o", "1.34.0", "", FROM_V0_10),
        ("something", "9.9", "", UP_TO_V0_9),
        ("something", "1.0", "v0.9.0", UP_TO_V0_9),
    ],
)
def test_only_events_that_the_runtime_knows_are_subscribed(name: str, version: str, nri: str, known: EventMask) -> None:
    assert known_events(name, version, nri) == known


def test_event_texts_are_read_and_written() -> None:
    assert parse_events("RunPodSandbox, createcontainer") == EventMask.RUN_POD_SANDBOX | EventMask.CREATE_CONTAINER
    assert parse_events("all") == FROM_V0_10
    assert parse_events("pod") == 0x1807
    assert EventMask.VALIDATE_CONTAINER_ADJUSTMENT in parse_events("container")
    assert pretty(0x4009) == "RunPodSandbox,CreateContainer,unknown(0x4000)"
    with pytest.raises(ValueError, match="no event"):
        parse_events("createcontaine")


def test_a_runtime_too_old_for_what_a_plugin_requires_is_an_error_with_the_reason() -> None:
    """A validator that is never asked would be worse than none."""
    session = Session()
    session.step(Step.REGISTER)
    request = nri_pb2.ConfigureRequest(runtime_name="containerd", runtime_version="v1.7.24")
    with pytest.raises(ConfigurationRefused, match=r"v1.7.24 does not know.*ValidateContainerAdjustment.*2\.2"):
        session.configured(request, EventMask(0), EventMask.VALIDATE_CONTAINER_ADJUSTMENT)


def test_a_synchronize_without_end_is_refused_at_the_limit_and_let_go_of() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    part = nri_pb2.SynchronizeRequest(pods=[nri_pb2.PodSandbox(name="x" * (4 << 20))], more=True)
    for _ in range(MAX_SYNCHRONIZED_BYTES // (4 << 20) - 1):
        assert session.synchronized(part) is None
    with pytest.raises(RemoteProtocolError, match="more than"):
        session.synchronized(part)


def test_a_launched_plugin_of_an_old_runtime_gets_events_without_synchronize() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    session.step(Step.EVENT)
    assert session.state is State.SERVING


def test_every_event_has_a_method_on_the_plugin() -> None:
    for method in HANDLERS.values():
        assert callable(getattr(Plugin, method))


def test_the_subscription_follows_what_is_overridden() -> None:
    class Mine(Plugin):
        def create_container(self, pod: Pod, container: Container) -> None:
            return None

        async def stop_container(self, pod: Pod, container: Container) -> None:
            return None

    assert Mine().events() == EventMask.CREATE_CONTAINER | EventMask.STOP_CONTAINER
    assert Plugin().events() == 0


def test_a_plugin_that_wants_nothing_does_not_ask_for_everything() -> None:
    """0 on the wire means all events."""
    session = Session()
    session.step(Step.REGISTER)
    assert session.configured(nri_pb2.ConfigureRequest(runtime_name="containerd"), EventMask(0)) != 0


def test_time_limits_that_an_old_runtime_does_not_tell_have_defaults() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    assert session.runtime is not None
    assert (session.runtime.registration_timeout_s, session.runtime.request_timeout_s) == (5.0, 2.0)


def test_the_life_of_a_session_is_its_table() -> None:
    """Every step from every state: it leads where the table says, or is an error of whoever made it."""
    for state, steps in LIFE.items():
        for step in Step:
            session = Session()
            session.state = state
            if step is Step.CLOSE or step in steps:
                session.step(step)
                assert session.state is (State.CLOSED if step is Step.CLOSE else steps[step])
            else:
                ours = step in (Step.REGISTER, Step.UPDATE)
                with pytest.raises(LocalProtocolError if ours else RemoteProtocolError):
                    session.step(step)


def test_a_split_synchronize_is_collected_in_order() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    for number in range(3):
        part = nri_pb2.SynchronizeRequest(pods=[nri_pb2.PodSandbox(id=str(number))], more=True)
        assert session.synchronized(part) is None
    last = nri_pb2.SynchronizeRequest(containers=[nri_pb2.Container(id="c")])
    everything = session.synchronized(last)
    assert everything is not None
    assert [pod.id for pod in everything[0]] == ["0", "1", "2"]
    assert [container.id for container in everything[1]] == ["c"]
    assert session.state is State.SERVING


def named(name: str | None, index: str | None) -> Plugin:
    plugin = Plugin()
    plugin.name, plugin.index = name, index
    return plugin


def test_identity_comes_from_the_plugin_the_environment_or_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NRI_PLUGIN_NAME", raising=False)
    monkeypatch.delenv("NRI_PLUGIN_IDX", raising=False)
    assert identity(named("a", "10"), argv0="/x/50-b") == ("a", "10")
    assert identity(named(None, "10"), argv0="/x/thing") == ("thing", "10")
    assert identity(named(None, None), argv0="/x/50-foo-bar") == ("foo-bar", "50")
    monkeypatch.setenv("NRI_PLUGIN_NAME", "env")
    monkeypatch.setenv("NRI_PLUGIN_IDX", "07")
    assert identity(named(None, None), argv0="/x/y") == ("env", "07")


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [("a", "5", "two digits"), ("a", "100", "two digits"), ("a b", "50", "name"), ("a", None, "no index")],
)
def test_a_wrong_identity_is_told_with_what_to_do(
    name: str, index: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NRI_PLUGIN_IDX", raising=False)
    with pytest.raises(LocalProtocolError, match=words):
        identity(named(name, index), argv0="/x/program")
