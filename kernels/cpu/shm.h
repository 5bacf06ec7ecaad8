// Collectives of the ranks of one machine over one shared segment.
//
// The caller brings the segment (a file descriptor), the peers' pids and the order of summation; this file
// knows nothing of names, sockets or models. Every function of one handle is called by one thread at a time,
// and by all ranks in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "collective.h"

#define DLB_SHM_API __attribute__((visibility("default")))

extern "C" {

struct dlb_shm;

enum dlb_shm_status : int {
    DLB_SHM_OK = 0,
    DLB_SHM_AGAIN = 1,  // still waiting: call again with the same arguments (lets the caller look at signals)
    DLB_SHM_FAULT = 2,  // the group is lost: see dlb_shm_fault; every later call returns this
};

enum dlb_shm_dtype : int { DLB_SHM_FP32 = 0, DLB_SHM_BF16 = 1, DLB_SHM_FP16 = 2 };

enum dlb_shm_op : int { DLB_SHM_ALL_REDUCE = 1, DLB_SHM_ALL_GATHER = 2, DLB_SHM_BROADCAST = 3, DLB_SHM_BARRIER = 4 };

enum dlb_shm_fault_kind : int {
    DLB_SHM_DEAD = 1,      // the rank's process has ended
    DLB_SHM_SILENT = 2,    // the rank did not come within the timeout
    DLB_SHM_MISMATCH = 3,  // the rank made another call
    DLB_SHM_CLOSED = 4,    // the rank has closed its group
    DLB_SHM_LEFT = 5,      // the rank was interrupted in the middle of a call
};

// What went wrong, as this rank saw it. `reporter` noticed it first (this rank, or a peer that gave up earlier).
struct dlb_shm_fault_info {
    int32_t kind;
    int32_t rank;
    int32_t reporter;
    int32_t op;  // the call that `rank` made, for DLB_SHM_MISMATCH
    int32_t dtype;
    int32_t source;
    uint64_t count;
};

enum { DLB_SHM_MAX_RANKS = 16 };

// Bytes of one rank's region; the segment holds `size` of them, rank r's at r times this. A multiple of the page.
DLB_SHM_API uint64_t dlb_shm_region_bytes(void);

// Map the segment `fd` and return a handle, or null with an errno in *error. The segment is at least
// size * dlb_shm_region_bytes() long and zero. pids and pidfds have one entry per rank (pidfd -1: none, then
// /proc is asked); the handle takes the pidfds over. `program` is the order of summation in postfix: a rank's
// number, or -1 for "add the last two".
DLB_SHM_API dlb_shm* dlb_shm_attach(int fd, int rank, int size, const int32_t* pids, const int32_t* pidfds,
                                    const int8_t* program, int program_length, int* error);

// The collectives, resumable: they return DLB_SHM_AGAIN after about 100 ms of waiting. `timeout` (seconds) bounds
// the silence of a peer, not the call.
DLB_SHM_API int dlb_shm_try_all_reduce(dlb_shm* group, void* data, size_t count, int dtype, double timeout);
DLB_SHM_API int dlb_shm_try_all_gather(dlb_shm* group, const void* own, void* out, const uint64_t* bytes,
                                       double timeout);
DLB_SHM_API int dlb_shm_try_broadcast(dlb_shm* group, void* data, uint64_t bytes, int source, double timeout);
DLB_SHM_API int dlb_shm_try_barrier(dlb_shm* group, double timeout);

// Sum data[0, count) over all ranks in place and return when it is done: DLB_SHM_OK or DLB_SHM_FAULT.
DLB_SHM_API int dlb_shm_all_reduce(dlb_shm* group, float* data, size_t count, double timeout);

// Fill in the table through which compiled code calls this group; `timeout` as above. Valid until dlb_shm_close.
DLB_SHM_API void dlb_shm_collective(dlb_shm* group, double timeout, dlb_collective* out);

DLB_SHM_API void dlb_shm_fault(const dlb_shm* group, dlb_shm_fault_info* info);

// Give the group up in the middle of a call, so that the peers do not wait for the timeout.
DLB_SHM_API void dlb_shm_leave(dlb_shm* group);

// Tell the peers, unmap, close the pidfds and free the handle.
DLB_SHM_API void dlb_shm_close(dlb_shm* group);

// The reduction alone, for tests: dst = sum of the sources in the program's order; `scalar` keeps to baseline code.
DLB_SHM_API void dlb_shm_tree_sum(const int8_t* program, int program_length, const void* const* sources, void* dst,
                                  size_t count, int dtype, int scalar);
}
