/* Hardware task switches (Intel SDM 3A chapter 7). Not there yet: an exit says so. */
#include "state.h"

void deliver_task_gate(struct vcpu *c, u16 selector, enum event kind, bool has_error, u32 error)
{
    (void)selector, (void)kind, (void)has_error, (void)error;
    c->exit.reason = EXIT_ERROR;
    c->exit.message = "an interrupt through a task gate, which the emulator does not do yet";
    c->delivering = -1;
    escape(c, ESCAPE_EXIT);
}
