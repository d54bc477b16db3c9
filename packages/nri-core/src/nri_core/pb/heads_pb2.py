"""Generated from proto/nri/heads.proto by `make proto`. Do not edit."""

from nri_core.pb import pool

DESCRIPTOR = pool.add(
    b'\n\x1bnri_core/pb/nri/heads.proto\x12\x1anri.pkg.api.v1alpha1.heads"K\n\x07Pod'
    b'Head\x12\x0e\n\x02id\x18\x01 \x01(\tR\x02id\x12\x12\n\x04name\x18\x02 \x01(\tR\x04name\x12\x1c\n\tnamespace\x18\x04 \x01(\tR\tnam'
    b'espace"\xdd\x01\n\rContainerHead\x12\x0e\n\x02id\x18\x01 \x01(\tR\x02id\x12$\n\x0epod_sandbox_id\x18\x02 \x01(\t'
    b'R\x0cpodSandboxId\x12\x12\n\x04name\x18\x03 \x01(\tR\x04name\x12\x14\n\x05state\x18\x04 \x01(\x05R\x05state\x12;\n\x05linu'
    b'x\x18\x0b \x01(\x0b2%.nri.pkg.api.v1alpha1.heads.LinuxHeadR\x05linux\x12\x10\n\x03pid\x18\x0c \x01'
    b'(\rR\x03pid\x12\x1d\n\nstarted_at\x18\x0f \x01(\x03R\tstartedAt".\n\tLinuxHead\x12!\n\x0ccgroups_p'
    b'ath\x18\x05 \x01(\tR\x0bcgroupsPathb\x06proto3',
    [],
    'nri_core.pb.heads_pb2',
    globals(),
)
