"""asyncio: sockets, time limits, reconnecting."""
