"""Go peers for the interop tests and benchmarks: built from tests/interop/go, cached by content, driven by JSON lines.

The programs are ours; what they are made of is containerd/ttrpc and containerd/nri, fetched by the Go toolchain
through its module proxy at the versions that go/*/releases pin.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from interop import releases
from vm.harness.cache import Cache, digest, digest_files
from vm.harness.errors import VmError
from vm.harness.host import apt_install

SOURCES = Path(__file__).parent / "go"
NRI_RELEASES = tuple(releases.NRI)
TTRPC_RELEASES = releases.TTRPC
NEWEST_NRI = NRI_RELEASES[-1]
WAIT_S = 120.0

_OLDEST_GO = (1, 21)  # from here on, Go fetches the toolchain that a module asks for
_NO_PROXY = re.compile(r"dial tcp|no such host|i/o timeout|connection refused|TLS handshake|proxyconnect|404 Not Found")
_TOO_OLD = re.compile(r"requires go >= \S+|toolchain not available|invalid go version")


class PeerUnavailable(Exception):
    """No peer can be built here; the text says how to get what is missing."""


def go_command() -> str:
    """Path of a Go that is new enough; installed with apt if there is none and we are root on Debian or Ubuntu.

    Raises:
        PeerUnavailable: there is none and it cannot be installed.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/go/bin"
    go = shutil.which("go", path=path)
    if go is None:
        try:
            apt_install(["golang-go"])
        except VmError as error:
            raise PeerUnavailable(f"no Go toolchain ({error}); install Go 1.25 or newer from go.dev") from None
        go = shutil.which("go", path=path)
    if go is None:
        raise PeerUnavailable("the package golang-go brings no `go`; install Go 1.25 or newer from go.dev")
    told = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"go(\d+)\.(\d+)", told)
    if not found or (int(found[1]), int(found[2])) < _OLDEST_GO:
        raise PeerUnavailable(
            f"{go} is {told.strip() or 'of unknown version'}; Go 1.21 or newer is needed: Debian 13 has it, or go.dev"
        )
    return go


def build(module: str, release: str) -> Path:
    """The program of go/MODULE with the library at `release`, from the cache or built in a few seconds.

    Raises:
        PeerUnavailable: no Go, too old a Go, or the module proxy is out of reach.
        RuntimeError: it does not compile.
    """
    go = go_command()
    folder = SOURCES / module
    files = {path.name: path for path in [*folder.glob("*.go"), folder / "go.mod"]}
    pins = {f"release{suffix}": folder / "releases" / f"{release}{suffix}" for suffix in (".mod", ".sum")}
    tags = releases.build_tags(module, release)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache = Cache(Path(base) / "memtier" / "go")
    kind = f"{module}-{release}"

    def make(into: Path) -> None:
        pinned = [f"-modfile={pins['release.mod']}", "-mod=readonly"]
        _run([go, "build", *pinned, "-tags", tags, "-o", str(into / "peer"), "."], folder)

    found = cache.entry(kind, digest(digest_files(folder, {**files, **pins}), tags, go), make)
    cache.prune(kind, keep=2)
    return found / "peer"


def _run(command: list[str], folder: Path) -> None:
    env = {"GOTOOLCHAIN": "auto", **os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if _TOO_OLD.search(done.stderr):
        raise PeerUnavailable(f"Go is too old and may not fetch a newer one: {done.stderr.strip()[-300:]}")
    if _NO_PROXY.search(done.stderr):
        raise PeerUnavailable(f"the Go module proxy is out of reach (set GOPROXY): {done.stderr.strip()[-300:]}")
    raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-4000:]}")


Record = dict[str, Any]


class Peer:
    """A running Go program. Records with `event` are collected, others answer commands."""

    def __init__(self, program: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._command = [str(program), *arguments]
        self._env = env
        self.events: list[Record] = []
        self.log = ""
        """Its standard error so far."""
        self._answers: dict[int | None, asyncio.Queue[Record]] = {}
        self._changed = asyncio.Condition()
        self._next_id = 0
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=self._env, limit=64 << 20
        )
        self._readers = [asyncio.create_task(self._read()), asyncio.create_task(self._read_log())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self.process
        if process.returncode is None:
            process.kill()
        await process.wait()
        for reader in self._readers:
            await reader

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The process."""
        assert self._process is not None
        return self._process

    async def do(self, do: str, *, wait_s: float = WAIT_S, **values: Any) -> Record:
        """Give a command of the nri program and wait for its answer. One at a time."""
        return await self._ask(None, {"do": do, **values}, wait_s)

    async def call(self, *, wait_s: float = WAIT_S, **values: Any) -> Record:
        """Have the ttrpc client make a call; several may run at once."""
        self._next_id += 1
        return await self._ask(self._next_id, {"id": self._next_id, **values}, wait_s)

    async def event(
        self,
        name: str,
        *,
        count: int = 1,
        wait_s: float = WAIT_S,
        accept: Callable[[Record], bool] = lambda _: True,
    ) -> Record:
        """The `count`th event of this name (from 1), as soon as it comes."""
        found: list[Record] = []

        def there() -> bool:
            found[:] = [event for event in self.events if event["event"] == name and accept(event)]
            return len(found) >= count

        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(there)
        except TimeoutError:
            raise AssertionError(f"no {name} within {wait_s:g} s; events: {self.events}\n{self.log}") from None
        return found[count - 1]

    async def logged(self, text: str, *, count: int = 1, wait_s: float = WAIT_S) -> None:
        """Wait until its log has `text` `count` times."""
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: self.log.count(text) >= count)
        except TimeoutError:
            raise AssertionError(f"{text!r} was not logged {count} times within {wait_s:g} s\n{self.log}") from None

    async def _ask(self, key: int | None, values: Record, wait_s: float) -> Record:
        queue = self._answers.setdefault(key, asyncio.Queue())
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")
        await self.process.stdin.drain()
        try:
            async with asyncio.timeout(wait_s):
                return await queue.get()
        except TimeoutError:
            raise AssertionError(f"no answer to {str(values)[:500]} within {wait_s:g} s\n{self.log}") from None

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            record = json.loads(line)
            if "event" in record:
                async with self._changed:
                    self.events.append(record)
                    self._changed.notify_all()
            else:
                self._answers.setdefault(record.get("id"), asyncio.Queue()).put_nowait(record)

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._changed:
                self.log += line.decode(errors="replace").replace('\\"', '"')
                self._changed.notify_all()
