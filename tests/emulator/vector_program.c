/* A program of loops that compilers vectorize, and of intrinsics, over the data area: the same bytes run on the
 * host and on the core, and leave the same data behind. Freestanding; the data area is the first argument; ends
 * at a UD2. */
#include <immintrin.h>
#include <stdint.h>

enum { N = 256 };
struct data {
    float a[N], b[N], c[N];
    double x[N], y[N];
    int32_t i[N], j[N];
    uint16_t h[N];
    uint8_t s[N], t[N];
    uint64_t results[32];
};

static uint32_t next(uint32_t *seed) { return *seed = *seed * 1664525 + 1013904223; }

static void fill(struct data *d)
{
    uint32_t seed = 1;
    for (int k = 0; k < N; k++) {
        d->a[k] = (float)(int32_t)next(&seed) / 65536;
        d->b[k] = (float)(next(&seed) >> 8) / 1000;
        d->x[k] = (double)(int32_t)next(&seed) / 3;
        d->y[k] = d->x[k] * d->a[k] + 1;
        d->i[k] = (int32_t)next(&seed);
        d->h[k] = (uint16_t)next(&seed);
        d->s[k] = (uint8_t)(next(&seed) >> 24);
    }
}

static void floats(struct data *d)
{
    for (int k = 0; k < N; k++)
        d->c[k] = d->a[k] * 1.25f + d->b[k] / (1 + d->a[k] * d->a[k]);
    for (int k = 0; k < N; k++)
        d->c[k] = d->c[k] > d->a[k] ? __builtin_sqrtf(d->c[k] < 0 ? -d->c[k] : d->c[k]) : d->a[k];
    double sum = 0, product = 1;
    for (int k = 0; k < N; k++) {
        sum += d->x[k] * d->y[k];
        product = product * 0.5 + d->c[k];
    }
    __builtin_memcpy(&d->results[0], &sum, 8);
    __builtin_memcpy(&d->results[1], &product, 8);
    for (int k = 0; k < N; k++) {
        d->j[k] = (int32_t)(d->a[k] * 3);
        d->y[k] = d->i[k];
        d->x[k] = d->c[k];
    }
    for (unsigned mode = 0; mode < 4; mode++) { /* rounding */
        _mm_setcsr(0x1f80 | mode << 13);
        __m128d third = _mm_div_pd(_mm_set_pd(1, -1), _mm_set1_pd(3));
        d->results[2 + mode] = (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(third)) + _mm_getcsr();
        d->results[6 + mode] = (uint64_t)_mm_cvtsd_si64(_mm_set_sd(-2.5 + mode));
    }
    _mm_setcsr(0x1f80);
}

static void integers(struct data *d)
{
    uint32_t sum = 0;
    for (int k = 0; k < N; k++)
        sum += (uint32_t)(d->s[k] > 99 ? d->s[k] - 99 : 0) * d->h[k];
    d->results[10] = sum;
    for (int k = 0; k < N; k++)
        d->t[k] = (uint8_t)(d->s[k] / 3 + (d->h[k] >> 9));
    for (int k = 0; k < N; k++)
        d->i[k] = (d->i[k] < d->j[k] ? d->i[k] : d->j[k]) * 17 - (d->i[k] >> 3);
    uint64_t total = 0;
    for (int k = 0; k < N; k++)
        total += (uint64_t)(uint32_t)d->i[k] * d->s[k];
    d->results[11] = total;
    for (int k = 0; k < N; k++)
        d->h[k] = (uint16_t)(d->h[k] * 31 ^ d->t[k]);
}

static void intrinsics(struct data *d)
{
    uint64_t crc = 0xffffffff;
    for (int k = 0; k < N / 8; k++)
        crc = _mm_crc32_u64(crc, ((uint64_t *)d->s)[k]);
    d->results[12] = crc;
    __m128i key = _mm_loadu_si128((__m128i *)d->t), state = _mm_setzero_si128(), hash = key;
    for (int k = 0; k < N / 16; k++) {
        __m128i block = _mm_loadu_si128((__m128i *)d->s + k);
        state = _mm_aesenc_si128(_mm_xor_si128(state, block), key);
        key = _mm_xor_si128(_mm_aeskeygenassist_si128(key, 1), _mm_clmulepi64_si128(block, key, 0x10));
        hash = _mm_sha256rnds2_epu32(hash, _mm_sha256msg1_epu32(block, key), block);
        hash = _mm_shuffle_epi8(_mm_alignr_epi8(hash, state, 5), _mm_and_si128(block, _mm_set1_epi8(15)));
        int at = _mm_cmpistri(block, _mm_srli_si128(block, 3), _SIDD_CMP_EQUAL_ANY);
        __m128i mixed = _mm_blend_epi16(state, block, 0x5a);
        hash = _mm_add_epi32(hash, _mm_mullo_epi32(_mm_set1_epi32(at + 1), mixed));
    }
    _mm_storeu_si128((__m128i *)&d->results[14], state);
    _mm_storeu_si128((__m128i *)&d->results[16], hash);
    __m128 v = _mm_setzero_ps();
    for (int k = 0; k < N; k += 4) {
        __m128 a = _mm_loadu_ps(d->a + k), b = _mm_loadu_ps(d->b + k);
        __m128 sums = _mm_hadd_ps(_mm_floor_ps(a), _mm_addsub_ps(a, b));
        v = _mm_add_ps(v, _mm_add_ps(_mm_dp_ps(a, b, 0x7f), sums));
        v = _mm_shuffle_ps(v, v, 0x39);
    }
    _mm_storeu_si128((__m128i *)&d->results[18], (__m128i)v);
}

__attribute__((section(".text.start"))) void start(struct data *d)
{
    for (int round = 0; round < 4; round++) {
        fill(d);
        floats(d);
        integers(d);
        intrinsics(d);
        d->results[20 + round] = (uint64_t)_mm_getcsr() + d->results[12];
    }
    __asm__ volatile("ud2");
}
