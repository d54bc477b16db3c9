"""Page table words of x86_64 into columns. No IO.

Source: arch/x86/include/asm/pgtable_types.h and pgtable.h. The states are those of `access.bpf.c`.
"""

from __future__ import annotations

import numpy as np

from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, Bools

PTE_PRESENT = 1 << 0
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6
PTE_HUGE = 1 << 7
PTE_PROT_NONE = 1 << 8
"""A page without access rights (mprotect, NUMA balancing): in memory, though not PRESENT to the CPU."""

BLOCK_BYTES = 2 << 20
BLOCK_PAGES = 512
HEAD_ONLY = 1
"""In an asked address: tell the block's state, do not copy its table."""

STATE_NOTHING, STATE_TABLE, STATE_HUGE_PMD, STATE_HUGE_PUD, STATE_UNSTABLE, STATE_GONE = range(6)
OTHER_MMU = 256
"""Added to the state of a run's first block: a KVM guest or a device uses the memory by page tables of its own."""

SWAP_TYPE_SHIFT, SWAP_TYPES = 59, 23
"""The least MAX_SWAPFILES can be: types from there on are migration, markers, ... (include/linux/swap.h)"""

_NOT_WITHIN_BLOCK = np.uint64(2**64 - 1 - (BLOCK_BYTES - PAGE_BYTES))

TOP_SHIFT_4_LEVELS = 39
TOP_SHIFT_5_LEVELS = 48


def fill_blocks(states: U64, entries: U64, words: U64) -> None:
    """Make every row of `words` say what its block's state says.

    Args:
        states: uint64[n].
        entries: uint64[n]: the entry that maps the block as a whole, for the huge states.
        words: uint64[n, 512], changed in place: rows of huge pages become what 512 small pages with their entry's bits
            would show; rows of unstable blocks count as accessed; others without a table become 0.
    """
    if (states == STATE_TABLE).all():
        return
    words[(states == STATE_NOTHING) | (states == STATE_GONE)] = 0
    # The table changed while it was read (mapped, unmapped, collapsed): in use, then.
    words[states == STATE_UNSTABLE] = PTE_PRESENT | PTE_ACCESSED
    huge = (states == STATE_HUGE_PMD) | (states == STATE_HUGE_PUD)
    # While it is split a huge entry is not PRESENT for a moment, but keeps HUGE. Its address bits below its size mean
    # other things (bit 12: PAT).
    bases = (entries[huge] & _NOT_WITHIN_BLOCK) | np.uint64(PTE_PRESENT)
    words[huge] = bases[:, None] | (np.arange(BLOCK_PAGES, dtype=np.uint64) << np.uint64(PAGE_SHIFT))


def resident(words: U64) -> Bools:
    """bool[n]: maps a page in memory. Swap entries have neither bit set."""
    found: Bools = (words & np.uint64(PTE_PRESENT | PTE_PROT_NONE)) != 0
    return found


def accessed(words: U64) -> Bools:
    """bool[n]: touched since the bit was cleared, of words that are `resident`."""
    found: Bools = (words & np.uint64(PTE_ACCESSED)) != 0
    return found


def dirty(words: U64) -> Bools:
    """bool[n]: written since the kernel last cleaned the page, of words that are `resident`."""
    found: Bools = (words & np.uint64(PTE_DIRTY)) != 0
    return found


def swapped(words: U64) -> Bools:
    """bool[n]: holds a swap entry: neither empty nor resident, and not one of the special kinds (a page on its way to
    another node, a marker)."""
    found = np.zeros(len(words), np.bool_)
    absent = np.flatnonzero((words & np.uint64(PTE_PRESENT | PTE_PROT_NONE)) == 0)
    if len(absent):
        entries = words[absent]
        found[absent] = (entries != 0) & (entries >> np.uint64(SWAP_TYPE_SHIFT) < np.uint64(SWAP_TYPES))
    return found


def frames(words: U64, mask: int) -> U64:
    """uint64[n]: frame numbers of words that are `resident`; `mask`: the address bits of an entry."""
    numbers: U64 = (words & np.uint64(mask)) >> np.uint64(PAGE_SHIFT)
    return numbers
