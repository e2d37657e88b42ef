/* A user of ptrace who watches the operand of a load of SS: what the kernel tells of the instruction after it.
 * A line each: its name, the signal, DR6's low half, the instruction pointer after the load. */
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned short selector;

#define CASES(X) \
    X(nop, "nop") X(int3, "int3") X(int_3, ".byte 0xcd, 3") X(int1, ".byte 0xf1") X(ud2, "ud2") \
    X(int80, "int $0x80") X(syscall, "syscall") X(twice, "mov %1, %%ss")

#define CODE(name, instruction) \
    static void run_##name(void) \
    { \
        long number = -1; /* of no system call */ \
        asm volatile(".globl behind_" #name "\n mov %1, %%ss\n behind_" #name ": " instruction "\n nop\n nop" \
                     : "+a"(number) : "m"(selector) : "rcx", "r11", "memory"); \
    } \
    extern char behind_##name[];
CASES(CODE)

static const struct { const char *name; void (*run)(void); char *after; } cases[] = {
#define ROW(name, instruction) {#name, run_##name, behind_##name},
    CASES(ROW)
};

int main(void)
{
    asm volatile("mov %%ss, %0" : "=r"(selector));
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status;
        pid_t child = fork();
        if (!child) {
            ptrace(PTRACE_TRACEME, 0, 0, 0);
            raise(SIGSTOP);
            cases[i].run();
            _exit(0);
        }
        waitpid(child, &status, 0);
        if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[0]), &selector) ||
            ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 0x70401)) /* L0, R/W, a word */
            return 1;
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        if (WIFSTOPPED(status)) {
            struct user_regs_struct regs;
            long dr6 = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg[6]), 0);
            ptrace(PTRACE_GETREGS, child, 0, &regs);
            printf("%s %d %lx %lld\n", cases[i].name, WSTOPSIG(status), dr6 & 0xffff,
                   (long long)regs.rip - (long long)cases[i].after);
            ptrace(PTRACE_KILL, child, 0, 0);
            waitpid(child, &status, 0);
        } else {
            printf("%s done\n", cases[i].name);
        }
    }
    return 0;
}
