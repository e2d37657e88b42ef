/* What processors may do as they like: freedoms.c. And what it needs of main.c. */
#ifndef FREEDOMS_H
#define FREEDOMS_H

#include "core.h"
#include "generate.h"

enum { BUDGET = 3000, FX_OPCODE = 6, FX_IP = 8, FX_DP = 16 };

struct test {
    struct sequence code;
    struct state start;
    bool stepped;
};

extern u8 *core_code, *core_data;
extern u8 data[DATA_SIZE];                 /* what the data area begins as */
void put_code(const struct sequence *s, bool present);
struct vcpu *core_load(const struct state *s, const struct mode *mode);
void core_store(struct vcpu *c, const struct vcpu_exit *e, const struct sequence *code, struct state *s);
void core_run(struct state *s, const struct sequence *code, bool stepped);

/* Once, before the next: what this host is. */
void freedoms_open(void);
/* Whether processors may differ in all that is left of a case. Else `host` or `core`, and their data, were brought to the
 * other's way where a freedom explains the difference; what differs still is a find. */
bool is_open(const struct test *t, struct state *host, struct state *core);
/* Whether the case stores pointers of the x87, which may differ now and then on a host of AMD. */
bool pointers_are_stored(const struct test *t);

#endif
