/* The C forms of AES, PCLMULQDQ and SHA instructions against the host's instructions. */
#include "crypto.h"

#include <immintrin.h>

/* With `blocks` blocks of 16 random bytes: the name of the first operation that differs, or NULL. */
__attribute__((visibility("default"))) const char *crypto_check(const unsigned char *data, size_t blocks)
{
    for (size_t i = 0; i + 2 < blocks; i++) {
        const __m128i *at = (const __m128i *)data + i;
        __m128i d = _mm_loadu_si128(at), s = _mm_loadu_si128(at + 1), x = _mm_loadu_si128(at + 2);
#define SAME(name, expected, found) \
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(expected, found)) != 0xffff) \
        return name;
        SAME("aesenc", _mm_aesenc_si128(d, s), portable_aesenc(d, s))
        SAME("aesenclast", _mm_aesenclast_si128(d, s), portable_aesenclast(d, s))
        SAME("aesdec", _mm_aesdec_si128(d, s), portable_aesdec(d, s))
        SAME("aesdeclast", _mm_aesdeclast_si128(d, s), portable_aesdeclast(d, s))
        SAME("aesimc", _mm_aesimc_si128(s), portable_aesimc(s))
        SAME("aeskeygenassist 0", _mm_aeskeygenassist_si128(s, 0), portable_aeskeygenassist(s, 0))
        SAME("aeskeygenassist b6", _mm_aeskeygenassist_si128(s, 0xb6), portable_aeskeygenassist(s, 0xb6))
        SAME("pclmulqdq 00", _mm_clmulepi64_si128(d, s, 0x00), portable_pclmulqdq(d, s, 0x00))
        SAME("pclmulqdq 01", _mm_clmulepi64_si128(d, s, 0x01), portable_pclmulqdq(d, s, 0x01))
        SAME("pclmulqdq 10", _mm_clmulepi64_si128(d, s, 0x10), portable_pclmulqdq(d, s, 0x10))
        SAME("pclmulqdq 11", _mm_clmulepi64_si128(d, s, 0x11), portable_pclmulqdq(d, s, 0xff))
        SAME("sha1rnds4 0", _mm_sha1rnds4_epu32(d, s, 0), portable_sha1rnds4(d, s, 0))
        SAME("sha1rnds4 1", _mm_sha1rnds4_epu32(d, s, 1), portable_sha1rnds4(d, s, 1))
        SAME("sha1rnds4 2", _mm_sha1rnds4_epu32(d, s, 2), portable_sha1rnds4(d, s, 2))
        SAME("sha1rnds4 3", _mm_sha1rnds4_epu32(d, s, 3), portable_sha1rnds4(d, s, 0xff))
        SAME("sha1nexte", _mm_sha1nexte_epu32(d, s), portable_sha1nexte(d, s))
        SAME("sha1msg1", _mm_sha1msg1_epu32(d, s), portable_sha1msg1(d, s))
        SAME("sha1msg2", _mm_sha1msg2_epu32(d, s), portable_sha1msg2(d, s))
        SAME("sha256rnds2", _mm_sha256rnds2_epu32(d, s, x), portable_sha256rnds2(d, s, x))
        SAME("sha256msg1", _mm_sha256msg1_epu32(d, s), portable_sha256msg1(d, s))
        SAME("sha256msg2", _mm_sha256msg2_epu32(d, s), portable_sha256msg2(d, s))
    }
    return NULL;
}
