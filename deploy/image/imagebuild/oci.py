"""An OCI image layout in one tar, as `ctr images import`, `docker load` and `skopeo` read it.

Source: image-spec v1.1, image-layout.md, config.md, annotations.md.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from imagebuild.common import anonymous

ENTRYPOINT = ("/usr/bin/nri-memtierd", "--idx", "90")
ENVIRONMENT = ("PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "LANG=C.UTF-8")
_OCI = "application/vnd.oci.image"
_GZIP_LEVEL = 6


@dataclass(frozen=True, slots=True)
class Image:
    """What is written."""

    reference: str  # NAME:TAG
    architecture: str
    layers: Sequence[Path]
    """Not compressed."""
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """Where it is."""

    archive: Path
    digest: str
    """Of the manifest."""
    packed_bytes: int
    """Of the layers, as a registry holds them."""


def write_archive(image: Image, out: Path, stem: str, *, compress: bool = True) -> Written:
    """Write `image` into the folder `out` as STEM-DIGEST.tar; older ones of that stem are removed."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".blobs.") as folder:
        blobs = Path(folder)
        layers = [_add_layer(layer, blobs, compress=compress) for layer in image.layers]
        config = _add_json(_config(image, [diff_id for _, diff_id in layers]), f"{_OCI}.config.v1+json", blobs)
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": config,
            "layers": [descriptor for descriptor, _ in layers],
            "annotations": dict(image.labels),
        }
        described = _add_json(manifest, f"{_OCI}.manifest.v1+json", blobs)
        digest = str(described["digest"])
        described["annotations"] = {
            "io.containerd.image.name": image.reference,
            "org.opencontainers.image.ref.name": image.reference.rpartition(":")[2],
        }
        described["platform"] = {"architecture": image.architecture, "os": "linux"}
        index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [described]}
        partial = blobs / "archive"
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
                content = json.dumps(data).encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for blob in sorted(path for path in blobs.iterdir() if len(path.name) == 64):
                tar.add(blob, arcname=f"blobs/sha256/{blob.name}", filter=anonymous)
        for old in out.glob(f"{stem}-*"):
            old.unlink()
        archive = out / f"{stem}-{digest.removeprefix('sha256:')[:12]}.tar"
        partial.rename(archive)
    return Written(archive, digest, sum(int(str(descriptor["size"])) for descriptor, _ in layers))


def _config(image: Image, diff_ids: Sequence[str]) -> dict[str, object]:
    created = image.labels.get("org.opencontainers.image.created")
    dated = {"created": created} if created else {}
    return {
        **dated,
        "architecture": image.architecture,
        "os": "linux",
        "config": {
            "Env": list(ENVIRONMENT),
            "Entrypoint": list(ENTRYPOINT),
            "Labels": dict(image.labels),
        },
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [{**dated, "created_by": "deploy/image/build.py"} for _ in diff_ids],
    }


def _add_layer(layer: Path, blobs: Path, *, compress: bool) -> tuple[dict[str, object], str]:
    """Put a layer among the blobs; returns its descriptor and the digest of what is in it."""
    plain = hashlib.sha256()
    partial = blobs / "partial"
    with layer.open("rb") as source, partial.open("wb") as raw:
        target: BinaryIO | gzip.GzipFile = raw
        if compress:  # without a name and a time of the builder's; it writes its header at once
            target = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_GZIP_LEVEL, mtime=0, filename="")
        for piece in _pieces(source):
            plain.update(piece)
            target.write(piece)
        if target is not raw:
            target.close()
    digest = hashlib.sha256()
    with partial.open("rb") as written:
        for piece in _pieces(written):
            digest.update(piece)
    descriptor: dict[str, object] = {
        "mediaType": f"{_OCI}.layer.v1.tar" + ("+gzip" if compress else ""),
        "digest": f"sha256:{digest.hexdigest()}",
        "size": partial.stat().st_size,
    }
    partial.rename(blobs / digest.hexdigest())
    return descriptor, f"sha256:{plain.hexdigest()}"


def _pieces(file: io.BufferedReader) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def _add_json(value: Mapping[str, object], media_type: str, blobs: Path) -> dict[str, object]:
    """Put a small blob among the others; returns its descriptor."""
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
