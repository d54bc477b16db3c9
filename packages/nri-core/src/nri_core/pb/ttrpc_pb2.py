"""Generated from proto/ttrpc/ttrpc.proto by `make proto`. Do not edit."""

from google.protobuf import any_pb2
from nri_core.pb import pool

DESCRIPTOR = pool.add(
    b'\n\x1dnri_core/pb/ttrpc/ttrpc.proto\x12\x05ttrpc\x1a\x19google/protobuf/any.prot'
    b'o"\xa5\x01\n\x07Request\x12\x18\n\x07service\x18\x01 \x01(\tR\x07service\x12\x16\n\x06method\x18\x02 \x01(\tR\x06method\x12'
    b'\x18\n\x07payload\x18\x03 \x01(\x0cR\x07payload\x12!\n\x0ctimeout_nano\x18\x04 \x01(\x03R\x0btimeoutNano\x12+\n\x08'
    b'metadata\x18\x05 \x03(\x0b2\x0f.ttrpc.KeyValueR\x08metadata"K\n\x08Response\x12%\n\x06status\x18'
    b'\x01 \x01(\x0b2\r.ttrpc.StatusR\x06status\x12\x18\n\x07payload\x18\x02 \x01(\x0cR\x07payload"f\n\x06Status'
    b'\x12\x12\n\x04code\x18\x01 \x01(\x05R\x04code\x12\x18\n\x07message\x18\x02 \x01(\tR\x07message\x12.\n\x07details\x18\x03 \x03(\x0b2'
    b'\x14.google.protobuf.AnyR\x07details" \n\nStringList\x12\x12\n\x04list\x18\x01 \x03(\tR\x04list'
    b'"2\n\x08KeyValue\x12\x10\n\x03key\x18\x01 \x01(\tR\x03key\x12\x14\n\x05value\x18\x02 \x01(\tR\x05valueb\x06proto3',
    [any_pb2.DESCRIPTOR],
    'nri_core.pb.ttrpc_pb2',
    globals(),
)
