/* The host CPU as the oracle. Unlike tests/emulator/native.c this is made for many runs: signals and the alternate stack are
 * set once a batch, and code that ends regularly comes back by a jump, without a signal.
 *
 * System calls from the tested code are kept from the kernel by Syscall User Dispatch (Linux 5.11, prctl(2)). */
#define _GNU_SOURCE
#include "fuzz.h"
#include <asm/ldt.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#define PR_SYS_DISPATCH_OFF 0
#define PR_SYS_DISPATCH_ON 1
#endif

u8 *host_code, *host_data;
bool host_avx;
static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGVTALRM};
enum { SIGNALS = sizeof signals / sizeof *signals };
static struct sigaction before[SIGNALS];
static volatile bool native; /* in tested code */
static u64 runs, runs_at_tick;
static char dispatch = 1;    /* the selector: SYSCALL_DISPATCH_FILTER_BLOCK */

/* What the assembly below reads and writes. */
struct state host_state;
u64 host_rsp, host_target, host_rax;
u16 host_selector, host_ds, host_es, host_ss;
u8 host_fx[512] __attribute__((aligned(64)));
extern const char host_left[], host_stopped[];

static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void stopped(int signal, siginfo_t *info, void *context)
{
    __asm__ volatile("pushfq\n andl $~0x40000, (%%rsp)\n popfq" ::: "cc", "memory"); /* AC, for our own accesses */
    ucontext_t *u = context;
    greg_t *g = u->uc_mcontext.gregs;
    (void)info;
    if (signal == SIGVTALRM) {
        bool late = native && runs == runs_at_tick;
        runs_at_tick = runs;
        if (!late)
            return;
    }
    if (!native) { /* a fault of the fuzzer itself */
        sigaction(signal, &before[0], NULL);
        return;
    }
    for (int i = 0; i < 16; i++)
        host_state.gpr[i] = (u64)g[order[i]];
    host_state.rip = (u64)g[REG_RIP];
    host_state.rflags = (u64)g[REG_EFL];
    host_state.vector = signal == SIGVTALRM ? VECTOR_ENDLESS : signal == SIGSYS ? VECTOR_SYSCALL : (int)g[REG_TRAPNO];
    host_state.address = host_state.vector == 14 ? (u64)g[REG_CR2] : 0;
    if (host_state.vector == 3)
        host_state.rip--; /* a trap: after the INT3 */
    const u8 *area = (const u8 *)u->uc_mcontext.fpregs; /* of XSAVE's standard form */
    memcpy(host_state.fx, area, 512);
    if (host_avx && area[512] & 4)
        memcpy(host_state.ymm, area + 576, sizeof host_state.ymm);
    else if (host_avx)
        memset(host_state.ymm, 0, sizeof host_state.ymm);
    g[REG_RIP] = (greg_t)host_stopped;
    g[REG_RSP] = (greg_t)host_rsp;
    g[REG_EFL] = 0x202;
    g[REG_CSGSFS] = (g[REG_CSGSFS] & 0x0000ffffffff0000) | 0x33 | (greg_t)0x2b << 48;
}

/* In: registers from host_state; out: to host_state, by host_left (a jump through EXIT64) or host_stopped (a signal). */
__attribute__((naked, noinline)) static void enter(bool compat __attribute__((unused)))
{
    __asm__ volatile(
        "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "fxsave64 host_fx(%rip)\n"
        "mov %rsp, host_rsp(%rip)\n"
        "mov %edi, %ecx\n"
        "lea host_state(%rip), %rdi\n"
        "cmpb $0, host_avx(%rip)\n je 2f\n"
        "mov $7, %eax\n xor %edx, %edx\n xrstor64 192(%rdi)\n jmp 3f\n"
        "2: fxrstor64 192(%rdi)\n"
        "3: mov %ecx, %eax\n"
        "mov host_ds(%rip), %ds\n mov host_es(%rip), %es\n" /* the x87 stores DS in 64-bit mode, too */
        "mov 128(%rdi), %rcx\n mov %rcx, host_target(%rip)\n"
        "mov %ecx, host_far(%rip)\n movzwl host_selector(%rip), %ecx\n mov %cx, host_far+4(%rip)\n"
        "mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n"
        "mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n"
        "mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n"
        "mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n"
        "test %eax, %eax\n jnz 1f\n"
        "mov 0(%rdi), %rax\n push 136(%rdi)\n mov 56(%rdi), %rdi\n popfq\n"
        "mov host_state+32(%rip), %rsp\n"
        "jmp *host_target(%rip)\n"
        "1: mov 0(%rdi), %rax\n push 136(%rdi)\n mov 56(%rdi), %rdi\n popfq\n"
        "mov host_state+32(%rip), %rsp\n"
        "mov host_ss(%rip), %ss\n"
        "ljmp *host_far(%rip)\n"
        ".global host_left\n host_left:\n"
        "mov $0x2b, %eax\n mov %eax, %ss\n"
        "mov %rcx, host_state+8(%rip)\n mov %rdx, host_state+16(%rip)\n mov %rbx, host_state+24(%rip)\n"
        "mov %rsp, host_state+32(%rip)\n mov %rbp, host_state+40(%rip)\n mov %rsi, host_state+48(%rip)\n"
        "mov %rdi, host_state+56(%rip)\n mov %r8, host_state+64(%rip)\n mov %r9, host_state+72(%rip)\n"
        "mov %r10, host_state+80(%rip)\n mov %r11, host_state+88(%rip)\n mov %r12, host_state+96(%rip)\n"
        "mov %r13, host_state+104(%rip)\n mov %r14, host_state+112(%rip)\n mov %r15, host_state+120(%rip)\n"
        "mov host_rsp(%rip), %rsp\n"
        "pushfq\n popq host_state+136(%rip)\n"
        "pushq $0x202\n popfq\n"
        "mov host_rax(%rip), %rax\n mov %rax, host_state(%rip)\n"
        "cmpb $0, host_avx(%rip)\n je 4f\n"
        "mov $7, %eax\n xor %edx, %edx\n xsave64 host_state+192(%rip)\n jmp host_stopped\n"
        "4: fxsave64 host_state+192(%rip)\n"
        ".global host_stopped\n host_stopped:\n"
        "cld\n cmpb $0, host_avx(%rip)\n je 5f\n vzeroupper\n"
        "5: fxrstor64 host_fx(%rip)\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n"
        ".pushsection .data\n host_far: .long 0\n .word 0\n .popsection\n");
}
_Static_assert(offsetof(struct state, rip) == 128 && offsetof(struct state, fx) == 192, "the assembly knows");

void host_run(struct state *s, const struct mode *mode)
{
    host_state = *s;
    memset(host_state.header, 0, sizeof host_state.header);
    host_state.header[0] = 7;
    host_selector = 0x23, host_ds = host_es = host_ss = 0x2b; /* Linux's user segments */
    if (mode->segmented) {
        host_selector = selector_of(mode->use[IN_CS]), host_ds = selector_of(mode->use[IN_DS]);
        host_es = selector_of(mode->use[IN_ES]), host_ss = selector_of(mode->use[IN_SS]);
        host_state.rip -= code_base(mode);
    }
    host_state.vector = VECTOR_NONE;
    runs++;
    native = true;
    enter(mode->compat);
    native = false;
    if (host_state.vector == VECTOR_NONE)
        host_state.rip = mode->compat ? EXIT32 : EXIT64;
    else if (mode->segmented && host_state.vector == 1 && host_state.rip == EXIT64) /* EFLAGS.TF: after the jump */
        host_state.vector = VECTOR_NONE, host_state.rip = EXIT32;
    else if (mode->segmented)
        host_state.rip = (u32)(host_state.rip + code_base(mode));
    *s = host_state;
}

static int set_ldt(void)
{
    for (unsigned i = 0; i < SEGMENTS; i++) {
        const struct segment *s = &segments[i];
        struct user_desc d = {.entry_number = i, .base_addr = s->base, .limit = s->pages ? s->limit >> 12 : s->limit,
                              .seg_32bit = s->big, .contents = s->code ? 2 : s->down, .read_exec_only = s->less,
                              .limit_in_pages = s->pages, .useable = 1};
        if (syscall(SYS_modify_ldt, 0x11, &d, sizeof d))
            return -errno;
    }
    return 0;
}

static u8 *map_at(u32 address, size_t size, int protection, int fd, long offset)
{
    void *p = mmap((void *)(uintptr_t)address, size, protection, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, offset);
    return p == (void *)(uintptr_t)address ? p : NULL;
}

int host_open(void)
{
    host_avx = __builtin_cpu_supports("avx");
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, CODE_SIZE + DATA_SIZE + PAGE))
        return -errno;
    u8 *all = mmap(NULL, CODE_SIZE + DATA_SIZE + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (all == MAP_FAILED || !map_at(CODE, CODE_SIZE, PROT_READ | PROT_EXEC, fd, 0) ||
        !map_at(DATA, DATA_SIZE, PROT_READ | PROT_WRITE, fd, CODE_SIZE) ||
        !map_at(EXIT64, PAGE, PROT_READ | PROT_EXEC, fd, CODE_SIZE + DATA_SIZE))
        return -ENOMEM;
    host_code = all;
    host_data = (u8 *)(uintptr_t)DATA;
    u8 *stub = all + CODE_SIZE + DATA_SIZE;
    u64 address = (u64)&host_rax, left = (u64)host_left;
    memcpy(stub, "\x48\xa3", 2);               /* mov [moffs64], rax */
    memcpy(stub + 2, &address, 8);
    memcpy(stub + 10, "\x48\xb8", 2);          /* mov rax, imm64 */
    memcpy(stub + 12, &left, 8);
    memcpy(stub + 20, "\xff\xe0", 2);          /* jmp rax */
    u32 exit64 = EXIT64;
    stub[EXIT32 - EXIT64] = 0xea;              /* jmp 33:EXIT64 */
    memcpy(stub + (EXIT32 - EXIT64) + 1, &exit64, 4);
    memcpy(stub + (EXIT32 - EXIT64) + 5, "\x33\0", 2);
    memset(host_code, 0xcc, CODE_SIZE);
    int error = set_ldt();
    if (error)
        return error;
    host_begin();
    host_end();
    /* Everything above the test's area may make system calls always. */
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0x40000000ul, 0x7fff00000000ul, &dispatch))
        return -errno;
    return 0;
}

void host_begin(void)
{
    static u8 stack[65536] __attribute__((aligned(64)));
    struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL);
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &action, &before[i]);
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){.it_value = {.tv_sec = 1}, .it_interval = {.tv_sec = 1}}, NULL);
}

void host_end(void)
{
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){0}, NULL);
    for (int i = 0; i < SIGNALS; i++)
        sigaction(signals[i], &before[i], NULL);
}
