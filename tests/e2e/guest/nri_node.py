"""A node in the guest for nri-memtierd: containerd, pods made through CRI, and the plugin as a process.

Runs in the test VM. Nothing is left: a scenario removes its pods, and `containerd` is stopped with the node.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml

from vm.guest import cri_pb2 as cri

CGROUPS = Path("/sys/fs/cgroup")
SOCKET = "/run/containerd/containerd.sock"
NRI_SOCKET = Path("/var/run/nri/nri.sock")
BUSYBOX = "registry.local/busybox:1"
FILL = ("sh", "-c", "dd if=/dev/zero bs=80M count=1 | sleep 100000")
"""dd fills a buffer of 80 MB and then waits to write it for ever."""
SLEEP = ("sleep", "100000")
CLASS = "class.memtierd.nri.io"


class CriError(Exception):
    """What the runtime answered instead of doing it."""


def wait_for(condition: Callable[[], object], timeout_s: float, every_s: float = 0.2) -> float | None:
    """Seconds until `condition` held; None if it did not in time."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < timeout_s:
        if condition():
            return round(time.monotonic() - began_s, 2)
        time.sleep(every_s)
    return None


class Containerd:
    """The runtime."""

    def __init__(self) -> None:
        self.log = Path("/run/containerd.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        """Start it and wait for both of its sockets."""
        NRI_SOCKET.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(["containerd", "-l", "info"], stdout=log, stderr=log)
        assert wait_for(lambda: Path(SOCKET).exists() and NRI_SOCKET.exists(), 60), self.log.read_text()[-3000:]
        self._channel = grpc.insecure_channel(f"unix://{SOCKET}")
        self.call("Version", cri.VersionRequest(version="v1"))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it; containers go on."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)

    def call(self, method: str, request: Any, service: str = "RuntimeService") -> Any:
        """One CRI call. Raises: CriError."""
        assert self._channel is not None
        response = getattr(cri, f"{method}Response")
        stub = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        try:
            return stub(request, timeout=120, wait_for_ready=True)
        except grpc.RpcError as error:
            raise CriError(error.details()) from None
        except ValueError as error:  # the channel was closed by `stop`
            raise CriError(str(error)) from None

    def execute(self, container: str, command: Sequence[str]) -> Any:
        """Run a command in a container, as a probe does. Raises: CriError."""
        return self.call("ExecSync", cri.ExecSyncRequest(container_id=container, cmd=command, timeout=60))

    def import_image(self, path: Path) -> None:
        """Put an image archive into the runtime's store."""
        command = ["ctr", "-n", "k8s.io", "images", "import", "--snapshotter", "overlayfs", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def import_images(self) -> None:
        """The guest's two, if they are not there yet."""
        images = self.call("ListImages", cri.ListImagesRequest(), "ImageService").images
        if not any(BUSYBOX in image.repo_tags for image in images):
            for name in ("pause", "busybox"):
                self.import_image(Path(f"/opt/images/{name}.tar"))


class Pod:
    """A pod sandbox and its containers."""

    def __init__(
        self,
        runtime: Containerd,
        name: str,
        annotations: Mapping[str, str],
        *,
        namespace: str = "default",
        cgroup_parent: str | None = None,
        host_pid: bool = False,
    ) -> None:
        self._runtime = runtime
        options = cri.NamespaceOption(network=cri.NODE, pid=cri.NODE if host_pid else cri.CONTAINER)
        self.config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace=namespace),
            log_directory=f"/run/pod-logs/{name}",
            annotations=annotations,
            labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace},
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=cgroup_parent or f"/kubepods/burstable/poduid-{name}",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )
        Path(self.config.log_directory).mkdir(parents=True, exist_ok=True)
        self._options = options
        self.id: str = runtime.call("RunPodSandbox", cri.RunPodSandboxRequest(config=self.config)).pod_sandbox_id

    def create(
        self,
        name: str,
        command: Sequence[str] = SLEEP,
        *,
        image: str = BUSYBOX,
        attempt: int = 0,
        resources: Mapping[str, Any] | None = None,
        mounts: Sequence[Any] = (),
        security: Mapping[str, Any] | None = None,
    ) -> str:
        """Create a container; returns its id. Raises: CriError."""
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name, attempt=attempt),
            image=cri.ImageSpec(image=image),
            command=command,
            log_path=f"{name}_{attempt}.log",
            mounts=mounts,
            labels={"io.kubernetes.container.name": name},
            linux=cri.LinuxContainerConfig(
                resources=cri.LinuxContainerResources(**(resources or {})),
                security_context=cri.LinuxContainerSecurityContext(namespace_options=self._options, **(security or {})),
            ),
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        created: str = self._runtime.call("CreateContainer", request).container_id
        return created

    def start(self, container: str) -> None:
        """Start a created container."""
        self._runtime.call("StartContainer", cri.StartContainerRequest(container_id=container))

    def run(self, name: str, command: Sequence[str] = SLEEP, **options: Any) -> str:
        """Create and start a container."""
        created = self.create(name, command, **options)
        self.start(created)
        return created

    def end(self, container: str) -> None:
        """Stop and remove a container.

        Like the kubelet, again when containerd has not taken in the exit yet and calls it running still.
        """
        for left in reversed(range(30)):
            self._runtime.call("StopContainer", cri.StopContainerRequest(container_id=container, timeout=0))
            try:
                self._runtime.call("RemoveContainer", cri.RemoveContainerRequest(container_id=container))
            except CriError as error:
                if "still running" not in str(error) or not left:
                    raise
                time.sleep(0.5)
            else:
                return

    def log(self, name: str, attempt: int = 0) -> str:
        """What a container wrote."""
        return (Path(self.config.log_directory) / f"{name}_{attempt}.log").read_text()

    def remove(self) -> None:
        """Stop and remove it with all its containers."""
        self._runtime.call("StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=self.id))
        self._runtime.call("RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=self.id))


def cgroup_of(container: str) -> Path:
    """The container's cgroup directory, found by its name."""
    found = [path for path in CGROUPS.rglob(f"*{container}*") if path.is_dir()]
    assert found, f"no cgroup of {container}"
    return min(found, key=lambda path: len(path.parts))


def pids_of(container: str) -> list[int]:
    """Its processes."""
    directory = cgroup_of(container)
    text = "".join((path / "cgroup.procs").read_text() for path in [directory, *directory.rglob("*")] if path.is_dir())
    return sorted(map(int, text.split()))


def swapped_kib(container: str) -> int:
    """VmSwap of all its processes."""
    total = 0
    for pid in pids_of(container):
        with contextlib.suppress(OSError):
            found = re.search(r"^VmSwap:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
            total += int(found[1]) if found else 0
    return total


def memory_value(container: str, name: str) -> str:
    """A memory file of its cgroup."""
    return (cgroup_of(container) / name).read_text().strip()


class NriPlugin:
    """The program nri-memtierd on the node itself."""

    def __init__(self, config: str | None) -> None:
        self.base = Path("/run/nri-test")
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir()
        self.runs = self.base / "run"
        self.log_path = self.base / "log"
        self.config = self.base / "config.yaml"
        if config is not None:
            self.config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self, *more: str) -> None:
        """Start it and wait until the runtime knows it."""
        command = ["nri-memtierd", "-idx", "45", "-config", str(self.config), "-run-dir", str(self.runs)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-cgroups-dir", str(CGROUPS), "-vv", *more], stdout=log, stderr=log
            )
        self.starts += 1
        self.wait_connected(self.starts)

    def wait_connected(self, times: int) -> None:
        """Wait until it has been synchronized that often."""
        connected = lambda: self.log.count("running containers") >= times  # noqa: E731
        assert wait_for(connected, 90), f"not connected:\n{self.log[-3000:]}"

    @property
    def log(self) -> str:
        """All it wrote."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End it; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(15)

    def hup(self) -> None:
        """Tell it to read its configuration again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it if it runs."""
        if self.alive():
            self.kill(signal.SIGTERM)

    def containers(self) -> list[str]:
        """Names of the containers that have a directory."""
        return sorted(path.name for path in self.runs.glob("*/*/*"))

    def namespaces(self) -> list[str]:
        """What is in the run directory besides the program's own files."""
        return sorted(path.name for path in self.runs.iterdir() if path.is_dir())

    def output(self, name: str) -> str:
        """memtierd.output of a container of that name."""
        return "".join(path.read_text() for path in self.runs.glob(f"*/*/{name}/memtierd.output"))


@contextlib.contextmanager
def node(config: str | None = None, *arguments: str, start: bool = True) -> Iterator[tuple[Containerd, NriPlugin]]:
    """containerd with the guest's two images, and the plugin (started or not). All of it is ended afterwards."""
    runtime, plugin = Containerd(), NriPlugin(config)
    runtime.start()
    try:
        runtime.import_images()
        if start:
            plugin.start(*arguments)
        yield runtime, plugin
    except BaseException:
        print(plugin.log[-6000:], flush=True)
        print(runtime.log.read_text()[-3000:], flush=True)
        raise
    finally:
        plugin.stop()
        remove_pods(runtime)
        runtime.stop()


def remove_pods(runtime: Containerd) -> None:
    """All pods that are left."""
    for pod in runtime.call("ListPodSandbox", cri.ListPodSandboxRequest()).items:
        with contextlib.suppress(CriError):
            runtime.call("StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
            runtime.call("RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def sample_config() -> str:
    """The checkout's sample configuration."""
    return Path("/host/sample-configs/nri-memtierd.yaml").read_text()


def quick_config(**classes: str) -> str:
    """Classes with fast engines: NAME="true" (allowswap, swaps out), "false" (tracks), "" (tracks, no allowswap)."""
    found = []
    for name, allow in classes.items():
        engine: dict[str, Any] = {
            "intervalms": 2000,
            "pidwatcher": {"name": "cgroups", "config": {"cgroups": ["$CGROUP2_ABS_PATH"]}},
            "tracker": {"name": "idlepage", "config": {"scanintervalms": 2000}},
            "mover": {"intervalms": 20, "bandwidth": 200},
        }
        if allow == "true":
            engine["swapoutms"] = 4000
        entry: dict[str, Any] = {"name": name, "memtierdconfig": {"policy": {"name": "age", "config": engine}}}
        if allow:
            entry["allowswap"] = allow == "true"
        found.append(entry)
    text: str = yaml.safe_dump({"classes": found})
    return text


def orphans() -> list[str]:
    """memtierd processes, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"/memtierd") for word in words):
                    found.append(b" ".join(words).decode())
    return found
