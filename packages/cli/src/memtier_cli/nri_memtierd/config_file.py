"""The configuration file, read again when it changes: never half of it, and if anything is wrong the old one stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from memtier_cli.nri_memtierd.aside import aside
from memtier_cli.nri_memtierd.config import CheckTemplate, PluginConfig, is_empty, load_bytes, read_bytes
from memtier_engine.errors import ConfigError

POLL_S = 2.0
"""Time between looks at the file."""
SETTLE_S = 0.2
"""Between two looks when somebody asked for it."""
SETTLE_LOOKS = 25
"""Then it is read as it is."""

_Identity = tuple[int, int, int, int]


class ConfigFile:
    """A file, and whether it has changed: written again, or (a ConfigMap) its link switched."""

    def __init__(self, path: Path, check_template: CheckTemplate) -> None:
        self.path = path
        self._check_template = check_template
        self._seen: _Identity | None = None
        self._candidate: _Identity | None = None
        self._content: bytes | None = None

    def load(self) -> PluginConfig:
        """Read it now. Raises: ConfigError, and nothing else."""
        return self._load(empty_is_wrong=False)

    def changed(self) -> bool:
        """Whether its content is another than at the last `load`, and the same as at the look before this one.

        An editor, `cp` and `echo >` write in steps: what changes between two looks is not complete yet.
        """
        identity = self.look()
        if identity is None or identity == self._seen:  # absent for a moment while it is replaced
            self._candidate = None
            return False
        if identity != self._candidate:
            self._candidate = identity
            return False
        self._candidate = None
        if self._read_quietly() == self._content:  # written again, the same
            self._seen = identity
            return False
        return True

    def reload(self) -> PluginConfig | None:
        """Read it; None, and a message, if it cannot be used."""
        try:
            config = self._load(empty_is_wrong=True)
        except ConfigError as error:
            logger.error("the configuration in force stays, the new one cannot be used: {}", error)
            return None
        logger.info("configuration read from {}: {} classes", self.path, len(config.classes))
        return config

    def _load(self, *, empty_is_wrong: bool) -> PluginConfig:
        self._seen, self._candidate = self.look(), None
        self._content = None
        try:
            content = read_bytes(self.path)
            self._content = content
            if is_empty(content):
                if empty_is_wrong:
                    hint = "write `classes: []` if there are to be none"
                    raise ConfigError("is empty", file=str(self.path), hint=hint)
                logger.warning("{} is empty: there are no classes", self.path)
            return load_bytes(content, self._check_template, file=str(self.path))
        except ConfigError:
            raise
        except Exception as error:
            # A value that some decoder cannot bear, whatever it is: never a reason to end or to stop looking.
            logger.opt(exception=error).debug("checking {} failed", self.path)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(f"cannot be used: {why}", file=str(self.path)) from None

    def look(self) -> _Identity | None:
        """Which file it is and when it was written; None: it is not there."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _read_quietly(self) -> bytes | None:
        try:
            return read_bytes(self.path)
        except ConfigError:
            return None


class ConfigWatch:
    """Looks at the file and hands over what is new. The event loop only waits: files and YAML are read beside it."""

    def __init__(
        self,
        file: ConfigFile | None,
        use: Callable[[PluginConfig], object],
        *,
        beat: Callable[[], object] = lambda: None,
        poll_s: float = POLL_S,
    ) -> None:
        """`beat` is called at each look. Without a file there is nothing to look at, and asking is answered so."""
        self._file = file
        self._use = use
        self._beat = beat
        self._poll_s = poll_s
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read the file again soon, changed or not. In the event loop's thread."""
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._beat()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._asked.wait()
            except TimeoutError:
                if self._file is not None and await aside(self._file.changed):
                    await self._reload(self._file)
                continue
            self._asked.clear()
            if self._file is None:
                logger.warning("there is no configuration file to read again: start with -config FILE")
                continue
            for _ in range(SETTLE_LOOKS):
                self._beat()
                if await self._settled(self._file):
                    break
            await self._reload(self._file)

    async def _settled(self, file: ConfigFile) -> bool:
        """Whether two looks, a moment apart, find the same."""
        before = await aside(file.look)
        await asyncio.sleep(SETTLE_S)
        return await aside(file.look) == before

    async def _reload(self, file: ConfigFile) -> None:
        config = await aside(file.reload)
        if config is not None:
            self._use(config)
