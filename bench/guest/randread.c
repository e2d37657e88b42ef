/* randread FILE COUNT: reads of 4 KiB at random places, one after the other, past the page cache. Prints the seconds. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    static char block[4096] __attribute__((aligned(4096)));
    uint64_t state = 88172645463325252u; /* xorshift64 */
    int fd = argc == 3 ? open(argv[1], O_RDONLY | O_DIRECT) : -1;
    off_t blocks = fd < 0 ? 0 : lseek(fd, 0, SEEK_END) / 4096;
    if (blocks <= 0)
        return perror("randread"), 1;
    double began = now();
    for (long n = atol(argv[2]); n > 0; n--) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        if (pread(fd, block, sizeof block, (off_t)(state % (uint64_t)blocks) * 4096) != sizeof block)
            return perror("pread"), 1;
    }
    printf("%f\n", now() - began);
    return 0;
}
