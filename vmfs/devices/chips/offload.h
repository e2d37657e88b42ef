/* What cards do to frames for their drivers: checksums, segments of TCP, and segments made one again.
 * RFC 1071 (the checksum), RFC 791, 8200, 9293 (headers). Sums are in one's complement, of words that are big-endian. */
#ifndef VMFS_CHIPS_OFFLOAD_H
#define VMFS_CHIPS_OFFLOAD_H

#include "chips.h"

enum { FRAME_LEAST = 14, FRAME_MOST = 65535 + 14, CHECKS_LEAST = FRAME_LEAST + 20 };
enum { PROTOCOL_TCP = 6, PROTOCOL_UDP = 17 };

static inline unsigned get16(const u8 *at) { return (unsigned)at[0] << 8 | at[1]; }
static inline u32 get32(const u8 *at) { return (u32)get16(at) << 16 | get16(at + 2); }
static inline void put16(u8 *at, unsigned value) { at[0] = (u8)(value >> 8), at[1] = (u8)value; }
static inline void put32(u8 *at, u32 value) { put16(at, value >> 16), put16(at + 2, value & 0xFFFF); }

/* The sum, below 65536; of an odd number of bytes as if a zero came after them. */
unsigned sum_of(const u8 *data, size_t length);
static inline unsigned sum_add(unsigned a, unsigned b) { return ((a + b) & 0xFFFF) + ((a + b) >> 16); }
/* What is put into a frame for a sum: never 0, which for UDP means that there is none. */
static inline unsigned sum_complement(unsigned sum) { return sum % 0xFFFF ? 0xFFFF - sum : 0xFFFF; }
/* The sum of the bytes from `start` to `end` (0: to the last one) into the two at `at`, where that is in the frame. */
void sum_insert(u8 *frame, size_t length, size_t start, size_t at, size_t end);

/* Where the checksums of IP (and the last byte that it is of) and of TCP are. */
struct sums { unsigned ip_at, ip_end, tcp_at, tcp_end; };

/* A frame of TCP as several, at the end of a list of bytes, each with its first `header` bytes and up to `most` of those after them. `ip`
 * and `tcp` are where its headers begin, 20 bytes of each before `header`. The checksum of TCP that is there is that of the pseudo
 * header without a length. False: with an exception. */
bool offload_cut(PyObject *list, const u8 *frame, size_t length, unsigned header, unsigned most, unsigned ip, unsigned tcp, struct sums sums);

/* What is known of a frame of TCP that may be one with others: checksums are right, no options of IP, no flags but ACK and PSH. */
struct segment { const u8 *frame; unsigned length, tcp, header; u32 sequence; bool is_v4, is_last; };
bool offload_look(const u8 *frame, size_t length, struct segment *segment);
/* Whether `next` goes on where those end of which `first` is the first, and `payload` the bytes so far. */
bool offload_goes_on(const struct segment *first, u32 payload, const struct segment *next);

/* Whether the checksums of the IPv4 header, and of TCP or UDP in it, are right: 1, 0; -1: there is none, or it is not looked at, as of
 * fragments and of headers with options. */
void offload_check(const u8 *frame, size_t length, int *ip, int *transport);

/* For Python. */
PyObject *offload_segments(PyObject *module, PyObject *args);
PyObject *offload_insert(PyObject *module, PyObject *args);
PyObject *offload_found(PyObject *module, PyObject *frame);

#endif
