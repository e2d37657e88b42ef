/* A scheduler of tasks in a list, as a guest without an operating system: what examples/corrupted.sh looks into. `rename` copies
 * a name that is too long, over the pointer after it. Nobody follows that pointer until the report, millions of instructions later. */
struct task {
    char name[16];
    struct task *next;
    unsigned long runs;
};

enum { TASKS = 8, ROUNDS = 200000 };

struct task tasks[TASKS];
struct task *ready;

__attribute__((noinline)) void rename(struct task *task, const char *to)
{
    unsigned i = 0;
    do
        task->name[i] = to[i];
    while (to[i++]);
}

static void make(void)
{
    for (int i = TASKS; i-- > 0;) {
        tasks[i] = (struct task){{'t', 'a', 's', 'k', (char)('0' + i)}, ready, 0};
        ready = &tasks[i];
    }
}

/* The first three of the list. */
__attribute__((noinline)) static void run_some(void)
{
    struct task *task = ready;
    for (int i = 0; i < 3; i++, task = task->next)
        task->runs++;
}

__attribute__((noinline)) static unsigned long report(void)
{
    unsigned long runs = 0;
    for (const struct task *task = ready; task; task = task->next)
        runs += task->runs;
    return runs;
}

void start(void)
{
    make();
    for (unsigned round = 0; round < ROUNDS; round++) {
        if (round % 1000 == 500)
            rename(&tasks[round / 1000 % TASKS], round == 70500 ? "the seventieth task's" : "a task");
        run_some();
    }
    __asm__ volatile("hlt" : : "a"(report()));
    for (;;)
        ;
}
