"""Our plugin against containerd/nri's runtime side, at several releases of it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from interop.nri import (
    CONTAINER,
    POD,
    QUICK,
    Everything,
    Recorder,
    Release,
    connected,
    create,
    go_plugin,
    go_runtime,
    in_list,
    patiently,
    request,
)
from interop.peers import WAIT_S
from nri_core import (
    Adjustment,
    Container,
    ContainerState,
    LocalProtocolError,
    Mount,
    Pod,
    Rejected,
    Resources,
    Stub,
    Update,
    Validation,
)

OLD_EVENTS = (
    "RunPodSandbox",
    "PostCreateContainer",
    "StartContainer",
    "PostStartContainer",
    "PostUpdateContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
)


class Adjuster(Recorder):
    """Answers CreateContainer with what it was given."""

    def __init__(self, answer: Any = None, *, index: str = "50") -> None:
        super().__init__()
        self.answer = answer
        self.index = index

    async def create_container(self, pod: Pod, container: Container) -> Any:
        self.heard.append(("CreateContainer", (pod, container)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_handshake_tells_us_the_runtime_and_what_is_there(release: Release, path: Path) -> None:
    async def main() -> None:
        plugin = Everything()
        plugin.sync_updates = [Update("ctr1").unified("memory.high", "5000")]
        async with (
            go_runtime(release, path, registration_timeout_ms=700_000, request_timeout_ms=300_000) as runtime,
            connected(plugin, path, runtime),
        ):
            # Runtimes from v0.7 on synchronize the plugins they launched, of which there are none, first.
            synchronized = await runtime.event("synchronized", accept=lambda event: bool(event["updates"]))
            assert synchronized["updates"] == [
                {"container_id": "ctr1", "linux": {"resources": {"unified": {"memory.high": "5000"}}}}
            ]
            assert plugin.runtime is not None
            assert (plugin.runtime.name, plugin.runtime.version) == ("containerd", release.runtime_version)
            told = release.has(0, 7)
            assert plugin.runtime.registration_timeout_s == (700.0 if told else 5.0)
            assert plugin.runtime.request_timeout_s == (300.0 if told else 2.0)
            assert plugin.runtime.nri_version == (release.version if release.has(0, 12) else "")
            [pod], [container] = plugin.pods, plugin.containers
            assert (pod.id, pod.name, pod.namespace, pod.uid) == ("pod1", "web", "default", "uid1")
            assert pod.annotations == POD["annotations"]
            assert pod.cgroup_parent == "/kubepods/burstable/poduid1"
            assert (container.id, container.pod_id, container.state) == ("ctr1", "pod1", ContainerState.RUNNING)
            assert container.args == ("/bin/sh", "-c", "sleep 1")
            assert container.mounts == (Mount("/data", "/srv", "bind", ("rbind", "ro")),)
            assert container.cgroups_path == "/kubepods/burstable/poduid1/ctr1"
            assert (container.memory_limit_bytes, dict(container.unified)) == (64 << 20, {"memory.high": "max"})

    asyncio.run(main())


def test_every_event_reaches_its_method(release: Release, path: Path) -> None:
    """Through StateChange before v0.12, through a method of its own from then on."""

    async def main() -> None:
        plugin = Everything()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            methods = [*OLD_EVENTS, *(("PostUpdatePodSandbox",) if release.has(0, 10) else ())]
            for method in methods:
                answer = await request(runtime, method)
                assert "error" not in answer, answer
            assert [name for name, _ in plugin.heard] == methods
            for name, parts in plugin.heard:
                pod, container = parts if isinstance(parts, tuple) else (parts, None)
                assert pod.name == "web"
                assert (container is not None and container.name == "main") == ("Container" in name)

            plugin.heard.clear()
            answer = await request(runtime, "StopContainer")
            assert answer["response"]["update"][0]["container_id"] == "other"
            resources = {"unified": {"memory.high": "7000"}}
            answer = await request(runtime, "UpdateContainer", linux_resources=resources)
            [update] = answer["response"]["update"]
            assert update["container_id"] == "ctr1"
            assert update["linux"]["resources"]["unified"]["memory.swap.max"] == "0"
            if release.has(0, 10):
                answer = await request(runtime, "UpdatePodSandbox", linux_resources={"unified": {"a": "b"}})
                assert "error" not in answer, answer
                assert plugin.heard[-1][1][2].unified == {"a": "b"}

    asyncio.run(main())


def test_an_adjustment_arrives_as_built(release: Release, path: Path) -> None:
    async def main() -> None:
        adjustment = (
            Adjustment()
            .annotation("example.com/by", "ours")
            .mount(Mount("/new", "/srv/new", "bind", ("ro",)))
            .env("B", "2")
            .unified("memory.swap.max", "max")
            .limits(Resources(memory_limit_bytes=32 << 20, cpu_shares=0, cpuset_cpus="0-1"))
        )
        if release.has(0, 7):
            adjustment = adjustment.oom(-500)
        if release.has(0, 10):
            adjustment = adjustment.command("/bin/true", "now")
        plugin = Adjuster((adjustment, [Update("other").unified("memory.high", "9")]))
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            answer = await request(runtime, "CreateContainer")
            response = answer["response"]
            adjust, resources = response["adjust"], response["adjust"]["linux"]["resources"]
            assert adjust["annotations"] == {"example.com/by": "ours"}
            assert adjust["mounts"] == [
                {"destination": "/new", "source": "/srv/new", "type": "bind", "options": ["ro"]}
            ]
            assert adjust["env"] == [{"key": "B", "value": "2"}]
            assert resources["unified"] == {"memory.swap.max": "max"}
            assert resources["memory"]["limit"] == {"value": str(32 << 20)}
            assert resources["cpu"]["cpus"] == "0-1"
            assert resources["cpu"]["shares"] in ({}, {"value": "0"})  # there, and 0
            if release.has(0, 7):
                assert adjust["linux"]["oom_score_adj"] == {"value": "-500"}
            if release.has(0, 10):
                assert adjust["args"] == ["/bin/true", "now"]
            assert [update["container_id"] for update in response["update"]] == ["other"]

    asyncio.run(main())


@pytest.mark.parametrize("ours_first", [True, False])
def test_removals_and_replacements_of_what_another_plugin_set(release: Release, path: Path, ours_first: bool) -> None:
    """A key that two plugins set fails the request; with a removal by the second, its value stands."""
    theirs = {
        "annotations": {"k1": "theirs", "k2": "theirs"},
        "env": [{"key": "E1", "value": "theirs"}, {"key": "E2", "value": "theirs"}],
        "mounts": [{"destination": "/m1", "source": "/a", "type": "bind"}],
    }
    ours = (
        Adjustment()
        .remove_annotation("k1")
        .annotation("k1", "ours")
        .remove_annotation("k2")
        .remove_env("E1")
        .env("E1", "ours")
        .remove_env("E2")
        .remove_mount("/m1")
        .mount(Mount("/m1", "/b", "bind"))
    )

    async def main() -> None:
        plugin = Adjuster(ours, index="10" if ours_first else "50")
        async with (
            go_runtime(release, path) as runtime,
            connected(plugin, path, runtime),
            go_plugin(release, path, runtime, adjust=theirs),
        ):
            answer = await request(runtime, "CreateContainer")
            if ours_first:
                assert "both tried to set" in answer["error"]
                return
            adjust = answer["response"]["adjust"]
            annotations = adjust["annotations"]
            assert annotations["k1"] == "ours"
            assert "-k2" in annotations
            assert {"key": "E1", "value": "ours"} in adjust["env"]
            assert not [pair for pair in adjust["env"] if pair.get("value") == "theirs"]
            assert [mount["source"] for mount in adjust["mounts"] if mount["destination"] == "/m1"] == ["/b"]

    asyncio.run(main())


def test_two_plugins_that_set_the_same_key_fail_a_creation(release: Release, path: Path) -> None:
    """The runtime takes both; its error names them."""

    async def main() -> None:
        adjustment = Adjustment().unified("memory.swap.max", "max")
        theirs = {"linux": {"resources": {"unified": {"memory.swap.max": "0"}}}}
        async with (
            go_runtime(release, path) as runtime,
            connected(Adjuster(adjustment), path, runtime),
            go_plugin(release, path, runtime, name="ours", index="51", adjust=theirs),
        ):
            answer = await request(runtime, "CreateContainer")
            assert '"51-ours" and "50-ours" both tried to set' in answer["error"]
            assert "memory.swap.max" in answer["error"]

    asyncio.run(main())


def test_an_exception_fails_the_request_with_its_text_and_the_plugin_stays(release: Release, path: Path) -> None:
    async def main() -> None:
        plugin = Adjuster(ValueError("no such class: gold"))
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            answer = await request(runtime, "CreateContainer")
            assert "no such class: gold" in answer["error"]
            plugin.answer = Adjustment().env("A", "1")
            assert (await create(runtime))["env"] == [{"key": "A", "value": "1"}]
            assert plugin.ended == []

    asyncio.run(main())


@pytest.mark.parametrize("pad_bytes", [10, 4000])
def test_2000_containers_are_synchronized_in_parts_or_in_one_message(
    release: Release, path: Path, pad_bytes: int
) -> None:
    """With 4000 bytes each they make 8 MiB: split from v0.7 on, in one message before."""

    async def main() -> None:
        plugin = Recorder()
        state = {"pod_count": 500, "container_count": 2000, "pad_bytes": pad_bytes}
        async with (
            go_runtime(release, path, state) as runtime,
            connected(plugin, path, runtime),
        ):
            assert not [event for event in runtime.events if "error" in event]
            assert [pod.id for pod in plugin.pods] == [f"pod{number}" for number in range(500)]
            assert [each.id for each in plugin.containers] == [f"ctr{number}" for number in range(2000)]
            assert all(len(each.annotations["pad"]) == pad_bytes for each in plugin.containers)
            assert "error" not in await request(runtime, "StopContainer")

    asyncio.run(main())


def test_answers_of_every_size_near_the_frame_limits_arrive_whole(release: Release, path: Path) -> None:
    """A Go peer reads 4096-byte frames, whole messages of up to 4 MiB, and nothing that is cut otherwise."""

    async def main() -> None:
        plugin = Adjuster()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            near = [*range(4020, 4100), *range(8120, 8200, 3), 12_200, 65_536, 1 << 20, (4 << 20) - 200]
            for size in near:
                plugin.answer = Adjustment().annotation("pad", "x" * size)
                assert len((await create(runtime))["annotations"]["pad"]) == size
            plugin.answer = Adjustment().annotation("pad", "x" * (4 << 20))
            answer = await request(runtime, "CreateContainer")
            assert "exceed maximum message size" in answer["error"]
            plugin.answer = Adjustment().annotation("pad", "x")
            assert (await create(runtime))["annotations"] == {"pad": "x"}
            assert plugin.ended == []

    asyncio.run(main())


def test_requests_of_every_size_are_understood(release: Release, path: Path) -> None:
    async def main() -> None:
        plugin = Adjuster()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            for size in (*range(3700, 3800, 7), *range(4080, 4100), 8190, 100_000, (4 << 20) - 2000):
                await create(runtime, container={**CONTAINER, "annotations": {"pad": "x" * size}})
                _, container = plugin.heard[-1][1]
                assert len(container.annotations["pad"]) == size

    asyncio.run(main())


def test_updates_on_our_own_account_are_applied_and_the_failed_ones_come_back(release: Release, path: Path) -> None:
    async def main() -> None:
        plugin = Recorder()
        state = {"pods": [POD], "containers": [CONTAINER], "fail_updates": ["ctr2"]}
        async with go_runtime(release, path, state) as runtime, connected(plugin, path, runtime) as stub:
            updates = [Update(f"ctr{number}").unified("memory.high", str(number)) for number in (1, 2, 3)]
            failed = await stub.update_containers(updates)
            assert [update.container_id for update in failed] == ["ctr2"]
            update = await runtime.event("update")
            assert [each["container_id"] for each in update["updates"]] == ["ctr1", "ctr2", "ctr3"]

    asyncio.run(main())


def test_an_update_from_within_a_method_is_refused_at_once_and_from_its_task_comes_after_it(
    release: Release, path: Path
) -> None:
    class Eager(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[Exception] = []
            self.task: asyncio.Task[list[Update]] | None = None

        async def create_container(self, pod: Pod, container: Container) -> None:
            assert self.stub is not None
            try:
                await self.stub.update_containers([Update("ctr1")])
            except LocalProtocolError as error:
                self.errors.append(error)
            self.task = asyncio.create_task(self.stub.update_containers([Update("ctr1").unified("memory.high", "1")]))

    async def main() -> None:
        plugin = Eager()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            answer = await request(runtime, "CreateContainer")
            assert "error" not in answer
            assert len(plugin.errors) == 1
            assert plugin.task is not None
            assert await plugin.task == []
            await runtime.event("update")
            assert plugin.ended == []

    asyncio.run(main())


def test_a_method_that_takes_too_long_is_answered_in_time_and_the_plugin_stays(release: Release, path: Path) -> None:
    """The runtime would drop a plugin whose answer is late."""

    class Slow(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.over = asyncio.Event()

        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            if container.name == "slow":
                await self.over.wait()
            return Adjustment().env("A", "1")

    async def main(limit_ms: int) -> None:
        plugin = Slow()
        async with go_runtime(release, path, request_timeout_ms=limit_ms) as runtime, connected(plugin, path, runtime):
            assert await create(runtime, container={**CONTAINER, "name": "slow"}) == {}
            assert plugin.lates == ["create_container"]
            plugin.over.set()
            assert (await create(runtime))["env"] == [{"key": "A", "value": "1"}]
            assert plugin.ended == []

    patiently(main)


@pytest.mark.parametrize("leaves_socket", [True, False])
def test_when_the_runtime_comes_back_the_plugin_is_there_again(
    release: Release, path: Path, leaves_socket: bool
) -> None:
    async def main() -> None:
        plugin = Adjuster(Adjustment().env("A", "1"))
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            assert (await create(runtime))["env"] == [{"key": "A", "value": "1"}]
            runtime.process.kill()
            await _until(lambda: len(plugin.ended) > 0)
            if not leaves_socket:
                path.unlink()  # noqa: ASYNC240
            async with go_runtime(release, path) as second:
                await in_list(second, "50-ours")
                assert [each.id for each in plugin.containers] == ["ctr1"]
                assert (await create(second))["env"] == [{"key": "A", "value": "1"}]

    asyncio.run(main())


async def _until(holds: Any, wait_s: float = WAIT_S) -> None:
    async with asyncio.timeout(wait_s):
        while not holds():  # noqa: ASYNC110 - what is waited for is another process's doing
            await asyncio.sleep(0.02)


def test_a_plugin_that_waits_at_a_socket_that_is_not_there_yet_connects_when_it_is(
    release: Release, path: Path
) -> None:
    async def main() -> None:
        plugin = Recorder()
        stub = Stub(plugin, socket_path=path, backoff=QUICK)
        running = asyncio.create_task(stub.run())
        await asyncio.sleep(0.3)
        async with go_runtime(release, path) as runtime:
            await in_list(runtime, "50-ours")
            stub.stop()
            await running

    asyncio.run(main())


def test_a_validator_sees_all_adjustments_and_can_refuse_them(release: Release, path: Path) -> None:
    class Validator(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Validation] = []

        def validate_container_adjustment(self, validation: Validation) -> None:
            self.seen.append(validation)
            if "forbidden" in validation.raw.adjust.annotations:
                raise Rejected("nobody may set `forbidden`")

    async def main() -> None:
        plugin = Validator()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            async with go_plugin(release, path, runtime, name="good", adjust={"annotations": {"fine": "1"}}):
                assert (await create(runtime))["annotations"] == {"fine": "1"}
                assert len(plugin.seen) == (1 if release.has(0, 10) else 0)
            async with go_plugin(release, path, runtime, name="bad", adjust={"annotations": {"forbidden": "1"}}):
                answer = await request(runtime, "CreateContainer")
                assert ("nobody may set" in answer.get("error", "")) == release.has(0, 10)

    asyncio.run(main())


LAUNCHED = """#!{python}
import json, os, sys
from nri_core import Adjustment, Plugin, run

class Launched(Plugin):
    def configure(self, config, runtime):
        self.out = open(config.strip(), "a", buffering=1)
        print(json.dumps(["configure", sys.argv[1:], "PATH" in os.environ]), file=self.out)

    def synchronize(self, pods, containers):
        print(json.dumps(["synchronize", len(pods), len(containers)]), file=self.out)

    def create_container(self, pod, container):
        print(json.dumps(["create", container.name]), file=self.out)
        return Adjustment().env("LAUNCHED", self.stub.index + self.stub.name)

    def disconnected(self, error):
        print(json.dumps(["disconnected"]), file=self.out)

run(Launched())
print(json.dumps(["over"]), file=open({over!r}, "w"))
"""


def test_a_plugin_that_the_runtime_launches_itself_uses_the_socket_it_is_given(
    release: Release, tmp_path: Path
) -> None:
    """Name, index and configuration come from the file names. Before v0.7 it is not synchronized; it ends with the
    connection."""
    plugins, configs, out = tmp_path / "plugins", tmp_path / "conf.d", tmp_path / "out"
    plugins.mkdir()
    configs.mkdir()
    program = plugins / "20-launched"
    program.write_text(LAUNCHED.format(python=sys.executable, over=str(tmp_path / "over")))
    program.chmod(0o755)
    (configs / "launched.conf").write_text(f"{out}\n")

    async def main() -> None:
        options: dict[str, Any] = {
            "plugin_path": str(plugins),
            "config_path": str(configs),
        }
        async with go_runtime(release, tmp_path / "nri.sock", **options) as runtime:
            await _until(lambda: out.exists())
            if release.has(0, 7):
                await runtime.event("synchronized")
            assert (await create(runtime))["env"] == [{"key": "LAUNCHED", "value": "20launched"}]
            records = [json.loads(line) for line in out.read_text().splitlines()]
            assert records[0] == ["configure", [], False]
            assert (["synchronize", 1, 1] in records) == release.has(0, 7)
            assert records[-1] == ["create", "main"]
            runtime.process.kill()
            await _until(lambda: (tmp_path / "over").exists())
            assert out.read_text().splitlines()[-1] == '["disconnected"]'

    asyncio.run(main())


def test_a_thousand_requests_in_a_row_are_all_answered(release: Release, path: Path) -> None:
    async def main() -> None:
        plugin = Adjuster(Adjustment().unified("memory.swap.max", "max"))
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            answer = await runtime.do("bench", count=1000, request={"pod": POD, "container": CONTAINER}, wait_s=250)
            assert len(answer["microseconds"]) == 1000
            assert len(plugin.heard) == 1000
            assert plugin.ended == []

    asyncio.run(main())


def test_a_plugin_that_overrides_nothing_is_connected_and_not_called(release: Release, path: Path) -> None:
    """An empty subscription would mean all events."""

    class Idle(Recorder):
        pass

    async def main() -> None:
        plugin = Idle()
        async with go_runtime(release, path) as runtime, connected(plugin, path, runtime):
            for method in (*OLD_EVENTS, "StopContainer"):
                assert "error" not in await request(runtime, method)
            assert await create(runtime) == {}
            assert plugin.heard == []

    asyncio.run(main())
