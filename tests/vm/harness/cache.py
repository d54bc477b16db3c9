"""A content-addressed cache: name of what goes in -> a finished folder, built once, under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vm.harness.errors import VmError

LAYERS_KEPT = 4
LAYER_MIN_AGE_S = 3600
"""A layer younger than this may belong to a VM that is just starting."""


def digest(*parts: str | bytes) -> str:
    """16 hex digits over the parts; each part's length goes in too, so ("ab", "c") is not ("a", "bc")."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:16]


def digest_files(root: Path, files: Mapping[str, Path] | None = None) -> str:
    """Digest of names, execute bits and contents of all files under `root`, or of `files` by name."""
    if files is None:
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    parts: list[str | bytes] = []
    for name, path in sorted(files.items()):
        executable = "x" if path.stat().st_mode & 0o100 else "-"
        parts += [name, executable, path.read_bytes()]
    return digest(*parts)


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    """$MEMTIER_VM_CACHE, else memtier/vm in the user's cache folder."""
    if chosen := environ.get("MEMTIER_VM_CACHE"):
        return Path(chosen).absolute()
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "memtier" / "vm"


class Cache:
    """Finished folders `KIND-KEY` under one root. An entry appears by rename, whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VmError(f"VM cache {root}: {error}", hint="set MEMTIER_VM_CACHE to a folder of yours") from error

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock `name`; it goes with the process, however that ends."""
        with (self.root / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def entry(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of `kind` and `key`. `build` fills an empty folder if there is none yet.

        Raises: what `build` raises; the half-filled folder is removed then.
        """
        final = self.root / f"{kind}-{key}"
        if final.is_dir():
            os.utime(final)
            return final
        with self.locked(f"{kind}-{key}"):
            if final.is_dir():  # another process built it while this one waited
                return final
            for stale in self.root.glob(f"tmp-{kind}-{key}.*"):  # of a builder that was killed; we hold its lock
                remove_tree(stale)
            partial = self.root / f"tmp-{kind}-{key}.{os.getpid()}"
            partial.mkdir()
            try:
                build(partial)
                partial.rename(final)
            finally:
                if partial.exists():
                    remove_tree(partial)
        return final

    def drop(self, kind: str, key: str) -> None:
        """Remove an entry, so that the next request builds it anew."""
        with self.locked(f"{kind}-{key}"):
            final = self.root / f"{kind}-{key}"
            if final.exists():
                remove_tree(final)

    def prune(self, kind: str, keep: int = LAYERS_KEPT, min_age_s: float = LAYER_MIN_AGE_S) -> None:
        """Remove the least recently used entries beyond `keep`, but none used in the last `min_age_s`."""
        entries = sorted(self.root.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[keep:]:
            if time.time() - path.stat().st_mtime > min_age_s:
                remove_tree(path)
                (self.root / f".{path.name}.lock").unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder, also one whose folders are not writable.

    Raises: VmError when something is mounted below it: removing would reach through the mount.
    """
    inside = f"{path.resolve()}/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if (point := line.split()[4]).startswith(inside):
            raise VmError(f"{point} is a mount point", hint=f"unmount it, then remove {path}")

    def make_writable_and_retry(function: Callable[[str], object], name: str, _info: object) -> None:
        parent = Path(name).parent
        parent.chmod(0o700)
        function(name)

    shutil.rmtree(path, onerror=make_writable_and_retry)
