"""The package's README holds code that works; the schema is whole; stale generated code is noticed."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

from interop import releases
from nri_core import Container, Plugin, Pod, Stub
from nri_core.aio.stub import NRI_VERSION
from nri_core.pb import nri_pb2
from nri_core.testing import FakeRuntime

ROOT = Path(__file__).parents[3]


def test_the_plugin_of_the_readme_works(tmp_path: Path) -> None:
    text = (ROOT / "packages/nri-core/README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict[str, type[Plugin]] = {"__name__": "readme"}  # type: ignore[dict-item]
    exec(compile(code, "README.md", "exec"), names)
    swap = Pod("p1", "web", "default", annotations={"example.com/swap": "yes"})
    plain = Pod("p2", "db", "default")

    async def main() -> None:
        async with FakeRuntime(
            tmp_path / "s", pods=[swap, plain], containers=[Container("a", "p1", "a"), Container("b", "p2", "b")]
        ) as runtime:
            stub = Stub(names["Swap"](), socket_path=runtime.path)
            task = asyncio.create_task(stub.run())
            connection = await runtime.connected()
            assert [update.container_id for update in connection.updates] == ["a"]
            response = await connection.create_container(swap, Container("c", "p1", "c"))
            assert response.adjust.linux.resources.unified["memory.swap.max"] == "max"
            assert not (await connection.create_container(plain, Container("d", "p2", "d"))).HasField("adjust")
            stub.stop()
            await task

    asyncio.run(main())


def test_the_schema_has_every_message_field_enum_and_method() -> None:
    """The counts of NRI v0.12.5: 86 messages, 10 enums, 255 fields, 21 methods."""
    file = nri_pb2.DESCRIPTOR
    messages = list(file.message_types_by_name.values())
    enums = [*file.enum_types_by_name.values(), *(enum for message in messages for enum in message.enum_types)]
    assert len(messages) == 86
    assert len(enums) == 10
    assert sum(len(message.fields) for message in messages) == 255
    assert sum(len(service.methods) for service in file.services_by_name.values()) == 21


def test_the_newest_release_that_is_tested_is_the_one_that_is_spoken_and_documented() -> None:
    """tests/interop/releases.py is the one place that names releases; what follows from it agrees."""
    for module, listed in (("nri", [*releases.NRI]), ("ttrpc", [*releases.TTRPC])):
        pinned = (ROOT / f"tests/interop/go/{module}/releases").glob("*.mod")
        assert sorted(path.stem for path in pinned) == sorted(listed)
        assert listed == sorted(listed, key=releases.numbers)
    newest = [*releases.NRI][-1]
    assert newest == NRI_VERSION
    assert f"v1alpha1 up to {newest}" in (ROOT / "packages/nri-core/README.md").read_text()
    assert f"releases/{newest}.mod" in (ROOT / "tests/interop/go/README.md").read_text()


def test_the_generated_code_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools/gen_proto.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stale_generated_code_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    pb = "packages/nri-core/src/nri_core/pb"
    shutil.copytree(ROOT / pb, tmp_path / pb)
    (tmp_path / "tools").mkdir()
    tool = shutil.copy(ROOT / "tools/gen_proto.py", tmp_path / "tools")
    with (tmp_path / "proto/nri/api.proto").open("a") as file:
        file.write("\nmessage Added { string text = 1; }\n")
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{pb}/nri_pb2.py is stale: run `make proto`" in done.stderr
    assert f"{pb}/ttrpc_pb2.py" not in done.stderr
