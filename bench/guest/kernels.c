/*
 * The kernels of the CPU benchmarks: plain freestanding C, each a different kind of code. All return a value that
 * depends on all they did, so that the engines' results can be compared, and nothing is optimised away.
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

/* Arithmetic in registers. */
static u64 alu(u64 times)
{
    u64 a = 0x9E3779B97F4A7C15, b = 1, c = 2;
    for (u64 i = 0; i < times * 100000; i++) {
        a ^= a << 13;
        a ^= a >> 7;
        b += a ^ c;
        c = c * 5 + b;
        a ^= a << 17;
        b = (b >> 3) - c + i;
    }
    return a ^ b ^ c;
}

static u8 sieve[1 << 18], copy[1 << 18];

/* Memory: a sieve by bytes, and a copy of it by words. */
static u64 mem(u64 times)
{
    u64 count = 0;
    for (u64 t = 0; t < times; t++) {
        for (u32 i = 0; i < sizeof sieve; i++)
            sieve[i] = 1;
        for (u32 i = 2; i * i < sizeof sieve; i++)
            if (sieve[i])
                for (u32 j = i * i; j < sizeof sieve; j += i)
                    sieve[j] = 0;
        for (u32 i = 0; i < sizeof sieve / 8; i++)
            ((volatile u64 *)copy)[i] = ((volatile u64 *)sieve)[i];
        for (u32 i = 2; i < sizeof copy; i++)
            count += copy[i];
    }
    return count;
}

static u32 numbers[1 << 14];

static void sort_range(u32 *v, long low, long high)
{
    while (low < high) {
        u32 pivot = v[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (v[i] < pivot)
                i++;
            while (v[j] > pivot)
                j--;
            if (i <= j) {
                u32 t = v[i];
                v[i++] = v[j];
                v[j--] = t;
            }
        }
        sort_range(v, low, j);
        low = i;
    }
}

/* Branches that cannot be foreseen: quicksort. */
static u64 sort(u64 times)
{
    u64 sum = 0;
    for (u64 t = 0; t < times; t++) {
        u32 x = 12345 + t;
        for (u32 i = 0; i < sizeof numbers / 4; i++)
            numbers[i] = x = x * 1664525 + 1013904223;
        sort_range(numbers, 0, sizeof numbers / 4 - 1);
        for (u32 i = 0; i < sizeof numbers / 4; i += 97)
            sum = sum * 31 + numbers[i];
    }
    return sum;
}

/* FIPS 180-4: rotations, additions, long straight runs. The constants are computed, as fractional parts of cube
 * roots are dull to write down and any others cost the same time. */
static u32 rotate(u32 x, int n) { return x >> n | x << (32 - n); }

static u64 sha256(u64 times)
{
    u32 k[64], w[64], h[8];
    for (int i = 0; i < 64; i++)
        k[i] = 0x428a2f98u * (2 * i + 1);
    for (int i = 0; i < 8; i++)
        h[i] = 0x6a09e667u + 0x9e3779b9u * i;
    for (u64 t = 0; t < times * 100; t++) {
        for (int i = 0; i < 16; i++)
            w[i] = h[i & 7] + i + t;
        for (int i = 16; i < 64; i++) {
            u32 s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            u32 s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        u32 a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], z = h[7];
        for (int i = 0; i < 64; i++) {
            u32 t1 = z + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
            u32 t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            z = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += z;
    }
    return (u64)h[0] << 32 | h[7];
}

static u32 crc_table[256];

/* A table look-up a byte. */
static u64 crc(u64 times)
{
    u32 value = ~0u;
    for (u32 i = 0; i < 256; i++) {
        u32 c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? c >> 1 ^ 0xEDB88320 : c >> 1;
        crc_table[i] = c;
    }
    for (u64 t = 0; t < times; t++)
        for (u32 i = 0; i < 65536; i++)
            value = crc_table[(value ^ (i * 7 + t)) & 255] ^ value >> 8;
    return value;
}

/* Calls and returns. */
static __attribute__((noinline)) u64 fibonacci(u64 n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static u64 calls(u64 times)
{
    u64 sum = 0;
    for (u64 t = 0; t < times; t++)
        sum += fibonacci(18 + (t & 1));
    return sum;
}

/* A bytecode machine: indirect jumps. */
static u64 bytecode(u64 times)
{
    static const u8 program[] = {1, 2, 3, 4, 1, 5, 2, 6, 3, 1, 4, 7, 0};
    u64 acc = 1, other = 7;
    for (u64 t = 0; t < times * 1000; t++)
        for (const u8 *p = program;; p++) {
            switch (*p) {
            case 0: goto next;
            case 1: acc += other; continue;
            case 2: other ^= acc << 1; continue;
            case 3: acc = acc >> 1 | acc << 63; continue;
            case 4: other -= 3; continue;
            case 5: acc ^= t; continue;
            case 6: other = other * 3; continue;
            case 7: acc += other & 255; continue;
            }
        next:
            break;
        }
    return acc ^ other;
}

/* x87: long double arithmetic. */
static u64 x87(u64 times)
{
    long double sum = 0, x = 1.25L;
    for (u64 t = 0; t < times * 20000; t++) {
        sum += x / (sum + 3.5L);
        x = x * 1.0000001L + 0.5L - sum * 1e-7L;
    }
    return (u64)(sum * 1000);
}

/* SSE2: scalar and packed double arithmetic (the compiler vectorises the second loop). */
static double left[512], right[512];

static u64 sse(u64 times)
{
    double sum = 0;
    for (int i = 0; i < 512; i++)
        left[i] = i * 0.5, right[i] = 3.0 - i * 0.001;
    for (u64 t = 0; t < times * 20; t++) {
        for (int i = 0; i < 512; i++)
            left[i] = left[i] * 0.999 + right[i];
        double x = 1.0 + t;
        for (int i = 0; i < 256; i++)
            x = x / 1.01 + left[i] * right[i & 63];
        sum += x;
    }
    return (u64)sum;
}

u64 run_kernel(u64 number, u64 times)
{
    switch (number) {
    case 0: return alu(times);
    case 1: return mem(times);
    case 2: return sort(times);
    case 3: return sha256(times);
    case 4: return crc(times);
    case 5: return calls(times);
    case 6: return bytecode(times);
    case 7: return x87(times);
    case 8: return sse(times);
    }
    return ~0ul;
}

static const char *number_at(const char *s, u64 *value)
{
    while (*s == ' ')
        s++;
    for (*value = 0; *s >= '0' && *s <= '9'; s++)
        *value = *value * 10 + *s - '0';
    return s;
}

/* Multiboot gives the path of the kernel, then what -append says: the two numbers at the end. */
u64 run_command_line(const char *line)
{
    u64 number, times;
    while (*line && *line != ' ')
        line++;
    number_at(number_at(line, &number), &times);
    return run_kernel(number, times);
}
