/*
 * pairs: time two files doing the same operation, in turn, so that the machine's drift hits both alike.
 *
 *     pairs pread  SIZE  OPS ROUNDS A B     pread(2) of SIZE bytes at offset 0
 *     pairs mapped SIZE  OPS ROUNDS A B     read and write a byte of each page of SIZE bytes of a shared mapping
 *
 * Prints a line a round: nanoseconds an operation for A, then for B.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct side {
    int fd;
    unsigned char *map;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static double time_pread(struct side *side, size_t size, long ops)
{
    static unsigned char buffer[1 << 20];
    double start = now();
    for (long i = 0; i < ops; i++)
        if (pread(side->fd, buffer, size, 0) != (ssize_t)size)
            err(1, "pread");
    return (now() - start) / ops;
}

static double time_mapped(struct side *side, size_t size, long ops)
{
    double start = now();
    for (long i = 0; i < ops; i++)
        for (size_t at = 0; at < size; at += 4096)
            (*(volatile unsigned char *)(side->map + at))++;
    return (now() - start) / ops;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        errx(2, "usage: pairs pread|mapped SIZE OPS ROUNDS A B");
    int mapped = !strcmp(argv[1], "mapped");
    size_t size = strtoul(argv[2], NULL, 0);
    long ops = atol(argv[3]);
    int rounds = atoi(argv[4]);
    struct side sides[2];

    if (!mapped && size > 1 << 20)
        errx(2, "SIZE is more than 1 MiB");
    for (int i = 0; i < 2; i++) {
        sides[i].fd = open(argv[5 + i], mapped ? O_RDWR : O_RDONLY);
        if (sides[i].fd < 0)
            err(1, "%s", argv[5 + i]);
        if (mapped) {
            sides[i].map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, sides[i].fd, 0);
            if (sides[i].map == MAP_FAILED)
                err(1, "mmap %s", argv[5 + i]);
        }
    }
    double (*run)(struct side *, size_t, long) = mapped ? time_mapped : time_pread;
    for (int i = 0; i < 2; i++)
        run(&sides[i], size, ops / 10 + 1); /* warm up */
    for (int round = 0; round < rounds; round++) {
        double a = run(&sides[0], size, ops);
        double b = run(&sides[1], size, ops);
        printf("%.1f %.1f\n", a, b);
    }
    return 0;
}
