/* Run a few instructions natively, with given registers, and give everything back: the oracle for the emulator core.
 *
 * native_run enters the code at `rip` with the state in `s` and comes back through an INT3 after it (SIGTRAP), or through
 * the signal that a fault raises. All signals are taken on an alternate stack, because RSP is the test's too. The handler
 * does not jump out of itself: it has the kernel return to `landing`, with the stack that `enter` saved. So an alarm that
 * comes outside the code, where a lock of libc or of a sanitizer may be held, changes nothing. The code runs
 * in this process: it must not touch memory that is not the test's, so memory operands point into the arena that the caller
 * mapped, whose address is the same in the guest. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

enum { NATIVE_TIMEOUT = 255 }; /* vector of a test that did not end in a second: it jumps to itself */
enum { SIGNALS = 6 };

struct native_state {
    uint64_t gpr[16];         /* rax rcx rdx rbx rsp rbp rsi rdi r8 .. r15 */
    uint64_t rip, rflags;
    uint64_t fault_address;
    uint32_t vector;          /* 3: the INT3 after the code */
    uint32_t error;
    uint64_t avx;             /* the host has AVX: the area is XRSTOR's, with three components; else FXRSTOR's */
    uint8_t fx[512] __attribute__((aligned(64))); /* FXSAVE image */
    uint8_t header[64];       /* of XSAVE: the caller sets the components */
    uint8_t ymm[256];         /* the upper halves */
};
_Static_assert(offsetof(struct native_state, fx) == 192, "the assembly knows");

static struct native_state *current;
static uint64_t host_stack; /* RSP that `landing` needs; 0 outside enter */
void landing(void);

enum { USER_CS = 0x33, USER_SS = 0x2b }; /* of Linux in 64-bit mode */
enum { PLAIN_FLAGS = 0x202 };

static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void stopped(int signal, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    (void)info;
    if (!host_stack) { /* the alarm, too late or too early: it comes again */
        if (signal != SIGALRM)
            _exit(128 + signal); /* a fault of this process, and not of the test: to return would repeat it for good */
        return;
    }
    for (int i = 0; i < 16; i++)
        current->gpr[i] = (uint64_t)u->uc_mcontext.gregs[order[i]];
    current->rip = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
    current->rflags = (uint64_t)u->uc_mcontext.gregs[REG_EFL];
    current->vector = (uint32_t)u->uc_mcontext.gregs[REG_TRAPNO];
    if (signal == SIGALRM)
        current->vector = NATIVE_TIMEOUT;
    current->error = (uint32_t)u->uc_mcontext.gregs[REG_ERR];
    current->fault_address = (uint64_t)u->uc_mcontext.gregs[REG_CR2];
    memcpy(current->fx, u->uc_mcontext.fpregs, 512);
    if (current->avx) { /* the signal's frame is an XSAVE area of the standard form */
        const uint8_t *area = (const uint8_t *)u->uc_mcontext.fpregs;
        if (area[512] & 4)
            memcpy(current->ymm, area + 576, sizeof current->ymm);
        else
            memset(current->ymm, 0, sizeof current->ymm);
    }
    u->uc_mcontext.gregs[REG_RIP] = (greg_t)landing;
    u->uc_mcontext.gregs[REG_RSP] = (greg_t)host_stack;
    u->uc_mcontext.gregs[REG_EFL] = PLAIN_FLAGS;
    uint16_t *segments = (uint16_t *)&u->uc_mcontext.gregs[REG_CSGSFS]; /* cs gs fs ss */
    segments[0] = USER_CS;
    segments[3] = USER_SS;
    host_stack = 0;
}

/* The flags, the x87, SSE and AVX state, the registers, and go; r15 last, from the stack's own copy. */
__attribute__((naked, noinline)) static void enter(struct native_state *s __attribute__((unused)))
{
    __asm__ volatile(
        "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, host_stack(%rip)\n"
        "cmpl $0, 160(%rdi)\n jne 1f\n fxrstor64 192(%rdi)\n jmp 2f\n"
        "1: mov $7, %eax\n xor %edx, %edx\n xrstor64 192(%rdi)\n 2:\n"
        "mov 128(%rdi), %rax\n"
        "mov %rax, target(%rip)\n"
        "push 136(%rdi)\n"
        "mov 0(%rdi), %rax\n mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n"
        "mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n"
        "mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n"
        "mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n"
        "popfq\n"
        "mov 32(%rdi), %rsp\n"
        "mov 56(%rdi), %rdi\n"
        "jmp *target(%rip)\n"
        ".pushsection .data\n target: .quad 0\n .popsection\n");
}

/* What enter and enter_compat return by, once a signal has ended the code. */
__attribute__((naked, noinline, used)) void landing(void)
{
    __asm__ volatile("pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
}

/* The same in compatibility mode: eight registers, 32-bit code, flat segments. 0x23 and 0x2b are Linux's selectors. */
__attribute__((naked, noinline)) static void enter_compat(struct native_state *s __attribute__((unused)))
{
    __asm__ volatile(
        "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, host_stack(%rip)\n"
        "cmpl $0, 160(%rdi)\n jne 1f\n fxrstor64 192(%rdi)\n jmp 2f\n"
        "1: mov $7, %eax\n xor %edx, %edx\n xrstor64 192(%rdi)\n 2:\n"
        "mov 128(%rdi), %rax\n"
        "mov %eax, far_target(%rip)\n"
        "mov $0x2b, %eax\n mov %eax, %ds\n mov %eax, %es\n"
        "push 136(%rdi)\n"
        "mov 0(%rdi), %eax\n mov 8(%rdi), %ecx\n mov 16(%rdi), %edx\n mov 24(%rdi), %ebx\n"
        "mov 40(%rdi), %ebp\n mov 48(%rdi), %esi\n"
        "popfq\n"
        "mov 32(%rdi), %esp\n"
        "mov 56(%rdi), %edi\n"
        "ljmp *far_target(%rip)\n"
        ".pushsection .data\n far_target: .long 0\n .word 0x23\n .popsection\n");
}

static int run(struct native_state *s, void (*enter_code)(struct native_state *))
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGALRM};
    static uint8_t stack[65536];
    struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_ONSTACK}, old[SIGNALS];
    struct itimerval old_timer;
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack}, old_stack;
    uint8_t saved[512] __attribute__((aligned(16)));
    sigset_t all, mask;
    uint16_t ds, es;
    /* Nothing else may arrive meanwhile: a handler of Python would run on the test's stack. */
    sigfillset(&all);
    for (int i = 0; i < SIGNALS; i++)
        sigdelset(&all, signals[i]);
    sigprocmask(SIG_SETMASK, &all, &mask);
    sigaltstack(&alternate, &old_stack);
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &action, &old[i]);
    __asm__ volatile("fxsave64 %0" : "=m"(saved));
    __asm__ volatile("mov %%ds, %0\n mov %%es, %1" : "=r"(ds), "=r"(es));
    current = s;
    setitimer(ITIMER_REAL, &(struct itimerval){.it_value = {.tv_sec = 1}, .it_interval = {.tv_sec = 1}}, &old_timer);
    enter_code(s);
    if (s->avx)
        __asm__ volatile("vzeroupper");
    __asm__ volatile("fxrstor64 %0\n cld" : : "m"(saved));
    __asm__ volatile("mov %0, %%ds\n mov %1, %%es" : : "r"(ds), "r"(es));
    setitimer(ITIMER_REAL, &old_timer, NULL); /* pytest-timeout has one */
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &old[i], NULL);
    sigaltstack(&old_stack, NULL);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    return 0;
}

int native_run(struct native_state *s) { return run(s, enter); }
int native_run_compat(struct native_state *s) { return run(s, enter_compat); }

/* Memory at a fixed address, or 0. */
uint64_t native_map(uint64_t address, uint64_t size, int fd, int64_t offset, int executable)
{
    void *p = mmap((void *)address, size, PROT_READ | PROT_WRITE | (executable ? PROT_EXEC : 0),
                   MAP_SHARED | MAP_FIXED_NOREPLACE, fd, offset);
    if (p != MAP_FAILED && (uint64_t)p != address)
        munmap(p, size); /* an old kernel without MAP_FIXED_NOREPLACE */
    return (uint64_t)p == address ? address : 0;
}
