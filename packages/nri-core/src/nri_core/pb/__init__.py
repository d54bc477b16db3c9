"""Generated protobuf modules: nri_pb2, heads_pb2, ttrpc_pb2. Their classes are in a pool of our own: see pool.py."""
