"""Generated from proto/nri/heads.proto by `make proto`. Do not edit."""
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PodHead(_message.Message):
    __slots__ = ("id", "name", "namespace")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    namespace: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class ContainerHead(_message.Message):
    __slots__ = ("id", "pod_sandbox_id", "name", "state", "linux", "pid", "started_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    POD_SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LINUX_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    pod_sandbox_id: str
    name: str
    state: int
    linux: LinuxHead
    pid: int
    started_at: int
    def __init__(self, id: _Optional[str] = ..., pod_sandbox_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[int] = ..., linux: _Optional[_Union[LinuxHead, _Mapping[str, object]]] = ..., pid: _Optional[int] = ..., started_at: _Optional[int] = ...) -> None: ...

class LinuxHead(_message.Message):
    __slots__ = ("cgroups_path",)
    CGROUPS_PATH_FIELD_NUMBER: _ClassVar[int]
    cgroups_path: str
    def __init__(self, cgroups_path: _Optional[str] = ...) -> None: ...
