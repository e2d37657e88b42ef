/* So much work of a processor, in memory of its own: `busy ROUNDS`. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORDS = 1 << 14 };
static unsigned table[WORDS];

static unsigned __attribute__((noinline)) mix(unsigned x, unsigned y)
{
    x ^= y << 13;
    x ^= x >> 17;
    return x * 0x9e3779b1u + y;
}

int main(int argc, char **argv)
{
    unsigned sum = 1;
    char text[64];
    for (long round = argc > 1 ? atol(argv[1]) : 1; round; round--) {
        for (unsigned i = 0; i < WORDS; i++) {
            sum = mix(sum, table[(sum ^ i) % WORDS]);
            table[i] += sum;
        }
        snprintf(text, sizeof text, "%u %ld", sum, round);
        sum += (unsigned)strlen(text);
    }
    printf("%u\n", sum);
    return 0;
}
