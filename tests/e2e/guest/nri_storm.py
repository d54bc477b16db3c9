"""A storm over a node with nri-memtierd: restarts, upgrades, configurations, full volumes, stuck processes, at random.

python3 nri_storm.py MINUTES [SEED]

In rounds: disturbances for a while, then quiet. When all has settled, everything is compared with what it should be.
Prints a JSON object per round, and a verdict; exit status 0 if there is nothing to complain about, 1 otherwise.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from random import Random, SystemRandom

from nri_node import CriError, remove_pods
from saying import say
from storm_churn import Churn
from storm_node import BASE, SHARED, Configs, Keeper, Runtime, Volume
from storm_verdict import Look, defects, look, look_around, open_files, usage
from storm_weather import Weather

ROUND_S = (45.0, 110.0)
PAUSE_S = (0.3, 5.0)
SETTLE_S = 180.0
"""Waits after failures double: who failed for a minute is tried again within two."""
QUIET_EVERY_S = 2.0
LAZY_FDS = 4
"""Opened when the first engine needs them, and kept: both pressure files, the list of observers."""


class Storm:
    """The node and all that happens to it."""

    def __init__(self, seed: int, runtime: Runtime, volume: Volume) -> None:
        self.rng = Random(seed)
        self.runtime = runtime
        self.configs = Configs(BASE / "config.yaml")
        self.configs.put("all")
        self.keeper = Keeper(self.configs.path)
        self.keeper.add()
        self.churn = Churn(runtime, self.configs, Random(seed + 1))
        self.weather = Weather(runtime, self.keeper, self.configs, volume, self.rng)
        self.named: Counter[str] = Counter()
        self._runtime_log_bytes = 0

    def round(self, number: int, until_s: float) -> list[str]:
        """Disturbances, quiet, judgement; returns the complaints."""
        end_s = min(until_s, time.monotonic() + self.rng.uniform(*ROUND_S))
        self.churn.resume()
        order = []
        while time.monotonic() < end_s:
            order.append(self.weather.blow())
            time.sleep(self.rng.uniform(*PAUSE_S))
        self.churn.pause()
        self.weather.calm()
        settled_s, found = self.settle()
        complaints = found.complaints + self.read_logs()
        instance = self.keeper.newest()
        if not found.complaints:
            complaints += look_around(instance)
        complaints += self.take_complaints() + self.read_runtime_log()
        self.named.update(found.named.values())
        say(
            kind="round",
            number=number,
            weather=order,
            configuration=self.configs.variant,
            running=found.running,
            managed=found.managed,
            named=found.named,
            settled_s=settled_s,
            complaints=complaints,
            **(usage(instance) if instance.alive() else {}),
        )
        if complaints:
            lines = instance.log_path.read_text(errors="replace").splitlines(keepends=True)
            text = "".join(line for line in lines if " TRACE: " not in line)
            print(f"log of {instance.index}:\n{text[-12_000:]}", flush=True)
            print(f"log of the runtime:\n{self.runtime.log.read_text(errors='replace')[-4000:]}", flush=True)
        self.weather.thaw()
        return complaints

    def settle(self) -> tuple[float, Look]:
        """Look until there is nothing to complain about and nobody is without what is his, or for a bounded time."""
        began_s = time.monotonic()
        while True:
            try:
                found = look(self.runtime, self.keeper.newest(), self.configs)
            except (OSError, CriError) as error:
                found = Look(complaints=[f"cannot look: {error}"])
            took_s = round(time.monotonic() - began_s, 1)
            if (not found.complaints and not found.named) or took_s > SETTLE_S:
                return took_s, found
            time.sleep(QUIET_EVERY_S)

    def finish(self) -> list[str]:
        """Without containers: nothing is left, and what the plugin takes is what a fresh one takes."""
        self.churn.close()
        remove_pods(self.runtime)
        _, found = self.settle()
        old, files = usage(self.keeper.newest()), open_files(self.keeper.newest())
        self.keeper.strike(self.keeper.newest(), signal.SIGTERM)
        _, again = self.settle()
        fresh = usage(self.keeper.newest())
        complaints = found.complaints + again.complaints
        if old["fds"] > fresh["fds"] + LAZY_FDS or old["threads"] > fresh["threads"] + 2:
            complaints.append(f"without containers {old}, a fresh one {fresh}; open: {files}")
        self.keeper.end(self.keeper.newest(), signal.SIGTERM)
        self.keeper.add()  # nothing keeps it out; of those before it, some were killed and could not clean up
        complaints += self.settle()[1].complaints + self.read_logs()
        self.keeper.end(self.keeper.newest(), signal.SIGTERM)
        complaints += [f"left behind: {path}" for path in SHARED.rglob("*")]
        complaints += self.read_logs() + self.take_complaints()
        say(kind="finish", old=old, fresh=fresh, complaints=complaints)
        return complaints

    def read_logs(self) -> list[str]:
        """What plugins said that no storm excuses."""
        return [line for instance in self.keeper.instances for line in defects(self.keeper.new_log(instance))]

    def read_runtime_log(self) -> list[str]:
        """What the runtime says of plugins that did not answer in time."""
        text = self.runtime.log.read_text(errors="replace")
        fresh, self._runtime_log_bytes = text[self._runtime_log_bytes :], len(text)
        return [f"runtime: {line[:300]}" for line in fresh.splitlines() if "plugin" in line and "deadline" in line]

    def take_complaints(self) -> list[str]:
        """Of the threads."""
        found = self.keeper.complaints + self.churn.complaints
        self.keeper.complaints, self.churn.complaints = [], []
        return found


@contextlib.contextmanager
def node() -> Iterator[tuple[Runtime, Volume]]:
    """containerd with the guest's images, and the volume."""
    runtime, volume = Runtime(), Volume()
    runtime.start()
    try:
        runtime.import_images()
        yield runtime, volume
    finally:
        remove_pods(runtime)
        runtime.stop()
        volume.close()


def main(minutes: float, seed: int) -> int:
    """The storm."""
    say(kind="storm", seed=seed, minutes=minutes)
    complaints: list[str] = []
    with node() as (runtime, volume):
        storm = Storm(seed, runtime, volume)
        try:
            until_s = time.monotonic() + 60 * minutes
            number = 0
            while time.monotonic() < until_s:
                number += 1
                complaints += [f"round {number}: {text}" for text in storm.round(number, until_s)]
            complaints += storm.finish()
        finally:
            storm.keeper.close()
        say(
            kind="verdict",
            seed=seed,
            rounds=number,
            weather=storm.weather.done,
            churn=storm.churn.done,
            ends=storm.keeper.ends,
            named=storm.named,
            complaints=complaints,
        )
    return 1 if complaints else 0


if __name__ == "__main__":
    chosen = int(sys.argv[2]) if sys.argv[2:] and sys.argv[2] else SystemRandom().randrange(1_000_000)
    sys.exit(main(float(sys.argv[1]), chosen))
