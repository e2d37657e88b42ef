/* verify DEVICE SECONDS: four processes write and read a fourth of a disk each, past its cache, in pieces of 4 KiB to 512 KiB, and compare
 * each block that is read with what was written last. The status is 0 where all are right. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum { BLOCK = 4096, MOST = 128, PROCESSES = 4, SYNC = 64 };

static uint64_t dice;
static uint64_t rolled(uint64_t below)
{
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    return dice % below;
}

/* Of a block that was written so often; 0: nobody has, and it may be anything. */
static void fill(uint64_t *data, uint64_t block, uint64_t times)
{
    for (unsigned i = 0; i < BLOCK / 8; i++)
        data[i] = (block << 32 | i) * 0x9e3779b97f4a7c15u + times;
}

static int check(uint64_t *data, uint64_t first, uint64_t count, const uint32_t *times, uint64_t base)
{
    uint64_t wanted[BLOCK / 8];
    for (uint64_t i = 0; i < count; i++) {
        if (!times[first + i])
            continue;
        fill(wanted, base + first + i, times[first + i]);
        if (memcmp(wanted, data + i * BLOCK / 8, BLOCK)) {
            printf("block %llu is wrong\n", (unsigned long long)(base + first + i));
            return 1;
        }
    }
    return 0;
}

static int work(const char *path, unsigned number, time_t seconds)
{
    uint64_t size, *data;
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || posix_memalign((void **)&data, BLOCK, MOST * BLOCK))
        return perror(path), 1;
    uint64_t blocks = size / BLOCK / PROCESSES, base = number * blocks, moved = 0;
    uint32_t *times = calloc(blocks, sizeof *times);
    dice = 88172645463325252u + number;
    for (time_t end = time(NULL) + seconds; times && time(NULL) < end;) {
        uint64_t count = 1 + rolled(rolled(2) ? MOST : 4), first = rolled(blocks - count);
        size_t length = count * BLOCK;
        off_t at = (off_t)((base + first) * BLOCK);
        if (rolled(2)) {
            for (uint64_t i = 0; i < count; i++)
                fill(data + i * BLOCK / 8, base + first + i, ++times[first + i]);
            if (pwrite(fd, data, length, at) != (ssize_t)length || (!rolled(SYNC) && fdatasync(fd)))
                return perror("write"), 1;
        } else if (pread(fd, data, length, at) != (ssize_t)length) {
            return perror("read"), 1;
        } else if (check(data, first, count, times, base)) {
            return 1;
        }
        moved += length;
    }
    for (uint64_t i = 0; i < blocks; i++)
        if (times[i] && (pread(fd, data, BLOCK, (off_t)((base + i) * BLOCK)) != BLOCK || check(data, i, 1, times, base)))
            return 1;
    printf("process %u: %llu MiB\n", number, (unsigned long long)(moved >> 20));
    fflush(stdout);
    return !times || !moved;
}

int main(int argc, char **argv)
{
    int failed = argc != 3, status;
    for (unsigned i = 0; i < PROCESSES && argc == 3; i++)
        if (!fork())
            _exit(work(argv[1], i, atoi(argv[2])));
    while (wait(&status) > 0)
        failed |= status != 0;
    return failed;
}
