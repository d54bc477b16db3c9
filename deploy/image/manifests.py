#!/usr/bin/env python3
"""Write the Kubernetes manifests for a version of the image: what `kubectl kustomize` would, without kubectl.

Understands of a kustomization what deploy/kubernetes uses: resources, namespace, JSON patches, images.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).resolve().parents[1] / "kubernetes"
KINDS = ("apiVersion", "kind", "namespace", "resources", "patches")
VARIANTS = {"nri-memtierd-deployment.yaml": "base", "nri-memtierd-deployment-e2e.yaml": "overlays/e2e"}

Object = dict[str, Any]


class RenderError(Exception):
    """A kustomization that this does not understand."""


def main() -> int:
    """Write both files, print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, metavar="NAME:TAG", help="the image that the DaemonSet runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        for name, folder in VARIANTS.items():
            path = given.out / name
            path.write_text(to_text(with_image(render(KUBERNETES / folder), given.image)))
            print(path)
    except (RenderError, OSError, yaml.YAMLError) as error:
        print(f"manifests.py: {error}", file=sys.stderr)
        return 1
    return 0


def render(folder: Path) -> list[Object]:
    """All objects of a kustomization. Raises: RenderError."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - set(KINDS):
        raise RenderError(f"{folder}/kustomization.yaml: {', '.join(sorted(unknown))} is not understood")
    objects: list[Object] = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        objects += render(path.resolve()) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in kustomization.get("patches", ()):
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        target = patch["target"]
        chosen = [
            each for each in objects if each["kind"] == target["kind"] and each["metadata"]["name"] == target["name"]
        ]
        if not chosen:
            raise RenderError(f"{folder / patch['path']}: there is no {target['kind']} {target['name']}")
        for each in chosen:
            for operation in operations:
                apply(each, operation)
    if "namespace" in kustomization:
        for each in objects:
            each["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def apply(document: Object, operation: Object) -> None:
    """One operation of RFC 6902: replace or add. Raises: RenderError."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if operation["op"] == "replace":
            index = int(last) if isinstance(place, list) else last
            place[index]  # what is replaced must be there
            place[index] = copy.deepcopy(operation["value"])
        elif operation["op"] == "add" and isinstance(place, list):
            place.insert(len(place) if last == "-" else int(last), copy.deepcopy(operation["value"]))
        elif operation["op"] == "add":
            place[last] = copy.deepcopy(operation["value"])
        else:
            raise RenderError(f"patch operation {operation['op']} is not understood")
    except (KeyError, IndexError, TypeError, ValueError):
        raise RenderError(f"patch path {operation['path']} leads nowhere") from None


def with_image(objects: list[Object], image: str) -> list[Object]:
    """The same with another image."""
    for each in objects:
        if each["kind"] == "DaemonSet":
            each["spec"]["template"]["spec"]["containers"][0]["image"] = image
    return objects


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_text(objects: list[Object]) -> str:
    """One YAML document per object."""
    text: str = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, explicit_start=True)
    return text


if __name__ == "__main__":
    sys.exit(main())
