/* The requests of a disk. */
#ifndef VMFS_CHIPS_DISK_H
#define VMFS_CHIPS_DISK_H

struct disk;

/* The driver has made requests available. In the CPU's thread, with no lock. */
void disk_notified(struct disk *d, unsigned queue);

#endif
