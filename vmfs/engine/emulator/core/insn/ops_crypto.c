/* AES, PCLMULQDQ and SHA: by the host's instructions where it has them, else by crypto.c. */
#include "crypto.h"
#include "sse.h"

#include <cpuid.h>

/* CPUID.(7,0):EBX bit 29. A serializing CPUID an instruction would cost more than the SHA round in C: asked
 * once. */
static bool host_sha;
static __attribute__((constructor)) void find_host_sha(void)
{
    unsigned a, b, c, d;
    host_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

#define HOST(name) __asm__(#name " %1, %0" : "+x"(d) : "x"(s))
#define EITHER(name, host) \
    COMPUTE(name) \
    { \
        (void)c, (void)r; \
        if (likely(host)) \
            HOST(name); \
        else \
            d = portable_##name(d, s); \
        return d; \
    } \
    FORMS_16(name)

EITHER(aesenc, __builtin_cpu_supports("aes"))
EITHER(aesenclast, __builtin_cpu_supports("aes"))
EITHER(aesdec, __builtin_cpu_supports("aes"))
EITHER(aesdeclast, __builtin_cpu_supports("aes"))
COMPUTE(aesimc)
{
    (void)c, (void)r;
    if (likely(__builtin_cpu_supports("aes")))
        HOST(aesimc);
    else
        d = portable_aesimc(s);
    return d;
}
FORMS_16(aesimc)
/* With key expansion being rare, one path serves all hosts: the immediate is the round constant. */
COMPUTE(aeskeygenassist)
{
    (void)c, (void)d;
    return portable_aeskeygenassist(s, (u8)r->imm);
}
FORMS_16(aeskeygenassist)

COMPUTE(pclmulqdq)
{
    (void)c;
    if (unlikely(!__builtin_cpu_supports("pclmul")))
        return portable_pclmulqdq(d, s, (u8)r->imm);
    switch (r->imm & 0x11) {
#define X(n) case n: __asm__("pclmulqdq %2, %1, %0" : "+x"(d) : "x"(s), "i"(n)); break;
    X(0x00) X(0x01) X(0x10) X(0x11)
#undef X
    }
    return d;
}
FORMS_16(pclmulqdq)

EITHER(sha1nexte, host_sha)
EITHER(sha1msg1, host_sha)
EITHER(sha1msg2, host_sha)
EITHER(sha256msg1, host_sha)
EITHER(sha256msg2, host_sha)
COMPUTE(sha256rnds2)
{
    (void)r;
    register xmm words __asm__("xmm0") = get_xmm(c, 0);
    if (unlikely(!host_sha))
        return portable_sha256rnds2(d, s, words);
    __asm__("sha256rnds2 %%xmm0, %1, %0" : "+x"(d) : "x"(s), "x"(words));
    return d;
}
FORMS_16(sha256rnds2)
COMPUTE(sha1rnds4)
{
    (void)c;
    if (unlikely(!host_sha))
        return portable_sha1rnds4(d, s, (u8)r->imm);
    switch (r->imm & 3) {
#define X(n) case n: __asm__("sha1rnds4 %2, %1, %0" : "+x"(d) : "x"(s), "i"(n)); break;
    CASES_4(X, 0)
#undef X
    }
    return d;
}
FORMS_16(sha1rnds4)
