#!/usr/bin/env python3
"""A plugin that gives each new container an annotation, and swap if its pod asks for it."""

from nri_core import Adjustment, Container, Plugin, Pod, run


class Annotator(Plugin):
    name, index = "annotator", "20"

    async def create_container(self, pod: Pod, container: Container) -> Adjustment:
        adjustment = Adjustment().annotation("example.com/seen-by", "annotator")
        if pod.annotations.get("example.com/swap") == "yes":
            adjustment = adjustment.unified("memory.swap.max", "max")
        return adjustment


if __name__ == "__main__":
    run(Annotator())
