"""What stays in RAM though it is idle, and what is not looked at: one line with pid, amount and reason, once."""

from __future__ import annotations

from collections.abc import Mapping

from loguru import logger

from memtier_engine.model import Why
from memtier_engine.pages.space import AddressSpace

MIB = 1 << 20
TOLD_FROM_BYTES = MIB
"""Less is not worth a line."""
AGAIN_FACTOR = 2
"""Another line once it is so many times what was said last."""

REASONS: Mapping[Why, str] = {
    Why.LOCKED: "locked in memory (mlock, or a mapping the kernel never pages out)",
    Why.SHARED: "shared with other processes: paging it out of one frees nothing",
    Why.FILE: "pages of files, which are not ours to drop",
    Why.HEADLESS: "its first thread has ended, and the kernel pages out by that one",
    Why.HUGE: "parts of huge pages that are not idle as a whole",
    Why.BUSY: "kept by the kernel, which does not say why (pinned, or just in use by it)",
    Why.NO_ROOM: "no room in swap: none is on, or all of it is full (swapon; `memtier check`)",
}


def tell(space: AddressSpace) -> None:
    """Say what is new about a space."""
    for why, amount in space.kept_bytes().items():
        if amount >= max(TOLD_FROM_BYTES, AGAIN_FACTOR * space.told.get(why, 0)):
            space.told[why] = amount
            logger.info(
                "pid {}: {:.0f} MiB stay in RAM: {}", space.process.pid, amount / MIB, reason(why, space.sharers)
            )
    if len(space.left_out) and not space.told_left_out:
        space.told_left_out = True
        logger.warning(
            "pid {}: mappings of {:.0f} GiB are not looked at: they are nearly empty, and this kernel offers no cheap "
            "way to find what is in them (PAGEMAP_SCAN, Linux 6.7)",
            space.process.pid,
            space.left_out.total_bytes / (1 << 30),
        )


def reason(why: Why, sharers: int = 1) -> str:
    """Why memory stays, in words."""
    if why is Why.SHARED and sharers > 1:
        return f"shared by {sharers} processes: paging it out of one frees nothing"
    return REASONS.get(why, why.name.lower())
