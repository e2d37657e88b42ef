/* A program in extended precision, with MMX between: the same bytes run on the host and on the core, and leave the
 * same data behind. Freestanding; the data area is the first argument; ends at a UD2. */
#include <mmintrin.h>
#include <stdint.h>
#include <xmmintrin.h>

enum { N = 64 };
struct data {
    long double a[N], b[N];
    double x[N];
    float y[N];
    int64_t i[N];
    uint16_t words[N];
    uint64_t results[64];
    uint8_t decimal[16];
};

static uint32_t next(uint32_t *seed) { return *seed = *seed * 1664525 + 1013904223; }

static void set_control(uint16_t control) { __asm__ volatile("fldcw %0" : : "m"(control)); }
static uint16_t status(void)
{
    uint16_t value;
    __asm__ volatile("fnstsw %0" : "=a"(value));
    return value;
}

static long double sine(long double v)
{
    __asm__("fsin" : "+t"(v));
    return v;
}
static long double power_of_2(long double v)
{
    long double result;
    __asm__("fld %%st\n frndint\n fsubr %%st, %%st(1)\n fxch\n f2xm1\n fld1\n faddp\n fscale\n fstp %%st(1)"
            : "=t"(result) : "0"(v));
    return result;
}
static long double logarithm(long double v)
{
    long double result;
    __asm__("fldln2\n fxch\n fyl2x" : "=t"(result) : "0"(v));
    return result;
}

static void fill(struct data *d)
{
    uint32_t seed = 1;
    for (int k = 0; k < N; k++) {
        d->a[k] = (long double)(int32_t)next(&seed) / 65537;
        d->x[k] = (int32_t)next(&seed) / 3.0L;
        d->y[k] = (float)(d->a[k] * d->x[k]);
        d->i[k] = (int64_t)(d->a[k] * 1e9L);
        d->words[k] = (uint16_t)next(&seed);
    }
}

static void reals(struct data *d)
{
    for (int k = 0; k < N; k++) {
        long double v = d->a[k] < 0 ? -d->a[k] : d->a[k];
        d->b[k] = sine(v / 1000) + power_of_2(v / 4096) * logarithm(v + 1) - __builtin_sqrtl(v);
        d->x[k] = (double)(d->b[k] * d->x[k] + d->y[k]);
        d->i[k] += (int64_t)d->b[k];
    }
    for (int k = 1; k < N; k++) /* insertion sort: comparisons, moves */
        for (int n = k; n > 0 && d->b[n - 1] > d->b[n]; n--) {
            long double swap = d->b[n];
            d->b[n] = d->b[n - 1];
            d->b[n - 1] = swap;
        }
}

static void modes(struct data *d)
{
    for (unsigned mode = 0; mode < 16; mode++) { /* rounding and precision */
        set_control((uint16_t)(0x7f | mode << 8));
        volatile long double third = 1, three = -3;
        third = third / three;
        uint64_t bits;
        __builtin_memcpy(&bits, (const void *)&third, 8);
        d->results[mode] = bits + status();
        int32_t integer;
        __asm__ volatile("fldl %1\n fistpl %0" : "=m"(integer) : "m"(d->x[mode]) : "memory");
        d->results[16 + mode] = (uint32_t)integer;
    }
    set_control(0x37f);
    long double large = 123456789012345678.0L;
    __asm__ volatile("fbstp %0" : "=m"(d->decimal) : "t"(large) : "st");
}

static void integers(struct data *d)
{
    __m64 sum = _mm_setzero_si64();
    const __m64 *words = (const __m64 *)d->words;
    for (int k = 0; k < N / 4; k++) {
        sum = _mm_add_pi32(sum, _mm_madd_pi16(words[k], words[(k + 1) % (N / 4)]));
        sum = _mm_xor_si64(sum, _mm_avg_pu8(words[k], _mm_shuffle_pi16(words[k], 0x1b)));
    }
    d->results[40] = (uint64_t)sum;
    d->results[41] = status();
    _mm_empty();
    d->results[42] = (uint64_t)(d->b[3] * 16);
}

__attribute__((section(".text.start"))) void _start(struct data *d)
{
    __asm__ volatile("fninit");
    fill(d);
    for (int round = 0; round < 3; round++) {
        reals(d);
        modes(d);
        integers(d);
    }
    __builtin_trap();
}
