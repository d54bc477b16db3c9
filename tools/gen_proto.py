"""Generate the protobuf modules from proto/. With --check: fail if what is there is stale.

protoc's own Python output works only with the protobuf release it was made for, or newer. What is written here
holds the compiled descriptor and builds the classes with whatever protobuf (4.21 or newer) is installed.

protoc's output also puts every message into the one pool of the process, where a name can stand only once: two
packages that carry NRI's messages could not be imported together. Ours are in a pool of their own (pb/pool.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "proto"
NRI_PACKAGE = ("packages/nri-core/src", "nri_core.pb")
FILES = {
    # source: (root of imports, package, module)
    "nri/api.proto": (*NRI_PACKAGE, "nri_pb2"),
    "nri/heads.proto": (*NRI_PACKAGE, "heads_pb2"),
    "ttrpc/ttrpc.proto": (*NRI_PACKAGE, "ttrpc_pb2"),
    "cri/cri.proto": ("tests", "vm.guest", "cri_pb2"),
}
HEADER = '"""Generated from proto/{source} by `make proto`. Do not edit."""\n'
MODULE = (
    HEADER
    + """
{imports}
DESCRIPTOR = pool.add(
{data},
    [{dependencies}],
    {module!r},
    globals(),
)
"""
)
SHARED_MODULE = (
    HEADER
    + """
{imports}from google.protobuf import descriptor_pool
from google.protobuf.internal import builder

DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(
{data}
)
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, {module!r}, globals())
"""
)
"""For the tests' own messages, which nobody else imports."""


def compiled(source: str, package: str) -> descriptor_pb2.FileDescriptorProto:
    """The descriptor of one file, with a name that no other package's file has."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        _protoc(f"--descriptor_set_out={target}", source)
        found = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file
    [descriptor] = found
    descriptor.name = f"{package.replace('.', '/')}/{source}"
    return descriptor


def _protoc(*arguments: str) -> None:
    import grpc_tools

    include = Path(grpc_tools.__file__).parent / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"-I{include}", *arguments]
    subprocess.run(command, check=True, cwd=PROTO)


def generated() -> dict[Path, str]:
    """Every file that should be there, with its text."""
    docs = '"""Generated protobuf modules: nri_pb2, heads_pb2, ttrpc_pb2, in a pool of their own: see pool.py."""\n'
    files = {ROOT / NRI_PACKAGE[0] / "nri_core/pb/__init__.py": docs}
    for source, (root, package, name) in FILES.items():
        out = ROOT / root / package.replace(".", "/")
        descriptor = compiled(source, package)
        data = descriptor.SerializeToString(deterministic=True)
        lines = [f"    {data[at : at + 64]!r}" for at in range(0, len(data), 64)]
        used = [Path(each) for each in descriptor.dependency]
        imports = [f"from {each.parent.as_posix().replace('/', '.')} import {each.stem}_pb2" for each in used]
        own_pool = package == NRI_PACKAGE[1]
        if own_pool:
            imports.append(f"from {package} import pool")
        files[out / f"{name}.py"] = (MODULE if own_pool else SHARED_MODULE).format(
            source=source,
            imports="".join(f"{line}\n" for line in imports),
            data="\n".join(lines),
            dependencies=", ".join(f"{each.stem}_pb2.DESCRIPTOR" for each in used),
            module=f"{package}.{name}",
        )
        with tempfile.TemporaryDirectory() as folder:
            _protoc(f"--pyi_out={folder}", source)
            [stub] = Path(folder).glob("**/*.pyi")
            # An enum value named None cannot be written in Python; it is reachable by its number.
            lines = [line for line in stub.read_text().splitlines() if not line.lstrip().startswith("None:")]
            files[out / f"{name}.pyi"] = "\n".join([HEADER.format(source=source).rstrip(), *lines, ""]).replace(
                "_Mapping]", "_Mapping[str, object]]"
            )
    return files


def main() -> int:
    """Write the files, or compare them."""
    files = generated()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make proto`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
