"""Generated protobuf modules: nri_pb2, heads_pb2, ttrpc_pb2, in a pool of their own: see pool.py."""
