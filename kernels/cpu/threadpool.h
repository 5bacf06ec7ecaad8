// One pool per process. A loop is cut into tasks that the caller and the workers take one by one.
#pragma once

#include <stdint.h>

namespace dlb {

using TaskFn = void (*)(void* context, int64_t begin, int64_t end);

// How a loop reaches the threads.
enum class Deal {
    kInOrder,  // pieces in order, by whoever is free
    kStreams,  // each thread a range of its own, one stream of memory, and then what is left of the others'
};

// Run fn over [0, count) in pieces of at most `grain`, smaller ones at last; returns when all are done.
// Within a task, or while another thread's loop is running, the caller does everything itself: no deadlock.
void parallel_for(int64_t count, int64_t grain, TaskFn fn, void* context, Deal deal);

// The same for a callable `body(begin, end)`.
template <class Body>
void parallel(int64_t count, int64_t grain, Body& body, Deal deal = Deal::kInOrder) {
    parallel_for(
        count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
        &body, deal);
}

int thread_count();

}  // namespace dlb
