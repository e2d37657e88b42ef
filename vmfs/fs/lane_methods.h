/* What Python calls of the lane and of the streams: functions of vmfs.fs._fuse. */
#ifndef VMFS_FS_LANE_METHODS_H
#define VMFS_FS_LANE_METHODS_H

extern PyMethodDef lane_methods[];

#endif
