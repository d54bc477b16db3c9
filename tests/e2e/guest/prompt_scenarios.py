"""`memtierd -prompt` where there are NUMA nodes, the idle page bitmap and soft-dirty bits; one JSON line each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saying import say
from scene import main, wait_for

from memtier_engine.model import PAGE_BYTES
from support.prompt import Daemon, memtierd
from support.toucher import Toucher, toucher

PAGES = 2048


@contextmanager
def stage() -> Iterator[tuple[Daemon, Toucher, str]]:
    """A prompt, a process with 8 MiB, and the flags that name its memory."""
    with memtierd() as daemon, toucher("anonymous", PAGES, Path("/tmp")) as child:
        child.write(range(PAGES))
        yield daemon, child, f"-pid {child.process.pid} -ranges {child.address:x}+{PAGES * PAGE_BYTES >> 10}k"
        daemon.tell("q")
        status, errors = daemon.end()
        assert status == 0, errors
        assert "Traceback" not in errors, errors


def moves() -> None:
    with stage() as (daemon, _child, memory):
        nodes = []
        for node in (3, 1, 0, 2):
            daemon.ask(f"pages {memory}")
            daemon.ask(f"mover -config 'bandwidth: 1000' -pages-to {node} -wait")
            nodes.append(daemon.ask("pages").splitlines()[1:])
        daemon.ask(f"pages {memory} -node 1")
        none = daemon.ask("pages").splitlines()[1:]
        daemon.ask(f"pages {memory} -node 2")
        row = daemon.ask("stats -t move_pages -f csv").splitlines()[-1]
        say(kind="moves", nodes=nodes, none=none, two=daemon.ask("pages").splitlines()[1:], row=row.split(",")[5])


def bits() -> None:
    with stage() as (daemon, child, memory):

        def first() -> str:
            return daemon.ask(f"pages {memory} -pm 1").splitlines()[-1]

        pfn = first().split()[-1]
        daemon.ask(f"pages -si {pfn}")
        marked = daemon.ask(f"pages -pi {pfn}")

        def read_again() -> bool:
            child.read([0])
            return "false" in daemon.ask(f"pages -pi {pfn}")

        touched_s = wait_for(read_again, 30)
        daemon.ask(f"tracker -create softdirty -config 'scanintervalms: 100' -start {child.process.pid}")
        cleared_s = wait_for(lambda: dirty(daemon, memory) == 0, 30)
        daemon.ask("tracker -stop")
        child.write(range(0, 100, 10))
        say(
            kind="bits",
            marked=marked,
            touched_s=touched_s,
            cleared_s=cleared_s,
            dirty=dirty(daemon, memory),
            clean=dirty(daemon, memory, "NotDirty"),
            shown=first().split(" pfn")[0].rpartition(" ")[2],
        )


def dirty(daemon: Daemon, memory: str, attribute: str = "Dirty") -> int:
    found = re.search(r"pages = <(\d+) ", daemon.ask(f"pages {memory} -attrs Present,{attribute}"))
    return int(found[1]) if found else -1


def trackers() -> None:
    """What each tracker counts of the first 2 MiB, which are touched, and of the rest, which is not."""
    configs = {
        "idlepage": "{scanintervalms: 300, pagesinregion: 512, maxcountperregion: 0}",
        "softdirty": "{scanintervalms: 300, pagesinregion: 512, maxcountperregion: 0}",
        "damon": "{aggregationus: 200000}",
        "multi": "{trackers: [{name: idlepage, config: {scanintervalms: 300}}, {name: finder}]}",
    }
    for name, config in configs.items():
        with stage() as (daemon, child, _):

            def counted(daemon: Daemon = daemon, child: Toucher = child) -> tuple[int, int]:
                child.write(range(512))
                hot = cold = 0
                for line in daemon.ask("tracker -counters").splitlines():
                    found = re.match(r"a=(\d+) r=0 w=(\d+) AddrRanges{pid=\d+ ranges=([0-9a-f]+)-", line)
                    if found and child.address <= int(found[3], 16) < child.address + PAGES * PAGE_BYTES:
                        number = int(found[1]) + int(found[2])
                        if int(found[3], 16) < child.address + 512 * PAGE_BYTES:
                            hot += number
                        else:
                            cold += number
                return hot, cold

            daemon.ask(f"tracker -create {name} -config '{config}' -start {child.process.pid}")
            wait_for(lambda counted=counted: counted()[0] > 0, 60)  # type: ignore[misc]
            time.sleep(1)
            daemon.ask("tracker -reset")  # the first scan takes everything for touched
            daemon.ask("tracker -dump raw start")
            began_s = time.monotonic()
            while time.monotonic() - began_s < 4:
                hot, cold = counted()
                time.sleep(0.1)
            rows = daemon.ask("tracker -dump raw new").count(f" {child.process.pid} ")
            say(kind=f"tracker-{name}", hot=hot, cold=cold, rows=rows, dump=daemon.ask("tracker -dump regions")[:20])


SCENARIOS: dict[str, Callable[[], None]] = {"moves": moves, "bits": bits, "trackers": trackers}

if __name__ == "__main__":
    main(SCENARIOS)
