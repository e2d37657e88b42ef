/*
 * pairs: time two files doing the same operation, in turn, so that the machine's drift hits both alike.
 *
 *     pairs pread  SIZE  OPS ROUNDS A B     pread(2) of SIZE bytes at offset 0
 *     pairs mapped SIZE  OPS ROUNDS A B     read and write a byte of each page of SIZE bytes of a shared mapping
 *     pairs irq    SIZE  OPS ROUNDS A B     A is a machine's directory: write a packet to its irq, and then, untimed, read SIZE bytes
 *                                           of its vm_run.bin; pread(2) of SIZE bytes of B
 *     pairs both   SIZE  OPS ROUNDS A B     pread(2) of SIZE bytes: of A alone, then of A and B at once by two processes, all of whose
 *                                           operations count; A's caller on one core, B's on another
 *
 * Prints a line a round: nanoseconds an operation for A, then for B.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct side {
    int fd, irq;
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

static double time_irq(struct side *side, size_t size, long ops)
{
    static unsigned char buffer[1 << 20];
    const uint32_t packet = 0x20;
    double took = 0;
    for (long i = 0; i < ops; i++) {
        double start = now();
        if (write(side->irq, &packet, sizeof packet) != sizeof packet)
            err(1, "irq");
        took += now() - start;
        if (pread(side->fd, buffer, size, 0) != (ssize_t)size)
            err(1, "pread");
    }
    return took / ops;
}

/* On the core number `wanted` of those that this process had, or on the last of them. */
static void use_core(cpu_set_t *all, int wanted)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, all)) {
            CPU_ZERO(&one);
            CPU_SET(core, &one);
            if (!wanted--)
                break;
        }
    if (sched_setaffinity(0, sizeof one, &one))
        err(1, "sched_setaffinity");
}

static cpu_set_t cores;

static double time_both(struct side *sides, size_t size, long ops)
{
    double start = now();
    pid_t other = fork();
    if (other < 0)
        err(1, "fork");
    if (!other)
        use_core(&cores, 1);
    time_pread(&sides[!other], size, ops);
    if (!other)
        _exit(0);
    int status;
    if (waitpid(other, &status, 0) != other || status)
        errx(1, "the other process failed");
    return (now() - start) / (2 * ops);
}

int main(int argc, char **argv)
{
    if (argc != 7)
        errx(2, "usage: pairs pread|mapped|irq|both SIZE OPS ROUNDS A B");
    int mapped = !strcmp(argv[1], "mapped"), irq = !strcmp(argv[1], "irq"), both = !strcmp(argv[1], "both");
    size_t size = strtoul(argv[2], NULL, 0);
    long ops = atol(argv[3]);
    int rounds = atoi(argv[4]);
    struct side sides[2];

    if (!mapped && size > 1 << 20)
        errx(2, "SIZE is more than 1 MiB");
    for (int i = 0; i < 2; i++) {
        sides[i].fd = open(argv[5 + i], irq && !i ? O_DIRECTORY : mapped ? O_RDWR : O_RDONLY);
        if (sides[i].fd < 0)
            err(1, "%s", argv[5 + i]);
        if (irq && !i) {
            sides[i].irq = openat(sides[i].fd, "irq", O_WRONLY);
            sides[i].fd = openat(sides[i].fd, "vm_run.bin", O_RDONLY);
            if (sides[i].irq < 0 || sides[i].fd < 0)
                err(1, "%s", argv[5]);
        }
        if (mapped) {
            sides[i].map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, sides[i].fd, 0);
            if (sides[i].map == MAP_FAILED)
                err(1, "mmap %s", argv[5 + i]);
        }
    }
    double (*run[])(struct side *, size_t, long) = {mapped ? time_mapped : time_pread, mapped ? time_mapped : time_pread};
    if (irq)
        run[0] = time_irq;
    if (both) {
        if (sched_getaffinity(0, sizeof cores, &cores))
            err(1, "sched_getaffinity");
        use_core(&cores, 0);
    }
    for (int i = 0; i < 2; i++)
        run[i](&sides[i], size, ops / 10 + 1); /* warm up */
    for (int round = 0; round < rounds; round++) {
        double a = run[0](&sides[0], size, ops);
        double b = both ? time_both(sides, size, ops) : run[1](&sides[1], size, ops);
        printf("%.1f %.1f\n", a, b);
    }
    return 0;
}
