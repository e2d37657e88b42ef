/* Threads that get in each other's way, as many as CPUs: locks, TLB shootdowns, futexes, code that is written. `threads NAME COUNT ROUNDS`
 * prints the result, which says what it should be; any other is a fault of the machine or of the kernel. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 64, PAGE = 4096 };
static int count;
static long rounds;
static pthread_barrier_t begin;
static _Atomic long wrong;

static void on_cpu(long number)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((int)(number % sysconf(_SC_NPROCESSORS_ONLN)), &set);
    sched_setaffinity(0, sizeof set, &set);
    pthread_barrier_wait(&begin);
}

static void together(void *(*function)(void *))
{
    pthread_t threads[MOST];
    pthread_barrier_init(&begin, NULL, (unsigned)count);
    for (long i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, function, (void *)i))
            exit(1);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
}

/* ---- Locks: atomic additions, compare and swap, a mutex, a lock of its own ---- */

static _Atomic long added, swapped;
static long under_mutex, under_lock;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_flag lock = ATOMIC_FLAG_INIT;

static void *locks(void *argument)
{
    on_cpu((long)argument);
    for (long i = 0; i < rounds; i++) {
        atomic_fetch_add(&added, 1);
        long old = atomic_load(&swapped);
        while (!atomic_compare_exchange_weak(&swapped, &old, old + 3))
            ;
        if (i % 16)
            continue;
        pthread_mutex_lock(&mutex);
        under_mutex++;
        pthread_mutex_unlock(&mutex);
        while (atomic_flag_test_and_set_explicit(&lock, memory_order_acquire))
            __builtin_ia32_pause();
        under_lock++;
        atomic_flag_clear_explicit(&lock, memory_order_release);
    }
    return NULL;
}

/* ---- Shootdowns: pages come and go, and lose and get rights, while all threads use them ---- */

static char *area;
static __thread sigjmp_buf back;
static __thread volatile sig_atomic_t may_fault;
static _Atomic long faults;

static void on_fault(int number)
{
    (void)number;
    if (!may_fault)
        abort();
    siglongjmp(back, 1);
}

static void *shootdowns(void *argument)
{
    long me = (long)argument;
    on_cpu(me);
    for (long i = 0; i < rounds; i++) {
        /* A page of its own, which was another thread's a moment ago: it is zero, and nobody else writes there. */
        char *page = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int at = 0; at < 4 * PAGE; at += PAGE) {
            if (page[at])
                atomic_fetch_add(&wrong, 1);
            page[at] = (char)(me + 1);
        }
        sched_yield();
        for (int at = 0; at < 4 * PAGE; at += PAGE)
            if (page[at] != (char)(me + 1))
                atomic_fetch_add(&wrong, 1);
        munmap(page, 4 * PAGE);
        /* A page of all: the thread that has made it read-only finds that no store comes after that. */
        volatile long *cell = (long *)(area + PAGE * (i % count));
        may_fault = 1;
        if (!sigsetjmp(back, 1)) {
            if (me == i % count) {
                mprotect((void *)cell, PAGE, PROT_READ);
                long seen = *cell;
                for (int n = 0; n < 50; n++)
                    if (*cell != seen)
                        atomic_fetch_add(&wrong, 1);
                mprotect((void *)cell, PAGE, PROT_READ | PROT_WRITE);
            } else {
                ++*cell;
            }
        } else {
            atomic_fetch_add(&faults, 1);
        }
        may_fault = 0;
    }
    return NULL;
}

/* ---- Futexes: a ball that goes round, by condition variables ---- */

static pthread_cond_t turns[MOST];
static long holder;

static void *ball(void *argument)
{
    long me = (long)argument;
    on_cpu(me);
    for (long i = 0; i < rounds; i++) {
        pthread_mutex_lock(&mutex);
        while (holder % count != me)
            pthread_cond_wait(&turns[me], &mutex);
        holder++;
        pthread_cond_signal(&turns[holder % count]);
        pthread_mutex_unlock(&mutex);
    }
    return NULL;
}

/* ---- Code: a thread writes functions, and the others call them once it says so ---- */

static unsigned char *code;
static _Atomic long version, called;

static void *writes_code(void *argument)
{
    long me = (long)argument;
    on_cpu(me);
    for (long i = 1; i <= rounds; i++) {
        unsigned char *function = code + 64 * (i % 128);
        if (!me) {
            int32_t value = (int32_t)i;
            while (atomic_load(&called) < (i - 1) * (count - 1))
                sched_yield();
            function[0] = 0xb8; /* mov eax, value; ret */
            memcpy(function + 1, &value, 4);
            function[5] = 0xc3;
            atomic_store(&version, i);
        } else {
            unsigned a = 0, b, c = 0, d;
            int (*call)(void);
            while (atomic_load(&version) < i)
                sched_yield();
            __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
            memcpy(&call, &function, sizeof call);
            if (call() != i)
                atomic_fetch_add(&wrong, 1);
            atomic_fetch_add(&called, 1);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    count = atoi(argv[2]);
    rounds = atol(argv[3]);
    area = mmap(NULL, (size_t)count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    code = mmap(NULL, 128 * 64, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    signal(SIGSEGV, on_fault);
    if (!strcmp(argv[1], "locks")) {
        together(locks);
        printf("added %ld swapped %ld mutex %ld lock %ld\n", added, swapped, under_mutex, under_lock);
    } else if (!strcmp(argv[1], "shootdowns")) {
        together(shootdowns);
        printf("wrong %ld\n", wrong);
        fprintf(stderr, "faults %ld\n", faults);
    } else if (!strcmp(argv[1], "ball")) {
        for (int i = 0; i < count; i++)
            pthread_cond_init(&turns[i], NULL);
        together(ball);
        printf("passed %ld\n", holder);
    } else if (!strcmp(argv[1], "code")) {
        together(writes_code);
        printf("wrong %ld called %ld\n", wrong, called);
    } else {
        return 2;
    }
    return 0;
}
