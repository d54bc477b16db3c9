"""The releases of containerd/nri and containerd/ttrpc that the interop tests run: the one place that names them.

`PYTHONPATH=tests python -m interop.releases` asks the Go module proxy whether there is a newer one.
"""

from __future__ import annotations

import subprocess
import sys

NRI = {
    # release: a containerd that has it
    "v0.6.1": "v1.7.24",
    "v0.8.0": "v2.1.0",
    "v0.10.0": "v2.2.0",
    "v0.12.5": "v2.4.0",
}
TTRPC = ("v1.2.3", "v1.2.10")
"""What NRI v0.6 pins, and the newest."""

_MODULES = {"github.com/containerd/nri": [*NRI], "github.com/containerd/ttrpc": [*TTRPC]}
_TAGS = {"nri_v0_10": (0, 10), "nri_v0_12_4": (0, 12, 4)}


def numbers(release: str) -> tuple[int, ...]:
    """`v0.12.5` as (0, 12, 5)."""
    return tuple(int(part) for part in release.removeprefix("v").split("."))


def build_tags(module: str, release: str) -> str:
    """What of go/nri is compiled for a release: later ones have more."""
    found = [tag for tag, since in _TAGS.items() if module == "nri" and numbers(release) >= since]
    return ",".join(["nri_no_wasm", *found])


def main() -> int:
    """Tell of newer releases; exit status 1 if there are."""
    from interop.peers import go_command

    newer = False
    for module, ours in _MODULES.items():
        command = [go_command(), "list", "-m", "-versions", module]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1:]
        found = [each for each in listed if "-" not in each and numbers(each) > numbers(ours[-1])]
        newer = newer or bool(found)
        print(f"{module}: {ours[-1]} is tested; newer: {', '.join(found) or 'none'}")
    return 1 if newer else 0


if __name__ == "__main__":
    sys.exit(main())
