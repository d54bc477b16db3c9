"""ttrpc without IO: bytes in, events out; calls in, frames out."""
