/* Names of host code for perf. */
#ifndef VMFS_JITDUMP_H
#define VMFS_JITDUMP_H

#include "state.h"

bool jitdump_is_open(void);
/* There are `size` bytes of host code at `address`, of the guest's code at `ip`; `code` is where to read them. */
void jitdump_load(const u8 *code, u64 address, size_t size, u64 ip);

#endif
