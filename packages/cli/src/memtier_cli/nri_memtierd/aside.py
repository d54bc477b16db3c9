"""Work beside the event loop that may never return: a file of a file system that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


async def aside(call: Callable[[], Result]) -> Result:
    """The result of `call`, from a thread of its own.

    Unlike `asyncio.to_thread`: no pool that others' calls can use up, and nobody waits for the thread at the end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def finish(result: Result | None, error: BaseException | None) -> None:
        if future.done():  # cancelled meanwhile
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None is a result too

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as failure:
            error = failure
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name=f"aside-{getattr(call, '__name__', 'call')}", daemon=True).start()
    return await future
