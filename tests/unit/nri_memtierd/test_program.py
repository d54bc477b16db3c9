"""What holds the program together: tasks that go on after a defect, threads whose death ends it with a reason."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from loguru import logger

from memtier_cli.nri_memtierd import program
from memtier_cli.nri_memtierd.aside import aside
from memtier_cli.nri_memtierd.orders import Orders


def test_a_task_that_ends_by_a_defect_is_told_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "AGAIN_S", 0.0)
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}", level="ERROR")
    went_on = asyncio.Event()
    runs = 0

    async def fragile() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ZeroDivisionError
        went_on.set()
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(program._kept("watching something", fragile))
        async with asyncio.timeout(30):
            await went_on.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    try:
        asyncio.run(main())
    finally:
        logger.remove(sink)
    assert runs == 3
    assert len([line for line in lines if "watching something failed: it is started again" in line]) == 2


def test_a_part_that_has_died_ends_the_program_as_a_signal_does() -> None:
    orders, told = Orders(), list[str]()
    orders.serve(lambda: told.append("end"), lambda: told.append("reload"))
    orders.end_now()
    assert told == ["end"]
    early = Orders()
    early.end_now()
    early.serve(lambda: told.append("early"), lambda: None)
    assert told == ["end", "early"]


def test_why_it_ended_is_left_where_the_kubelet_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "termination-log"
    monkeypatch.setattr(program, "TERMINATION_LOG", str(path))
    program._leave_message("nobody looks: there is no such file")
    assert not path.exists(), "on other machines nothing is made"
    path.write_text("x" * 9000)
    program._leave_message("the runtime refuses " + "y" * 5000)
    assert path.read_text().startswith("the runtime refuses")
    assert path.stat().st_size == 4096
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.unlink()
    path.symlink_to(victim)
    program._leave_message("not through a link")
    assert victim.read_text() == "precious"
    path.unlink()
    os.mkfifo(path)
    program._leave_message("nor into a pipe that nobody reads")


def test_work_beside_the_loop_gives_its_result_its_error_or_is_left_behind() -> None:
    def fails() -> int:
        raise KeyError("x")

    async def main() -> None:
        assert await aside(lambda: 7) == 7
        nothing: object = await aside(lambda: [].clear())
        assert nothing is None
        with pytest.raises(KeyError):
            await aside(fails)
        read, write = os.pipe()
        hanging = asyncio.create_task(aside(lambda: os.read(read, 1)))
        await asyncio.sleep(0)
        hanging.cancel()
        await asyncio.wait({hanging})
        assert hanging.cancelled()
        os.write(write, b"x")  # the thread ends, and nobody is told

    asyncio.run(main())
