"""A caller that has closed standard files, as some supervisors do: the programs work as with /dev/null there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.waiting import WAIT_S

MEMTIERD = "from memtier_cli.memtierd.program import main; sys.exit(main())"
MEME = "from memtier_cli.meme import main; sys.exit(main())"
MEMTIER = "from memtier_cli.memtier.program import main; main()"


def run(program: str, closed: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", f"import sys; {program}", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (MEMTIER, ["--version"], "memtier, version"),
        (MEMTIERD, ["-c", "log -i x\nstats -t events\nlog -i y"], "table: events"),
        (MEMTIERD, ["-prompt"], "quit.\n"),
        (MEME, ["-bs", "1M", "-ttl", "1ms"], "memory exerciser\n"),
    ],
    ids=["memtier", "memtierd", "prompt", "meme"],
)
def test_closed_ones_are_as_dev_null(program: str, words: list[str], said: str, closed: str) -> None:
    done = run(program, closed, *words)
    assert (done.returncode, "Traceback" in done.stderr, "failed" in done.stdout) == (0, False, False), done
    assert (said in done.stdout) == (">&-" not in closed.replace("2>&-", ""))
