"""Program `nri-memtierd`: the reference plugin's flags, configuration and annotations, and some more flags.

Exit status: 0 told to end, or pre-launched and the runtime closed the connection; 1 a configuration or start
error (one line, nothing was started); 2 wrong usage.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memtier_cli import standard_files
from memtier_cli.flags import Flag, Parsed, UsageError
from memtier_cli.front import BEHIND, read_flags
from memtier_cli.nri_memtierd.health import probe
from memtier_cli.nri_memtierd.orders import Orders

if TYPE_CHECKING:
    from memtier_cli.logqueue import LogQueue
    from memtier_cli.nri_memtierd.config import CheckTemplate, PluginConfig
    from memtier_cli.nri_memtierd.config_file import ConfigFile
    from memtier_cli.nri_memtierd.launch.base import Launcher
    from memtier_cli.nri_memtierd.plugin import MemtierdPlugin
    from memtier_cli.nri_memtierd.supervisor import Supervisor

SOCKET = "/var/run/nri/nri.sock"
RUN_DIRECTORY = "/var/run/nri-memtierd"
FLAGS = (
    Flag("config", "read classes and node-wide settings from FILE; read again on SIGHUP and when it changes", "FILE"),
    Flag("idx", "plugin index to register, two digits", "NN"),
    Flag("name", "plugin name to register", "NAME"),
    Flag("cgroups-dir", "root of the cgroup v2 tree; found by itself if not given", "DIR"),
    Flag("run-dir", "where files of each container go", "DIR", RUN_DIRECTORY),
    Flag("v", "also log decisions"),
    Flag("vv", "log everything, and a line per scan in each container's memtierd.output"),
    Flag("socket", "NRI socket of the runtime", "PATH", SOCKET),
    Flag("log-format", "text or json", "FORMAT", "text"),
    Flag("adopt", "take care of containers that run already (default true)"),
    Flag("no-adopt", "leave containers alone that run already"),
    Flag("on-unknown-class", "fail: pods with an unknown class are not created; ignore: they get none", "WHAT", "fail"),
    Flag("engine", "in-process, or process: one memtierd per container", "KIND", "in-process"),
    Flag("healthy", "say whether the program that uses -run-dir is well (0) or stuck (1), connected or trying to be"),
    Flag("ready", "as -healthy, and whether it is connected to the runtime"),
    Flag("version", "print the version and exit"),
)  # fmt: skip
_CHOICES = {
    "log-format": ("text", "json"),
    "on-unknown-class": ("fail", "ignore"),
    "engine": ("in-process", "process"),
}
_INDEX = re.compile(r"[0-9]{2}", re.ASCII)
TERMINATION_LOG = "/dev/termination-log"
LAST_WORDS_S = 1.0
"""How long the end waits for whoever reads the log."""
AGAIN_S = 1.0
FLEET_LIMIT_S = 60.0
"""It starts one engine at a time, and trying what this kernel offers takes a while."""
LOOP_LIMIT_S = 10.0
WATCH_LIMIT_S = 60.0
SWITCH_INTERVAL_S = 0.001
"""Engines' threads hand over to the hooks after at most this: the default of 5 ms adds up over several threads."""


def main(orders: Orders | None = None) -> int:
    """Run the program; returns the exit status. `orders`: what listens to signals already."""
    if orders is None:
        orders = Orders()
        orders.listen()
    program = Path(sys.argv[0]).name
    flags = read_flags(program, FLAGS, lambda parsed: _check(parsed, program))
    if isinstance(flags, int):
        return flags
    if _is_probe(flags):
        well, words = probe(Path(flags.text("run-dir", RUN_DIRECTORY)), ready=flags.boolean("ready"))
        print(words)
        return 0 if well else 1
    index, name = identity(flags, program)

    from memtier_cli.logqueue import LogQueue, lost_object, lost_text
    from memtier_engine.errors import MemtierError
    from memtier_engine.hostfs.limits import raise_open_files
    from nri_core import NriError

    raise_open_files()
    standard_files.occupy()
    fd = 2 if sys.stderr is None else sys.stderr.fileno()
    log = LogQueue(fd, tell_lost=lost_object if _as_json(flags) else lost_text)
    log.start()
    try:
        return _serve(flags, index, name, orders, log)
    except (MemtierError, NriError) as error:
        _last_words(log, str(error), as_json=_as_json(flags))
        return 1
    except Exception as defect:
        from loguru import logger

        logger.exception("a defect ends the program")
        _leave_message(f"a defect ended the program: {type(defect).__name__}: {defect}")
        return 1
    finally:
        log.close(LAST_WORDS_S)


def identity(flags: Parsed, program: str) -> tuple[str, str]:
    """(index, name) to register.

    With -idx the name is -name or the program's own. Without, the runtime gave both, or the program is called
    NN-name, which then beats -name.

    Raises:
        UsageError: there is no index, it is not two digits, or there are two.
    """
    index, name = flags.text("idx"), flags.text("name")
    given = os.environ.get("NRI_PLUGIN_IDX", "")
    if index and given:
        raise UsageError(f"-idx {index}: the runtime gave the index {given} already (NRI_PLUGIN_IDX); leave -idx out")
    if not index and not given:
        index, dash, rest = program.partition("-")
        if not dash or not rest or not _INDEX.fullmatch(index):
            raise UsageError("-idx is missing: give two digits, or call the program NN-name")
        return index, rest
    index = index or given
    if not _INDEX.fullmatch(index):
        raise UsageError(f"-idx {index}: the index is two digits, 00 to 99")
    return index, name or os.environ.get("NRI_PLUGIN_NAME", "") or program


def _check(flags: Parsed, program: str) -> None:
    if flags.rest:  # privileged, and without the flags behind it: another run directory, no classes
        raise UsageError(f"{flags.rest[0]}: no such argument (no flag is read {BEHIND})")
    for name, allowed in _CHOICES.items():
        value = flags.text(name, allowed[0])
        if value not in allowed:
            raise UsageError(f"-{name} {value}: use {' or '.join(allowed)}")
    if flags.boolean("no-adopt") and flags.boolean("adopt"):
        raise UsageError("-adopt and -no-adopt exclude each other")
    if flags.has("run-dir") and not flags.text("run-dir"):
        raise UsageError("-run-dir is empty: is a variable of the command line not set?")
    if not _is_probe(flags):
        identity(flags, program)


def _is_probe(flags: Parsed) -> bool:
    return flags.boolean("healthy") or flags.boolean("ready")


def _leave_message(text: str) -> None:
    """Why it ended, where the kubelet shows it to whoever asks about the pod."""
    with suppress(OSError):
        fd = os.open(TERMINATION_LOG, os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode(errors="replace")[:4096])
        finally:
            os.close(fd)


def _as_json(flags: Parsed) -> bool:
    return flags.text("log-format") == "json"


def _last_words(log: LogQueue, text: str, *, as_json: bool) -> None:
    from loguru import logger

    _leave_message(text)
    if as_json:
        logger.error("{}", text)
    else:
        log.put(f"nri-memtierd: {text}\n")


def _serve(flags: Parsed, index: str, name: str, orders: Orders, log: LogQueue) -> int:
    import asyncio

    from memtier_cli import libraries

    libraries.ready()
    from loguru import logger

    from memtier_cli import allocator
    from memtier_cli.logs import configure_daemon
    from memtier_cli.nri_memtierd.config_file import ConfigFile
    from memtier_cli.nri_memtierd.fleet import Fleet
    from memtier_cli.nri_memtierd.launch.base import Stepping
    from memtier_cli.nri_memtierd.plugin import MemtierdPlugin
    from memtier_cli.nri_memtierd.rundir import RunDirectory
    from memtier_cli.nri_memtierd.supervisor import Supervisor
    from memtier_engine.errors import MemtierError

    verbose = flags.boolean("v") or flags.boolean("vv")
    configure_daemon(log, debug=verbose, trace=flags.boolean("vv"), as_json=_as_json(flags))
    _check_identity(index, name)
    check_template = _template_check(flags)
    file = ConfigFile(Path(flags.text("config")), check_template) if flags.text("config") else None
    config = file.load() if file else None  # everything is checked before anything is touched
    cgroup_root = _cgroup_root(flags.text("cgroups-dir"))
    orders.hold()
    run_directory = RunDirectory(Path(flags.text("run-dir", RUN_DIRECTORY)))
    run_directory.claim()
    try:
        _warn_without_swap(config)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        allocator.settle()
        allocator.unmap_idle_code()
        on_unknown_class = "ignore" if flags.text("on-unknown-class") == "ignore" else "fail"
        launcher = _launcher(flags)
        supervisor = Supervisor(
            run_directory,
            steps=launcher.steps if isinstance(launcher, Stepping) else lambda: (),
            containers=lambda: fleet.status(),
            lines_lost=lambda: log.lost_total,
            fatal=lambda why: fail(why),
        )
        fleet = Fleet(
            config,
            run_directory,
            launcher,
            cgroup_root=cgroup_root,
            on_unknown_class=on_unknown_class,  # type: ignore[arg-type]
            beat=supervisor.part("fleet", FLEET_LIMIT_S),
        )
        supervisor.needs("the fleet's thread", fleet.is_alive)
        adopt = not flags.boolean("no-adopt") and flags.booleans.get("adopt", True)
        plugin = MemtierdPlugin(
            fleet,
            config=config,
            cgroup_root=cgroup_root,
            check_template=check_template,
            on_unknown_class=on_unknown_class,  # type: ignore[arg-type]
            adopt=adopt,
            connection=supervisor.connection,
            beat=supervisor.part("event loop", LOOP_LIMIT_S),
        )

        def fail(why: str) -> None:
            plugin.fatal = MemtierError(why)
            orders.end_now()

        plugin.index, plugin.name = index, name
        classes = len(config.classes) if config else 0
        logger.info("{}-{}: {} classes, run directory {}", index, name, classes, run_directory.path)
        fleet.start()
        supervisor.start()
        try:
            asyncio.run(_run(plugin, file, flags.text("socket", SOCKET), orders, supervisor))
        finally:
            orders.served()
            supervisor.stop()
            if supervisor.connection.state == "connecting":
                _leave_message(str(supervisor.connection))
            if not fleet.stop():
                logger.warning("an engine did not stop in time; the process ends without waiting for it")
    finally:
        run_directory.release()
    if plugin.fatal is not None:
        raise plugin.fatal
    return 0


async def _run(
    plugin: MemtierdPlugin, file: ConfigFile | None, socket: str, orders: Orders, supervisor: Supervisor
) -> None:
    """Serve until a signal says stop, or a pre-launched plugin's connection ends."""
    import asyncio

    from loguru import logger

    from memtier_cli.nri_memtierd.config_file import ConfigWatch
    from nri_core import Stub

    stub = Stub(plugin, socket_path=socket)
    watch = ConfigWatch(file, plugin.use, beat=supervisor.part("configuration watch", WATCH_LIMIT_S))
    loop = asyncio.get_running_loop()
    # Not the loop's own handlers: when it ends it would take them away while engines are being stopped.
    orders.serve(lambda: loop.call_soon_threadsafe(stub.stop), lambda: loop.call_soon_threadsafe(watch.ask))
    tasks = [
        asyncio.create_task(_kept("watching the event loop", plugin.times.watch_loop)),
        asyncio.create_task(_kept("watching the configuration", watch.run)),
    ]
    try:
        await stub.run()
    finally:
        for task in tasks:
            task.cancel()
        logger.info("{}", plugin.times)


async def _kept(what: str, run: Callable[[], Awaitable[None]]) -> None:
    """A task that is to run as long as the program: one that ends by a defect is told and started again."""
    import asyncio

    from loguru import logger

    while True:
        try:
            await run()
        except Exception:
            logger.exception("{} failed: it is started again", what)
        await asyncio.sleep(AGAIN_S)


def _check_identity(index: str, name: str) -> None:
    """Raise LocalProtocolError for a name that no runtime takes: before anything is touched."""
    from nri_core import Plugin
    from nri_core.plugin import identity as checked

    plugin = Plugin()
    plugin.index, plugin.name = index, name
    checked(plugin)


def _template_check(flags: Parsed) -> CheckTemplate:
    if flags.text("engine") == "process":
        from memtier_cli.nri_memtierd.launch.process import check_template as check_for_process

        return check_for_process
    from memtier_cli.nri_memtierd.launch.inprocess import check_template

    return check_template


def _launcher(flags: Parsed) -> Launcher:
    if flags.text("engine") == "process":
        from memtier_cli.nri_memtierd.launch.process import ProcessLauncher

        return ProcessLauncher(debug_output=flags.boolean("vv"))
    from memtier_cli.nri_memtierd.launch.inprocess import InProcessLauncher
    from memtier_engine.hostfs.host import Host

    return InProcessLauncher(Host(), debug_output=flags.boolean("vv"))


def _cgroup_root(given: str) -> Path:
    from memtier_engine.errors import ConfigError
    from memtier_engine.hostfs.host import Host

    if not given:
        return Host().cgroup2_root
    root = Path(given)
    if not (root / "cgroup.procs").exists():
        raise ConfigError(f"-cgroups-dir {given}: is not a cgroup v2 directory", hint="usually /sys/fs/cgroup")
    return root


def _warn_without_swap(config: PluginConfig | None) -> None:
    from loguru import logger

    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.proc import read_swaps

    wants = [each.name for each in (config.classes if config else ()) if each.allow_swap]
    if wants and not read_swaps(Host()):
        logger.warning("the node has no swap: classes {} can page nothing out until there is some", ", ".join(wants))


if __name__ == "__main__":
    sys.exit(main())
