"""The test VM's harness, as far as it goes without a boot: keys, files, arguments, and that nothing hangs or leaks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vm import VmResult, VmSession
from support.waiting import WAIT_S, until
from vm.harness import accel, cpio, disks, distribution, images, kernel, layer, rootfs
from vm.harness.build import Parts
from vm.harness.cache import Cache, digest, digest_files
from vm.harness.errors import VmError, VmTimeout
from vm.harness.machine import Options, Vm, sweep_run_folders
from vm.harness.qemu import Machine, Node, Writes, default_nodes, numa_arguments, parse_nodes

ROOT = Path(__file__).parents[2]
FRAGMENT = ROOT / "tests/vm/kernel.config"

FAKE_QEMU = r"""
import base64, os, re, subprocess, sys, time
words = sys.argv[1:]
fds = {m[1]: int(m[2]) for m in (re.fullmatch(r"socket,id=(ctl|out),fd=(\d+)", w) for w in words) if m}
console = next(w for w in words if w.startswith("file:") and w.endswith("console.log"))[5:]
with open(console, "w") as log:
    log.write("the guest's last words\n")
if "append=never-ready" in " ".join(words):
    time.sleep(1000)
os.write(fds["ctl"], b"ready 1.00\n")
for line in os.fdopen(os.dup(fds["ctl"]), "rb"):
    verb, _, argument = line.strip().partition(b" ")
    if verb == b"off":
        break
    done = subprocess.run(["/bin/sh", "-c", base64.b64decode(argument)], stdout=subprocess.PIPE)
    view = memoryview(done.stdout)
    while view:
        view = view[os.write(fds["out"], view):]
    if done.returncode == 99:
        sys.exit(1)
    if done.returncode == 98:
        time.sleep(1000)
    os.write(fds["ctl"], b"exit %d 2.00\n" % done.returncode)
"""
"""Speaks the agent's protocol with the shell of this host. Status 99: the guest dies. Status 98: it hangs."""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the run folders of this test alone."""
    folder = tmp_path / "run-folders"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A VM whose QEMU is a script."""
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!{sys.executable} -SE\n{FAKE_QEMU}")
    qemu.chmod(0o755)
    return Parts(
        repo=tmp_path,
        kernel=tmp_path / "vmlinuz",
        initramfs=tmp_path / "initramfs",
        rootfs=tmp_path,
        layer=tmp_path,
        scratch=tmp_path / "scratch.img",
        qemu=str(qemu),
        accelerator="tcg",
    )


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that run still; a zombie does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(pid)
    return found


# -- kernel options -------------------------------------------------------------------------------


def test_an_option_that_is_not_set_and_one_set_to_n_are_the_same() -> None:
    """kconfig writes the first and reads both."""
    assert kernel.parse_fragment("# CONFIG_A is not set\n") == kernel.parse_fragment("CONFIG_A=n\n") == {"A": "n"}


def test_comments_headings_and_empty_lines_are_no_options() -> None:
    assert kernel.parse_fragment('# -- swap --\n\nCONFIG_SWAP=y\nCONFIG_LOCALVERSION="-x"\n') == {
        "SWAP": "y",
        "LOCALVERSION": '"-x"',
    }


@pytest.mark.parametrize("line", ["CONFIG_A", "A=y", "# CONFIG_A is unset", "CONFIG_=y"])
def test_a_line_that_is_no_option_is_an_error_that_names_the_line(line: str) -> None:
    with pytest.raises(VmError, match="line 2"):
        kernel.parse_fragment(f"CONFIG_OK=y\n{line}\n")


def test_two_values_for_one_option_are_an_error() -> None:
    with pytest.raises(VmError, match="SWAP is y above and n here"):
        kernel.parse_fragment("CONFIG_SWAP=y\n# CONFIG_SWAP is not set\n")


def test_the_kernel_key_depends_on_the_options_and_not_on_their_order_or_comments() -> None:
    options = kernel.parse_fragment(FRAGMENT.read_text())
    shuffled = dict(sorted(options.items(), key=lambda item: digest(item[0])))
    assert list(shuffled) != list(options)
    assert kernel.options_key(shuffled) == kernel.options_key(options)
    assert kernel.options_key({**options, "SWAP": "n"}) != kernel.options_key(options)


def test_the_guest_kernel_has_what_no_distribution_kernel_has() -> None:
    options = kernel.parse_fragment(FRAGMENT.read_text())
    wanted = ("IDLE_PAGE_TRACKING", "MEM_SOFT_DIRTY", "DAMON_SYSFS", "PROC_EVENTS", "LRU_GEN", "PSI", "IKHEADERS")
    assert {name: options.get(name) for name in wanted} == dict.fromkeys(wanted, "y")


def test_a_ready_kernel_counts_only_with_exactly_our_options(tmp_path: Path) -> None:
    options = kernel.parse_fragment(FRAGMENT.read_text())
    lines = [f"CONFIG_{name}={value}" for name, value in reversed(options.items())]
    (tmp_path / "kernel.config").write_text("\n".join(lines))
    assert kernel.seed_kernel(tmp_path, options) is None  # no image
    image = tmp_path / f"vmlinuz-{kernel.SERIES}.1-x"
    image.touch()
    assert kernel.seed_kernel(tmp_path, options) == image
    (tmp_path / "kernel.config").write_text("\n".join(lines[1:]))
    assert kernel.seed_kernel(tmp_path, options) is None
    assert kernel.seed_kernel(tmp_path / "absent", options) is None


def test_an_option_that_kconfig_dropped_stops_the_build() -> None:
    kernel.check_options({"A": "y", "B": "n", "FORCED": "n"}, {"A": "y", "FORCED": "y"})
    with pytest.raises(VmError, match="C: wanted y, got n"):
        kernel.check_options({"A": "y", "C": "y"}, {"A": "y"})


# -- cache ------------------------------------------------------------------------------------------


def test_a_digest_tells_where_one_part_ends_and_the_next_begins() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", "c") == digest(b"ab", b"c")


def test_a_digest_of_files_sees_names_contents_and_execute_bits(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    seen = {digest_files(tmp_path)}
    (tmp_path / "f").chmod(0o755)
    seen.add(digest_files(tmp_path))
    (tmp_path / "f").write_text("y")
    seen.add(digest_files(tmp_path))
    (tmp_path / "f").rename(tmp_path / "g")
    seen.add(digest_files(tmp_path))
    assert len(seen) == 4


def test_an_entry_is_built_once_however_many_ask_at_the_same_time(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    built: list[Path] = []
    inside = threading.Event()

    def build(into: Path) -> None:
        inside.set()
        (into / "file").write_text("done")
        built.append(into)

    threads = [threading.Thread(target=cache.entry, args=("kind", "key", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert inside.is_set()
    assert len(built) == 1
    assert (tmp_path / "cache/kind-key/file").read_text() == "done"


def test_a_build_that_fails_leaves_no_entry_and_the_next_one_starts_empty(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(into: Path) -> None:
        (into / "half").touch()
        raise VmError("no")

    with pytest.raises(VmError, match="no"):
        cache.entry("kind", "key", fail)
    assert not list(tmp_path.glob("*kind-key*/"))
    found = cache.entry("kind", "key", lambda into: (into / "whole").touch())
    assert [path.name for path in found.iterdir()] == ["whole"]


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path: Path) -> None:
    stale = tmp_path / "tmp-kind-key.12345"
    stale.mkdir()
    (stale / "half").touch()
    Cache(tmp_path).entry("kind", "key", lambda into: None)
    assert not stale.exists()


def test_pruning_keeps_the_entries_used_last_and_those_just_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for number in range(6):
        path = cache.entry("layer", str(number), lambda into: None)
        os.utime(path, (1000 + number, 1000 + number))
    fresh = cache.entry("layer", "0", lambda into: None)  # use counts, not age
    cache.prune("layer", keep=3)
    assert sorted(path.name for path in tmp_path.glob("layer-*")) == ["layer-0", "layer-4", "layer-5"]
    cache.prune("layer", keep=0)
    assert list(tmp_path.glob("layer-*")) == [fresh]  # used within the last hour: a VM may be starting with it


# -- files of the guest ------------------------------------------------------------------------------


def test_every_runtime_dependency_of_our_packages_is_in_the_guest() -> None:
    """The wheels are installed without dependencies: Debian's packages are all there is."""
    ours = {"nri-core", "memtier-engine", "memtier-cli"}
    for project in sorted((ROOT / "packages").glob("*/pyproject.toml")):
        for requirement in tomllib.loads(project.read_text())["project"]["dependencies"]:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert match is not None
            name = re.sub(r"[-_.]+", "-", match[0]).lower()
            assert name in ours or rootfs.DEPENDENCIES.get(name) in rootfs.PACKAGES, f"{project}: {requirement}"


def test_a_wheel_becomes_modules_and_programs_of_the_guest(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/__init__.py", "")
        archive.writestr("thing-1.dist-info/entry_points.txt", "[console_scripts]\nDo-It = thing.main:run\n")
    layer.install_wheel(wheel, tmp_path / "root", "3.13")
    assert (tmp_path / "root/usr/local/lib/python3.13/dist-packages/thing/__init__.py").exists()
    script = tmp_path / "root/usr/local/bin/Do-It"
    assert script.stat().st_mode & 0o111
    assert "from thing.main import run" in script.read_text()


def test_the_layer_changes_with_the_sources_and_not_with_byte_code(tmp_path: Path) -> None:
    for package in layer.PACKAGES:
        (tmp_path / "packages" / package / "src/m/__pycache__").mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "src/m/a.py", "src/m/__pycache__/a.pyc"):
            (tmp_path / "packages" / package / name).write_text(name)
    names = set(layer.package_files(tmp_path))
    assert "packages/cli/src/m/a.py" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_swap_area_is_one_for_other_tools_too(tmp_path: Path) -> None:
    blkid = shutil.which("blkid", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if blkid is None:
        pytest.skip("needs blkid: apt-get install util-linux")
    disks.make_swap(tmp_path / "swap", 64)
    told = subprocess.run([blkid, "-p", "-o", "export", tmp_path / "swap"], capture_output=True, text=True, check=True)
    assert "TYPE=swap" in told.stdout
    assert (tmp_path / "swap").stat().st_size == 64 << 20
    assert (tmp_path / "swap").stat().st_blocks * 512 < 1 << 20  # sparse


DEPENDENCIES = """\
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/drivers/block/virtio-blk.ko.xz:
"""


def test_modules_are_loaded_after_what_they_need_and_once() -> None:
    """modules.dep names the nearest first; those that are built in have no file."""
    order = distribution.load_order(DEPENDENCIES, ["kernel/fs/ext4/ext4.ko"], ["virtio_blk", "9p", "9pnet", "ext4"])
    assert [distribution.module_name(path) for path in order] == ["virtio_blk", "netfs", "9pnet", "9p"]


def test_a_module_that_the_kernel_does_not_have_is_named() -> None:
    with pytest.raises(VmError, match="no module overlay"):
        distribution.load_order(DEPENDENCIES, [], ["overlay"])


def test_the_initramfs_is_a_cpio_archive_for_other_tools_too(tmp_path: Path) -> None:
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("needs cpio: apt-get install cpio")
    entries = [cpio.folder("bin"), cpio.program("bin/odd", b"12345"), cpio.program("init", b""), cpio.folder("x" * 33)]
    done = subprocess.run(
        [program, "-i", "--quiet"], input=cpio.pack(entries), cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stderr == b""
    assert (tmp_path / "bin/odd").read_bytes() == b"12345"
    assert stat.S_IMODE((tmp_path / "bin/odd").stat().st_mode) == 0o755
    assert (tmp_path / "init").exists()
    assert (tmp_path / ("x" * 33)).is_dir()


def test_a_disk_image_holds_what_the_folder_holds(tmp_path: Path) -> None:
    """Checked by e2fsck and read back by debugfs, both of the package that makes it."""
    sbin = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    e2fsck, debugfs = shutil.which("e2fsck", path=sbin), shutil.which("debugfs", path=sbin)
    if e2fsck is None or debugfs is None:
        pytest.skip("needs e2fsck and debugfs: apt-get install e2fsprogs")
    (tmp_path / "root/deep").mkdir(parents=True)
    (tmp_path / "root/deep/file").write_text("contents\n")
    (tmp_path / "root/large").write_bytes(b"x" * (20 << 20))
    for number in range(300):
        (tmp_path / f"root/small{number}").touch()
    disks.pack_ext4(tmp_path / "root", tmp_path / "image", tmp_path / "log")
    subprocess.run([e2fsck, "-f", "-n", tmp_path / "image"], check=True, capture_output=True)
    read = subprocess.run([debugfs, "-R", "cat deep/file", tmp_path / "image"], check=True, capture_output=True)
    assert read.stdout == b"contents\n"
    read = subprocess.run([debugfs, "-R", "cat large", tmp_path / "image"], check=True, capture_output=True)
    assert read.stdout == b"x" * (20 << 20)


def test_an_image_is_a_valid_oci_layout_and_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "root/bin").mkdir(parents=True)
    (tmp_path / "root/bin/sh").write_text("#!")
    (tmp_path / "root/bin/ls").symlink_to("sh")
    images.write_image(tmp_path / "a.tar", "registry.local/x:1", tmp_path / "root", ["/bin/sh"])
    os.utime(tmp_path / "root/bin/sh", (1, 1))
    images.write_image(tmp_path / "b.tar", "registry.local/x:1", tmp_path / "root", ["/bin/sh"])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    with tarfile.open(tmp_path / "a.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    for name, data in files.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(data).hexdigest() == name.removeprefix("blobs/sha256/")
    entry = json.loads(files["index.json"])["manifests"][0]
    assert entry["annotations"]["io.containerd.image.name"] == "registry.local/x:1"
    manifest = json.loads(files[f"blobs/sha256/{entry['digest'].removeprefix('sha256:')}"])
    for part in (manifest["config"], *manifest["layers"]):
        assert len(files[f"blobs/sha256/{part['digest'].removeprefix('sha256:')}"]) == part["size"]


# -- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smp", [1, 2, 3, 8])
def test_the_default_nodes_place_every_cpu_and_have_two_nodes_without(smp: int) -> None:
    nodes = parse_nodes(default_nodes(smp), smp)
    assert len(nodes) == 4
    assert [node.cpus for node in nodes[2:]] == [None, None]


@pytest.mark.parametrize(
    ("spec", "smp", "message"),
    [
        ("1024", 1, "not MIB:CPUS"),
        ("0:0", 1, "not MIB:CPUS"),
        ("512:0,512:1", 2, "not MIB:CPUS"),
        ("512:0 512:", 2, "place the CPUs"),
        ("512:0 512:0", 1, "place the CPUs"),
        ("", 1, "place the CPUs"),
    ],
)
def test_a_wrong_node_specification_is_refused_by_name(spec: str, smp: int, message: str) -> None:
    with pytest.raises(VmError, match=message):
        parse_nodes(spec, smp)


def test_nodes_without_cpus_are_further_away_than_nodes_with() -> None:
    words = numa_arguments([Node(512, "0"), Node(512, "1"), Node(512)])
    distances = [word for word in words if word.startswith("dist")]
    assert distances == ["dist,src=0,dst=1,val=20", "dist,src=0,dst=2,val=40", "dist,src=1,dst=2,val=40"]


def test_a_comma_in_a_disk_path_does_not_end_the_option(tmp_path: Path) -> None:
    machine = Machine(
        qemu="q",
        accelerator="tcg",
        kernel=tmp_path,
        initramfs=tmp_path,
        console_log=tmp_path,
        smp=1,
        nodes=(Node(512, "0"),),
        control_fd=3,
        output_fd=4,
        disks={"swap": (Path("/a,b"), Writes.KEPT)},
    )
    assert any(word.startswith("file=/a,,b,format=raw") for word in machine.command())


def test_the_guest_can_write_to_out_and_not_to_the_checkout_nor_to_its_own_system(tmp_path: Path) -> None:
    machine = Machine(
        qemu="q",
        accelerator="tcg",
        kernel=tmp_path,
        initramfs=tmp_path,
        console_log=tmp_path,
        smp=1,
        nodes=(Node(512, "0"),),
        control_fd=3,
        output_fd=4,
        shares={"host": (Path("/checkout"), False), "out": (Path("/results"), True)},
        disks={"root": (Path("/root.img"), Writes.REFUSED), "scratch": (Path("/s.img"), Writes.DROPPED)},
    )
    options = {word.split(",")[0] + word.split(",")[2]: word for word in machine.command() if "path=" in word}
    assert options["localpath=/checkout"].endswith(",readonly=on")
    assert "readonly" not in options["localpath=/results"]
    drives = [word for word in machine.command() if word.startswith("file=/")]
    assert [drive.rpartition(",")[2] for drive in drives] == ["readonly=on", "snapshot=on"]


def test_the_accelerator_can_be_chosen_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert accel.choose(cache, "q", tmp_path, tmp_path, {"MEMTIER_VM_ACCEL": "tcg"}) == "tcg"
    with pytest.raises(VmError, match="use auto, kvm or tcg"):
        accel.choose(cache, "q", tmp_path, tmp_path, {"MEMTIER_VM_ACCEL": "xen"})


def test_kvm_that_hangs_or_dies_does_not_count_as_kvm(tmp_path: Path) -> None:
    """Only a guest that says so has booted; one that says nothing is killed when its time is over."""
    qemu = tmp_path / "qemu"
    for text in ("sleep 100000", "exit 1", "exit 0"):
        qemu.write_text(f"#!/bin/sh\nexec {text}\n" if "sleep" in text else f"#!/bin/sh\n{text}\n")
        qemu.chmod(0o755)
        assert accel.probe_kvm(str(qemu), tmp_path, tmp_path, timeout_s=0.3) is False


# -- a run, with a script in QEMU's place ---------------------------------------------------------------

PATIENCE_S = (0.5, 5.0, 60.0)
"""Time limits to try in turn: on a busy machine a script may say nothing for the first."""


def pids_of(vm: Vm) -> list[int]:
    return [] if vm._qemu is None else [vm._qemu.pid]


@pytest.mark.usefixtures("temporary")
def test_output_comes_byte_by_byte_as_written_and_with_the_status(parts: Parts) -> None:
    with Vm(parts) as vm:
        result = vm.run(r"printf '\r\n\0\4\377'; exit 7", timeout_s=WAIT_S)
        assert (result.status, result.output) == (7, b"\r\n\0\4\xff")
        streamed: list[bytes] = []
        result = vm.run(["seq", "100000"], timeout_s=WAIT_S, sink=streamed.append)
        assert result.status == 0
        assert b"".join(streamed) == result.output == "".join(f"{n}\n" for n in range(1, 100001)).encode()


def test_after_a_run_no_process_and_no_file_is_left(parts: Parts, temporary: Path) -> None:
    with Vm(parts) as vm:
        pids = pids_of(vm)
        assert len(alive(pids)) == 1
        assert len(list(temporary.iterdir())) == 1
    assert alive(pids) == []
    assert list(temporary.iterdir()) == []


def test_a_command_that_hangs_is_killed_with_its_vm_when_the_time_is_over(parts: Parts, temporary: Path) -> None:
    for timeout_s in PATIENCE_S:
        with Vm(parts) as vm:
            pids = pids_of(vm)
            with pytest.raises(VmTimeout, match="time is over") as caught:
                vm.run("echo so far; exit 98", timeout_s=timeout_s)
            assert alive(pids) == []
        assert list(temporary.iterdir()) == []
        if caught.value.output:
            break
    assert caught.value.output == b"so far\n"


def test_a_guest_that_never_gets_ready_is_killed(parts: Parts, temporary: Path) -> None:
    vm = Vm(parts, Options(append="append=never-ready"), boot_timeout_s=0.5)
    with pytest.raises(VmTimeout, match="boot"):
        vm.__enter__()
    assert alive(pids_of(vm)) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("temporary")
def test_a_guest_that_dies_is_an_error_with_its_last_words(parts: Parts) -> None:
    with Vm(parts) as vm, pytest.raises(VmError, match="the guest's last words"):
        vm.run("exit 99", timeout_s=WAIT_S)


RUNNER = """
import json, sys
from pathlib import Path
from vm.harness import machine
from vm.harness.build import Parts
from vm.harness.machine import Vm, exit_on_signals
machine.OFF_TIMEOUT_S = 0.2  # this guest never switches itself off
exit_on_signals()
given = json.loads(sys.argv[1])
paths = ("repo", "kernel", "initramfs", "rootfs", "layer", "scratch")
with Vm(Parts(**{name: Path(value) if name in paths else value for name, value in given.items()})) as vm:
    print(json.dumps([vm._qemu.pid]), flush=True)
    vm.run("exit 98", timeout_s=600)
"""


@pytest.fixture
def runner(parts: Parts, temporary: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process in the middle of a run, and the processes it has started."""
    fields = {name: getattr(parts, name) for name in Parts.__slots__}
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, json.dumps(fields, default=str)],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids: list[int] = json.loads(process.stdout.readline())
    yield process, pids
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_run_leaves_nothing(
    runner: tuple[subprocess.Popen[str], list[int]], temporary: Path, number: signal.Signals
) -> None:
    process, pids = runner
    assert len(alive(pids)) == 1
    process.send_signal(number)
    status = process.wait(WAIT_S)
    assert status in (128 + number, -number)
    assert alive(pids) == []
    assert list(temporary.iterdir()) == []


def test_a_run_that_is_killed_takes_its_processes_along_and_the_next_run_removes_its_folder(
    runner: tuple[subprocess.Popen[str], list[int]], temporary: Path
) -> None:
    process, pids = runner
    assert sweep_run_folders(temporary) == []  # in use
    process.kill()
    process.wait()
    until(lambda: alive(pids) == [])
    left = list(temporary.iterdir())
    assert len(left) == 1
    assert sweep_run_folders(temporary) == left
    assert list(temporary.iterdir()) == []


# -- what the end-to-end tests use -------------------------------------------------------------------------


@pytest.mark.usefixtures("temporary")
def test_a_session_boots_once_for_many_commands_and_again_after_a_timeout(parts: Parts) -> None:
    with VmSession(parts) as session:
        assert session.run("echo one").output == "one\n"
        assert session.run("echo $NAME", env={"NAME": "a b"}).output == "a b\n"
        assert session.boots == 1
        boots = session.boots
        for timeout_s in PATIENCE_S:
            late = session.run("echo late; exit 98", timeout_s=timeout_s)
            assert late.timed_out
            assert session.run("exit 3").status == 3
            assert session.boots == (boots := boots + 1)
            if "late" in late.output:
                break
        assert "late" in late.output
        session.run("true", smp=1)
        assert session.boots == boots + 1
        session.run("true", smp=1, fresh=True)
        assert session.boots == boots + 2


def test_records_are_the_json_lines_of_the_output() -> None:
    result = VmResult(0, 'warming up\n{"kind": "a", "n": 1}\n{broken\n{"kind": "b"}\n', 1.0)
    assert result.records() == [{"kind": "a", "n": 1}, {"kind": "b"}]
    assert result.record("a")["n"] == 1
    with pytest.raises(AssertionError, match="0 records"):
        result.record("c")


def test_a_failed_command_fails_the_test_with_its_output() -> None:
    with pytest.raises(AssertionError, match="status 4:\nwhat happened"):
        VmResult(4, "what happened", 1.0).check()
