module memtier.example/interop/ttrpc

go 1.21
