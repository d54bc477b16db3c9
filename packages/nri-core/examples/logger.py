#!/usr/bin/env python3
"""A plugin that logs when containers come and go."""

import logging
from collections.abc import Sequence

from nri_core import Container, Plugin, Pod, run

log = logging.getLogger("logger")


class Logger(Plugin):
    name, index = "logger", "10"

    def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        log.info("%d pods, %d containers are there", len(pods), len(containers))

    def start_container(self, pod: Pod, container: Container) -> None:
        log.info("start %s/%s/%s", pod.namespace, pod.name, container.name)

    def stop_container(self, pod: Pod, container: Container) -> None:
        log.info("stop %s/%s/%s", pod.namespace, pod.name, container.name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(Logger())
