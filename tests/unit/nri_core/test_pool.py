"""NRI's and ttrpc's messages live in a descriptor pool of our own: another package may bring the same ones."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

from nri_core.pb import nri_pb2, ttrpc_pb2

OTHER_PACKAGE = """
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool  # ttrpc imports Any

def other():
    # Its files have other names and other contents under the same message names, as a vendored copy has.
    for data in {files!r}:
        file = descriptor_pb2.FileDescriptorProto.FromString(data)
        file.name = "github.com/containerd/" + file.name
        file.message_type.add(name="Extra")
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

def ours():
    from nri_core.pb import nri_pb2, ttrpc_pb2
    assert nri_pb2.Container.FromString(nri_pb2.Container(id="c").SerializeToString()).id == "c"
    assert not hasattr(nri_pb2, "Extra")

for step in {order}:
    step()
"""


@pytest.mark.parametrize("order", ["(ours, other)", "(other, ours)"])
def test_two_packages_with_these_messages_live_in_one_process(order: str) -> None:
    files = [module.DESCRIPTOR.serialized_pb for module in (nri_pb2, ttrpc_pb2)]
    code = OTHER_PACKAGE.format(files=files, order=order)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_messages_can_be_copied_pickled_and_asked_for_their_module() -> None:
    """What `builder` did, and a class made from a descriptor alone does not."""
    message = nri_pb2.Container(id="c", labels={"a": "b"}, hooks=nri_pb2.Hooks(prestart=[nri_pb2.Hook(path="/x")]))
    assert pickle.loads(pickle.dumps(message)) == message == copy.deepcopy(message)
    assert nri_pb2.Container.__module__ == "nri_core.pb.nri_pb2"
    assert nri_pb2.ContainerState.Name(3) == "CONTAINER_RUNNING"
    assert nri_pb2.CONTAINER_RUNNING == 3
    assert nri_pb2.LogRequest.Level.Value("LEVEL_WARN") == nri_pb2.LogRequest.LEVEL_WARN == 3


def test_a_status_can_carry_details() -> None:
    """Any is of our pool too: it is copied there."""
    status = ttrpc_pb2.Status(code=5)
    status.details.add(type_url="example.com/x", value=b"y")
    found = ttrpc_pb2.Response.FromString(ttrpc_pb2.Response(status=status).SerializeToString())
    assert found.status.details[0].value == b"y"
