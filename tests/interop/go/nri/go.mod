module memtier.example/interop/nri

go 1.21
