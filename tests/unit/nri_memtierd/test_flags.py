"""The command line of nri-memtierd: the reference's flags and who it says it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from memtier_cli.flags import UsageError, parse
from memtier_cli.nri_memtierd.program import FLAGS, identity, main


@pytest.fixture(autouse=True)
def _not_launched_by_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NRI_PLUGIN_IDX", "NRI_PLUGIN_NAME", "NRI_PLUGIN_SOCKET"):
        monkeypatch.delenv(name, raising=False)


def who(*words: str, program: str = "nri-memtierd") -> tuple[str, str]:
    return identity(parse(FLAGS, words), program)


def test_all_flags_of_the_reference_are_there_with_its_defaults() -> None:
    words = ["-config", "F", "-idx", "45", "-name", "N", "--cgroups-dir=C", "-run-dir", "R", "-v", "-vv=false"]
    parsed = parse(FLAGS, words)
    assert parsed.texts == {"config": "F", "idx": "45", "name": "N", "cgroups-dir": "C", "run-dir": "R"}
    assert parsed.booleans == {"v": True, "vv": False}
    defaults = {flag.name: flag.default for flag in FLAGS}
    assert defaults["run-dir"] == "/var/run/nri-memtierd"


def test_with_an_index_the_name_is_the_programs_own_or_the_one_given() -> None:
    assert who("-idx", "45") == ("45", "nri-memtierd")
    assert who("--idx=05", "-name", "tiering") == ("05", "tiering")


def test_without_an_index_the_programs_name_says_both_and_beats_the_one_given() -> None:
    assert who(program="45-nri-memtierd") == ("45", "nri-memtierd")
    assert who("-name", "other", program="10-foo-bar") == ("10", "foo-bar")


def test_a_pre_launched_plugin_is_who_the_runtime_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRI_PLUGIN_IDX", "90")
    monkeypatch.setenv("NRI_PLUGIN_NAME", "from-runtime")
    assert who() == ("90", "from-runtime")
    with pytest.raises(UsageError, match="NRI_PLUGIN_IDX"):
        who("-idx", "45")


@pytest.mark.parametrize("program", ["nri-memtierd", "4-x", "456-x", "ab-x", "45", "45-"])
def test_without_any_index_it_says_how_to_give_one(program: str) -> None:
    with pytest.raises(UsageError, match="-idx is missing"):
        who(program=program)


@pytest.mark.parametrize("index", ["4", "456", "ab", "-1", "\uff14\uff15"])
def test_an_index_is_two_digits(index: str) -> None:
    with pytest.raises(UsageError, match="two digits"):
        who(f"-idx={index}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-idx", "45", "-unknown"], "flag provided but not defined: -unknown"),
        (["-idx"], "flag needs an argument: -idx"),
        (["-idx", "45", "-on-unknown-class", "maybe"], "-on-unknown-class maybe: use fail or ignore"),
        (["-idx", "45", "--engine=thread"], "-engine thread: use in-process or process"),
        (["-idx", "45", "--log-format=xml"], "-log-format xml: use text or json"),
        (["-idx", "45", "-adopt", "-no-adopt"], "exclude each other"),
        (["-idx", "45", "-run-dir="], "-run-dir is empty"),
        (["-healthy", "-run-dir", ""], "-run-dir is empty"),
        (["-idx", "45", "-adopt", "false", "-config", "F"], "false: no such argument"),
    ],
)
def test_wrong_usage_is_exit_status_2_with_the_reason_first(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nri-memtierd", *words])
    assert main() == 2
    text = capsys.readouterr().err
    assert message in text.splitlines()[0]
    assert "Usage of nri-memtierd:" in text


def test_help_and_version_are_quick_and_need_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nri-memtierd", "-help"])
    assert main() == 0
    code = "import sys; from memtier_cli.nri_memtierd.program import main; status = main()\n"
    code += "assert 'numpy' not in sys.modules and 'asyncio' not in sys.modules; sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, "-version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "version information" in done.stdout
