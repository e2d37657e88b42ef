/* The operations of AES, PCLMULQDQ and SHA instructions in C, for hosts that lack them. Each is the
 * instruction's: the first argument is the destination operand. */
#ifndef VMFS_CRYPTO_H
#define VMFS_CRYPTO_H

#include <emmintrin.h>

#include "state.h"

__m128i portable_aesenc(__m128i d, __m128i s);
__m128i portable_aesenclast(__m128i d, __m128i s);
__m128i portable_aesdec(__m128i d, __m128i s);
__m128i portable_aesdeclast(__m128i d, __m128i s);
__m128i portable_aesimc(__m128i s);
__m128i portable_aeskeygenassist(__m128i s, u8 round_constant);
__m128i portable_pclmulqdq(__m128i d, __m128i s, u8 imm);
__m128i portable_sha1rnds4(__m128i d, __m128i s, u8 imm);
__m128i portable_sha1nexte(__m128i d, __m128i s);
__m128i portable_sha1msg1(__m128i d, __m128i s);
__m128i portable_sha1msg2(__m128i d, __m128i s);
__m128i portable_sha256rnds2(__m128i d, __m128i s, __m128i words);
__m128i portable_sha256msg1(__m128i d, __m128i s);
__m128i portable_sha256msg2(__m128i d, __m128i s);

#endif
