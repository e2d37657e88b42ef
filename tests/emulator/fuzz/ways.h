/* --ways: host code against the interpreter, with all that only the core can do. */
#ifndef WAYS_H
#define WAYS_H

#include "fuzz.h"

enum { POINT_STOPS, POINT_STEP, POINT_TRACE, POINT_KINDS };
/* Until it is time, or so many finds; how many there were. `first_round`: a find says its round. */
unsigned run_ways(u64 seed, u64 first_round, bool (*is_time)(u64 done), unsigned most);

#endif
