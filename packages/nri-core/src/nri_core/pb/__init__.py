"""Generated protobuf modules: nri_pb2, ttrpc_pb2."""
