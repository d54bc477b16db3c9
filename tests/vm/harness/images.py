"""Container images for offline use: a folder -> one OCI image layout tar that `ctr images import` reads."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vm.harness import host
from vm.harness.cache import Cache, digest
from vm.harness.errors import VmError

RECIPE = "1"
PAUSE = "registry.local/pause:1"
BUSYBOX = "registry.local/busybox:1"
"""Names under which the images appear; containerd.toml names the first as the sandbox image."""

_OCI = "application/vnd.oci.image"


class _Layout:
    """Collects blobs and writes them as an OCI image layout (image-layout.md of the OCI image spec)."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def add(self, data: bytes, media_type: str) -> dict[str, object]:
        """Keep a blob; returns its descriptor."""
        name = hashlib.sha256(data).hexdigest()
        self._blobs[name] = data
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    def write(self, out: Path, manifest: dict[str, object]) -> None:
        index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [manifest]}
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
        files |= {f"blobs/sha256/{name}": data for name, data in self._blobs.items()}
        with tarfile.open(out, "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_image(out: Path, name: str, root: Path, entrypoint: Sequence[str]) -> None:
    """Write the folder `root` as the one-layer image `name`. The same folder gives the same bytes."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = 0
        return member

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, arcname=path.name, filter=anonymous)
    layout = _Layout()
    # Not compressed: the guest would have to gunzip it under emulation.
    layer = layout.add(packed.getvalue(), f"{_OCI}.layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Entrypoint": list(entrypoint)},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": layout.add(json.dumps(config, sort_keys=True).encode(), f"{_OCI}.config.v1+json"),
        "layers": [layer],
    }
    entry = layout.add(json.dumps(manifest, sort_keys=True).encode(), f"{_OCI}.manifest.v1+json")
    entry["platform"] = {"architecture": "amd64", "os": "linux"}
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    layout.write(out, entry)


def ensure_images(cache: Cache, rootfs: Path, pause_c: Path) -> Path:
    """Folder with pause.tar and busybox.tar."""
    busybox = rootfs / "usr/bin/busybox"

    def build(into: Path) -> None:
        _build(into, busybox, pause_c)

    return cache.entry("images", digest(RECIPE, PAUSE, BUSYBOX, pause_c.read_bytes(), busybox.read_bytes()), build)


def _build(into: Path, busybox: Path, pause_c: Path) -> None:
    host.require({"gcc": "gcc"})
    if not list(Path("/usr/lib").glob("*/libc.a")):
        host.apt_install(["libc6-dev"])
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        pause_root = Path(scratch) / "pause"
        pause_root.mkdir(mode=0o755)
        log = into / "build.log"
        host.run(["gcc", "-Os", "-static", "-s", "-o", pause_root / "pause", pause_c], log=log)
        write_image(into / "pause.tar", PAUSE, pause_root, ["/pause"])

        root = Path(scratch) / "busybox"
        for folder in ("bin", "etc", "tmp", "proc", "sys", "dev", "var"):
            (root / folder).mkdir(parents=True)
            (root / folder).chmod(0o1777 if folder == "tmp" else 0o755)
        (root / "bin/busybox").write_bytes(busybox.read_bytes())
        (root / "bin/busybox").chmod(0o755)
        listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=False)
        if listed.returncode != 0:
            raise VmError(f"{busybox} does not run on this host: {listed.stderr.strip()}")
        for applet in listed.stdout.split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\n")
        write_image(into / "busybox.tar", BUSYBOX, root, ["/bin/sh"])
