// Spin-then-park workers that take pieces of a loop from counters, so nobody waits for a ragged tail and a worker that
// is not scheduled in time holds nobody up: it finds the loop closed and goes back to sleep.
#include "threadpool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "api.h"

namespace dlb {
namespace {

constexpr int kMaxThreads = 1024;
// A worker looks for the next loop this long before it sleeps: a decode step's kernels follow each other within that,
// and another process that wants the core is not held up for more.
constexpr int64_t kSpinNanoseconds = 50000;

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

inline void pause() { __builtin_ia32_pause(); }

// Spin until `changed()`; false when the time is over.
template <class Changed>
bool spin(const Changed& changed) {
    const int64_t deadline = now_ns() + kSpinNanoseconds;
    do {
        for (int i = 0; i < 64; ++i) {
            if (changed()) return true;
            pause();
        }
    } while (now_ns() < deadline);
    return false;
}

// A part of a loop from which threads take pieces, on a line of its own.
struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

struct Pool {
    // The loop in progress: written by its caller while `epoch` is even and `inside` is 0.
    TaskFn fn;
    void* context;
    int64_t grain;
    Deal deal;
    alignas(64) std::atomic<uint32_t> epoch;     // odd while a loop is open
    alignas(64) std::atomic<uint32_t> inside;    // workers that may be reading the loop
    alignas(64) std::atomic<uint32_t> sleepers;  // workers in futex_wait on epoch
    std::atomic<uint32_t> caller_waits;
    std::atomic<bool> busy;  // a caller owns the pool
    std::atomic<bool> stop;
    int threads;  // including the caller
    int started;  // workers that exist in this process
    int cpus[kMaxThreads];
    bool pinned;
    pthread_t workers[kMaxThreads];
    Range ranges[kMaxThreads];  // one of each thread, or one of all
};

Pool pool;  // zero-initialized, never destroyed: workers may outlive main
thread_local bool in_worker = false;

// Round to nearest even and keep subnormals whatever the caller's thread has set: results depend on no thread.
struct DefaultRounding {
    const unsigned saved = __builtin_ia32_stmxcsr();
    DefaultRounding() { __builtin_ia32_ldmxcsr(0x1f80); }
    ~DefaultRounding() { __builtin_ia32_ldmxcsr(saved); }
};

// Run pieces of a range that `sharers` take from, until it is empty: smaller ones towards its end, so that all threads
// come to it at once.
void run_range(Range* range, int sharers) {
    const int64_t grain = pool.grain, end = range->end;
    int64_t begin = range->next.load(std::memory_order_relaxed);
    while (begin < end) {
        const int64_t share = (end - begin) / (2 * sharers) + 1, size = share < grain ? share : grain;
        if (!range->next.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) continue;
        pool.fn(pool.context, begin, begin + size);
        begin = range->next.load(std::memory_order_relaxed);
    }
}

void run_pieces(int thread) {
    const DefaultRounding rounding;
    const int threads = pool.threads;
    if (pool.deal == Deal::kInOrder) return run_range(&pool.ranges[0], threads);
    for (int i = 0; i < threads; ++i) run_range(&pool.ranges[(thread + i) % threads], 1);
}

void cut_ranges(int64_t count) {
    const int ranges = pool.deal == Deal::kInOrder ? 1 : pool.threads;
    for (int i = 0; i < ranges; ++i) {
        pool.ranges[i].next.store(count * i / ranges, std::memory_order_relaxed);
        pool.ranges[i].end = count * (i + 1) / ranges;
    }
}

// Enter the loop of epoch `seen` if it is still open. `inside` is raised before the second look at the epoch, and the
// caller closes the epoch before it looks at `inside`; both are sequentially consistent, so one of them sees the other.
void join_loop(uint32_t seen, int thread) {
    pool.inside.fetch_add(1);
    if (pool.epoch.load() == seen) run_pieces(thread);
    if (pool.inside.fetch_sub(1) == 1 && pool.caller_waits.load()) futex_wake_all(&pool.inside);
}

void* worker_main(void* index) {
    const int thread = static_cast<int>(reinterpret_cast<intptr_t>(index));
    in_worker = true;
    uint32_t done = 0;  // the last epoch taken part in
    while (!pool.stop.load()) {
        uint32_t seen = pool.epoch.load(std::memory_order_acquire);
        if ((seen & 1) && seen != done) {
            join_loop(seen, thread);
            done = seen;
            continue;
        }
        const uint32_t idle = seen;
        if (spin([&] { return pool.epoch.load(std::memory_order_relaxed) != idle; })) continue;
        pool.sleepers.fetch_add(1);
        if (!pool.stop.load()) futex_wait(&pool.epoch, idle);
        pool.sleepers.fetch_sub(1);
    }
    return nullptr;
}

void pin(pthread_t thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);  // best effort: the cpu may have left our set meanwhile
}

void start_workers() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals stay with the threads of Python
    pool.stop.store(false);
    while (pool.started < pool.threads - 1) {
        pthread_t& thread = pool.workers[pool.started];
        void* index = reinterpret_cast<void*>(static_cast<intptr_t>(pool.started + 1));
        if (pthread_create(&thread, nullptr, worker_main, index) != 0) break;
        ++pool.started;
        if (pool.pinned) pin(thread, pool.cpus[pool.started]);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void stop_workers() {
    pool.stop.store(true);
    pool.epoch.fetch_add(2);
    futex_wake_all(&pool.epoch);
    for (int i = 0; i < pool.started; ++i) pthread_join(pool.workers[i], nullptr);
    pool.started = 0;
}

// A child has only the thread that forked: forget the workers (they are started again at the next loop) and whatever
// loop another thread of the parent was in.
void after_fork_in_child() {
    pool.started = 0;
    pool.inside.store(0);
    pool.sleepers.store(0);
    pool.caller_waits.store(0);
    pool.epoch.store((pool.epoch.load() + 2) & ~1u);
    if (!in_worker) pool.busy.store(false);
}

// Workers stay on their cpus, the caller moves: where it sits on a worker's cpu, send it to its own and let it go
// again.
void step_aside() {
    const int here = sched_getcpu();
    bool taken = false;
    for (int i = 1; i < pool.threads; ++i) taken |= pool.cpus[i] == here;
    if (!taken) return;
    cpu_set_t mine, home;
    if (sched_getaffinity(0, sizeof mine, &mine) != 0 || !CPU_ISSET(pool.cpus[0], &mine)) return;
    CPU_ZERO(&home);
    CPU_SET(pool.cpus[0], &home);
    if (sched_setaffinity(0, sizeof home, &home) == 0) sched_setaffinity(0, sizeof mine, &mine);
}

void wait_for_workers() {
    if (spin([] { return pool.inside.load() == 0; })) return;
    pool.caller_waits.store(1);
    while (const uint32_t left = pool.inside.load()) futex_wait(&pool.inside, left);
    pool.caller_waits.store(0);
}

}  // namespace

int thread_count() { return pool.threads > 1 ? pool.threads : 1; }

void parallel_for(int64_t count, int64_t grain, TaskFn fn, void* context, Deal deal) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    if (pool.threads <= 1 || count <= grain || in_worker || pool.busy.exchange(true)) {
        const DefaultRounding rounding;
        fn(context, 0, count);
        return;
    }
    if (pool.started == 0) start_workers();
    if (pool.pinned) step_aside();
    pool.fn = fn;
    pool.context = context;
    pool.grain = grain;
    pool.deal = deal;
    cut_ranges(count);
    pool.epoch.fetch_add(1);
    if (pool.sleepers.load()) futex_wake_all(&pool.epoch);
    run_pieces(0);
    pool.epoch.fetch_add(1);
    wait_for_workers();
    pool.busy.store(false);
}

}  // namespace dlb

DLB_API int dlb_threads_start(int count, const int* cpus, int n_cpus) {
    using dlb::pool;
    if (count < 1 || count > dlb::kMaxThreads || n_cpus < 0) return DLB_BAD_SPEC;
    while (pool.busy.exchange(true)) sched_yield();
    static const int registered = pthread_atfork(nullptr, nullptr, dlb::after_fork_in_child);
    (void)registered;
    dlb::stop_workers();
    pool.threads = count;
    pool.pinned = cpus != nullptr && n_cpus >= count;
    for (int i = 0; pool.pinned && i < count; ++i) pool.cpus[i] = cpus[i];
    if (count > 1) dlb::start_workers();
    pool.busy.store(false);
    return DLB_OK;
}

DLB_API int dlb_threads_count(void) { return dlb::thread_count(); }
