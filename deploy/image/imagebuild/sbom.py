"""The list of what an image holds (SBOM), read from its layers, as CycloneDX 1.6 in JSON.

Source: cyclonedx.org/docs/1.6/json, and package-url's types `deb`, `pypi` and `oci`.
"""

from __future__ import annotations

import re
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote

from imagebuild.debian import field
from imagebuild.oci import Image, Written

_METADATA = re.compile(r"usr/lib/python3/dist-packages/([^/]+\.dist-info/METADATA|[^/]+\.egg-info(/PKG-INFO)?)")
_MACHINE_READABLE = re.compile(r"\AFormat: ", re.M)
_LICENSE = re.compile(r"^License: *(\S.*?) *$", re.M)
_NAMESPACE = uuid.UUID("5b6c0f6e-1f0d-5c39-9a86-0d2b1d3a6f11")
"""Of our serial numbers, which follow from the image's digest."""

Object = dict[str, object]


def describe(image: Image, written: Written) -> Object:
    """The whole document. The same image gives the same."""
    files = read(image.layers)
    system = dict(line.split("=", 1) for line in files["usr/lib/os-release"].splitlines() if "=" in line)
    release = system["VERSION_ID"].strip('"')
    parts = [
        *(
            _of_debian(stanza, files, release)
            for stanza in files["var/lib/dpkg/status"].split("\n\n")
            if stanza.strip()
        ),
        *(_of_python(text) for path, text in sorted(files.items()) if _METADATA.fullmatch(path)),
    ]
    name, _, tag = image.reference.rpartition(":")
    short = name.rpartition("/")[2]
    own = f"pkg:oci/{short}@{quote(written.digest, safe='')}?arch={image.architecture}&tag={quote(tag, safe='')}"
    labels = image.labels
    created = labels.get("org.opencontainers.image.created")
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, written.digest)}",
        "version": 1,
        "metadata": {
            **({"timestamp": created} if created else {}),
            "component": {
                "type": "container",
                "bom-ref": own,
                "name": name,
                "version": written.digest,
                "purl": own,
                "properties": [{"name": key, "value": value} for key, value in sorted(labels.items())],
            },
        },
        "components": [
            {"type": "operating-system", "bom-ref": f"debian-{release}", "name": "debian", "version": release},
            *parts,
        ],
        "dependencies": [{"ref": own, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def read(layers: Sequence[Path]) -> dict[str, str]:
    """The files that tell what is inside, by path; that of a link is its target's."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for layer in layers:
        with tarfile.open(layer) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.issym() and re.fullmatch(r"usr/share/doc/[^/]+", name):
                    folders[name.rpartition("/")[2]] = member.linkname.rpartition("/")[2]
                wanted = name in ("var/lib/dpkg/status", "usr/lib/os-release") or _METADATA.fullmatch(name)
                if member.isfile() and (wanted or re.fullmatch(r"usr/share/doc/[^/]+/copyright", name)):
                    data = tar.extractfile(member)
                    files[name] = data.read().decode(errors="replace") if data else ""
    for folder, target in folders.items():
        copyright_file = files.get(f"usr/share/doc/{target}/copyright")
        if copyright_file is not None:
            files[f"usr/share/doc/{folder}/copyright"] = copyright_file
    return files


def _of_debian(stanza: str, files: Mapping[str, str], release: str) -> Object:
    name, version, architecture = (field(stanza, key) for key in ("Package", "Version", "Architecture"))
    source = field(stanza, "Source").partition(" ")[0]
    upstream = f"&upstream={quote(source, safe='')}" if source and source != name else ""
    purl = (
        f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch={architecture}&distro=debian-{release}"
    )
    licenses = licenses_in(files.get(f"usr/share/doc/{name}/copyright", ""))
    return {
        "type": "library",
        "bom-ref": purl + upstream,
        "name": name,
        "version": version,
        "purl": purl + upstream,
        **({"licenses": [{"license": {"name": each}} for each in licenses]} if licenses else {}),
    }


def licenses_in(text: str) -> list[str]:
    """The names in a machine-readable copyright file of Debian; of others, which are prose, none."""
    return sorted(set(_LICENSE.findall(text))) if _MACHINE_READABLE.search(text) else []


def _of_python(text: str) -> Object:
    found = HeaderParser().parsestr(text)
    name, version = re.sub(r"[-_.]+", "-", found["Name"]).lower(), found["Version"]
    stated = found["License-Expression"] or found["License"]
    licenses = [{"license": {"name": stated}}] if stated and "\n" not in stated and stated != "UNKNOWN" else []
    purl = f"pkg:pypi/{name}@{quote(version, safe='')}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": licenses} if licenses else {}),
    }
