// How compiled code that runs a model talks to the other ranks: a table of functions that the caller fills in.
//
// A null pointer to it stands for a world of one. The functions block, are called from one thread at a time and by all
// ranks in the same order. They return 0, or anything else when the group is lost: the step then ends with a fault
// status of its own, and whoever filled the table in knows what happened. Later calls fail, too.
#pragma once

#include <stdint.h>

extern "C" {

struct dlb_collective {
    void* context;
    int32_t rank;
    int32_t size;
    // Replace data[0, count) by the sum over all ranks, added in the order of the tree: the same bits on every rank.
    int (*all_reduce)(void* context, float* data, int64_t count);
    // Put counts[rank] floats of every rank one after another into out; own holds counts[own rank] and is no part of
    // out.
    int (*all_gather)(void* context, const float* own, float* out, const int64_t* counts);
    // Null, or what the calls so far have spent waiting for other ranks to come, in ticks of the time stamp counter.
    const uint64_t* waited;
};

// Make `runs` all-reduces of data[0, count) one after another, as a decoder would, and put the time of each into
// seconds. Returns 0, or the status of the first that fails.
__attribute__((visibility("default"))) int dlb_collective_time(const dlb_collective* group, float* data, int64_t count,
                                                               int runs, double* seconds);
}
