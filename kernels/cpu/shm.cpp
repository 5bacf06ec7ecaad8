// See shm.h. One call is one or more rounds. In a round each rank writes into its own region, publishes the
// round's number and waits until all have published it; then it reads the peers' regions.
//
// Everything is doubled by the parity of the round, so one synchronisation per round is enough: a rank writes
// buffer s & 1 again in round s + 2, which it reaches only after all have published s + 1, and a rank publishes
// s + 1 only when it has read all of round s.
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <new>

#include "threadpool.h"
#include "tree_sum.h"

namespace {

constexpr size_t kLine = 64;
constexpr size_t kChunk = 256 * 1024;   // bytes a rank publishes in one round: all of it stays in the L2 cache
constexpr size_t kResult = kChunk / 2;  // the largest slice, that of two ranks
constexpr size_t kSmall = 256 * 1024;   // of all ranks together, for which one round (each adds all) beats two
constexpr size_t kPiece = 8 * 1024;     // bytes of a sum that go on to the peers while the L1 cache has them
constexpr size_t kControl = 4096;
constexpr size_t kRegion = kControl + 2 * (kChunk + kResult);
constexpr size_t kThreads = 1 << 20;  // from here on threads share the work
constexpr size_t kGrain = 16 * 1024;  // bytes that a thread takes at a time
constexpr int kMaxRanks = DLB_SHM_MAX_RANKS;
constexpr int kMaxProgram = 2 * kMaxRanks;
constexpr int kBytes = 3;  // the "dtype" of calls that move bytes

constexpr int64_t kMillisecond = 1000000;
constexpr int64_t kSlice = 20 * kMillisecond;    // one sleep
constexpr int64_t kLook = 50 * kMillisecond;     // between two looks at the peers' health
constexpr int64_t kReturn = 100 * kMillisecond;  // after this the caller gets a chance to see its signals

struct Header {
    uint64_t count;
    uint32_t round;
    uint8_t op;
    uint8_t dtype;
    int16_t source;
};

enum State : uint32_t { kRunning = 0, kClosed = 1, kFailed = 2 };

// The first line is all that a peer reads in the fast path; only the owner writes it.
struct Control {
    alignas(128) std::atomic<uint32_t> published;
    Header headers[2];
    alignas(128) std::atomic<uint32_t> sleepers;  // peers that wait on `published` in the kernel
    std::atomic<uint32_t> state;
    std::atomic<int32_t> fault_kind;
    std::atomic<int32_t> fault_rank;
    alignas(128) cpu_set_t cpus;
    uint32_t cpus_known;
};
static_assert(sizeof(Control) <= kControl, "control block");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared atomics");

}  // namespace

struct dlb_shm {
    char* base;
    size_t bytes;
    int rank;
    int size;
    uint32_t round;  // the last round that this rank published
    bool published;  // the current round is published and not yet read
    size_t step;     // round within the call
    int64_t waiting_since;
    int64_t looked;
    int spins;
    int yields;
    bool probed;
    bool failed;
    dlb_shm_fault_info fault;
    double collective_timeout;  // of calls through dlb_collective
    uint64_t waited;            // ticks spent until the last rank had come
    int32_t pids[kMaxRanks];
    int32_t pidfds[kMaxRanks];
    int8_t program[kMaxProgram];
    int program_length;
};

namespace {

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// memcpy does not take null, not even for nothing; empty tensors have null pointers.
void copy(void* to, const void* from, size_t n) {
    if (n) memcpy(to, from, n);
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, int64_t nanoseconds) {
    timespec t = {time_t(nanoseconds / 1000000000), long(nanoseconds % 1000000000)};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &t, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
}

// ---- rounds ---------------------------------------------------------------------------------------------------

Control* control(const dlb_shm* g, int rank) { return reinterpret_cast<Control*>(g->base + size_t(rank) * kRegion); }

char* input(const dlb_shm* g, int rank, uint32_t round) {
    return g->base + size_t(rank) * kRegion + kControl + (round & 1) * kChunk;
}

char* result(const dlb_shm* g, int rank, uint32_t round) {
    return g->base + size_t(rank) * kRegion + kControl + 2 * kChunk + (round & 1) * kResult;
}

// A peer is at most one round ahead, so the difference is small and the numbers may wrap.
bool reached(const dlb_shm* g, int rank) {
    return int32_t(control(g, rank)->published.load(std::memory_order_acquire) - g->round) >= 0;
}

void publish(dlb_shm* g, int op, int dtype, uint64_t count, int source) {
    Control* own = control(g, g->rank);
    const uint32_t round = ++g->round;
    own->headers[round & 1] = Header{count, round, uint8_t(op), uint8_t(dtype), int16_t(source)};
    // Sequentially consistent with the sleepers' count: either we see the sleeper or it sees our number.
    own->published.store(round, std::memory_order_seq_cst);
    if (own->sleepers.load(std::memory_order_seq_cst)) futex_wake(&own->published);
    g->published = true;
    g->waiting_since = 0;
}

int fail(dlb_shm* g, int kind, int rank, int reporter) {
    Control* own = control(g, g->rank);
    g->failed = true;
    g->fault.kind = kind;
    g->fault.rank = rank;
    g->fault.reporter = reporter;
    own->fault_kind.store(kind, std::memory_order_relaxed);
    own->fault_rank.store(rank, std::memory_order_relaxed);
    own->state.store(kFailed, std::memory_order_release);
    futex_wake(&own->published);
    return DLB_SHM_FAULT;
}

// kill(pid, 0) succeeds on a zombie, a pidfd tells; without pidfds the state in /proc does.
bool ended(const dlb_shm* g, int rank) {
    if (g->pidfds[rank] >= 0) {
        pollfd p = {g->pidfds[rank], POLLIN, 0};
        return poll(&p, 1, 0) == 1;
    }
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", g->pids[rank]);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return true;
    text[n] = 0;
    const char* name_end = strrchr(text, ')');
    return name_end && (name_end[2] == 'Z' || name_end[2] == 'X');
}

// Look at the peers that are late; true if one of them will never come.
bool anyone_gone(dlb_shm* g) {
    for (int p = 0; p < g->size; p++) {
        if (p == g->rank || reached(g, p)) continue;
        Control* peer = control(g, p);
        const uint32_t state = peer->state.load(std::memory_order_acquire);
        const bool dead = ended(g, p);
        if (reached(g, p)) continue;  // it published and went between our two looks
        if (state == kFailed) {
            fail(g, peer->fault_kind.load(std::memory_order_relaxed), peer->fault_rank.load(std::memory_order_relaxed),
                 p);
            return true;
        }
        if (state == kClosed || dead) {
            fail(g, state == kClosed ? DLB_SHM_CLOSED : DLB_SHM_DEAD, p, g->rank);
            return true;
        }
    }
    return false;
}

int sleep_for(dlb_shm* g, int p, double timeout) {
    Control* peer = control(g, p);
    const int64_t entered = now();
    if (!g->waiting_since) g->waiting_since = g->looked = entered;
    for (;;) {
        peer->sleepers.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = peer->published.load(std::memory_order_seq_cst);
        if (int32_t(seen - g->round) < 0) futex_wait(&peer->published, seen, kSlice);
        peer->sleepers.fetch_sub(1, std::memory_order_relaxed);
        if (reached(g, p)) return DLB_SHM_OK;
        const int64_t t = now();
        const bool late = double(t - g->waiting_since) * 1e-9 > timeout;
        if (late || t - g->looked >= kLook || peer->state.load(std::memory_order_relaxed) != kRunning) {
            g->looked = t;
            if (anyone_gone(g)) return DLB_SHM_FAULT;
        }
        if (late) return reached(g, p) ? DLB_SHM_OK : fail(g, DLB_SHM_SILENT, p, g->rank);
        if (t - entered >= kReturn) return DLB_SHM_AGAIN;
    }
}

// With fewer cores than ranks spinning only keeps the peer from running. Every mask is in place once all have
// published their first round.
void probe_cores(dlb_shm* g) {
    cpu_set_t all;
    CPU_ZERO(&all);
    bool known = true;
    for (int p = 0; p < g->size; p++) {
        const Control* peer = control(g, p);
        known = known && peer->cpus_known;
        CPU_OR(&all, &all, &peer->cpus);
    }
    if (known && CPU_COUNT(&all) < g->size) {
        g->spins = 20;
        g->yields = 50;
    }
    g->probed = true;
}

// Wait until every rank has published the current round, and check that all make the same call. `expected` has the
// count of each rank where these may differ.
int wait_all(dlb_shm* g, const uint64_t* expected, double timeout) {
    for (int i = 1; i < g->size; i++) {
        const int p = (g->rank + i) % g->size;
        bool here = reached(g, p);
        if (here) continue;
        const uint64_t since = __builtin_ia32_rdtsc();
        for (int n = 0; n < g->spins && !here; n++) {
            _mm_pause();
            here = reached(g, p);
        }
        for (int n = 0; n < g->yields && !here; n++) {
            sched_yield();
            here = reached(g, p);
        }
        const int status = here ? int(DLB_SHM_OK) : sleep_for(g, p, timeout);
        g->waited += __builtin_ia32_rdtsc() - since;
        if (status != DLB_SHM_OK) return status;
    }
    const Header& own = control(g, g->rank)->headers[g->round & 1];
    for (int p = 0; p < g->size; p++) {
        const Header theirs = control(g, p)->headers[g->round & 1];
        const uint64_t count = expected ? expected[p] : own.count;
        if (theirs.op == own.op && theirs.dtype == own.dtype && theirs.source == own.source && theirs.count == count)
            continue;
        g->fault.op = theirs.op;
        g->fault.dtype = theirs.dtype;
        g->fault.source = theirs.source;
        g->fault.count = theirs.count;
        return fail(g, DLB_SHM_MISMATCH, p, g->rank);
    }
    if (!g->probed) probe_cores(g);
    g->published = false;
    return DLB_SHM_OK;
}

int finish(dlb_shm* g) {
    g->step = 0;
    return DLB_SHM_OK;
}

size_t least(size_t a, size_t b) { return a < b ? a : b; }

// ---- all-reduce -----------------------------------------------------------------------------------------------

int reduce_small(dlb_shm* g, char* data, size_t count, int dtype, double timeout) {
    if (!g->published) {
        copy(input(g, g->rank, g->round + 1), data, count * dlb::tree_width(dtype));
        publish(g, DLB_SHM_ALL_REDUCE, dtype, count, 0);
    }
    const int status = wait_all(g, nullptr, timeout);
    if (status != DLB_SHM_OK) return status;
    const void* sources[kMaxRanks];
    for (int p = 0; p < g->size; p++) sources[p] = p == g->rank ? data : input(g, p, g->round);
    dlb::tree_sum(g->program, g->program_length, sources, data, count, dtype);
    return finish(g);
}

// Slices are cut at cache lines.
size_t slice_start(const dlb_shm* g, int rank, size_t bytes) {
    const size_t lines = (bytes + kLine - 1) / kLine;
    return least(bytes, lines * size_t(rank) / size_t(g->size) * kLine);
}

size_t most(size_t a, size_t b) { return a > b ? a : b; }

// What a rank does between two synchronisations: it adds its slice of chunk k, takes the peers' sums of chunk k - 1
// and puts its numbers of chunk k + 1. All of it is independent, so threads take pieces of it line by line.
struct Turn {
    dlb_shm* g;
    char* data;
    size_t bytes;
    int dtype;
    size_t k;
    size_t lines[3];  // of adding, taking, putting

    size_t size_of(size_t chunk) const { return chunk * kChunk < bytes ? least(kChunk, bytes - chunk * kChunk) : 0; }

    // The sum of a slice is published with the next round, hence the next round's buffer.
    void add(size_t begin, size_t end) const {
        const size_t slice = slice_start(g, g->rank, size_of(k)), stop = slice_start(g, g->rank + 1, size_of(k));
        const size_t from = slice + begin * kLine, to = least(stop, slice + end * kLine);
        char* chunk = data + k * kChunk;
        const void* sources[kMaxRanks];
        for (int p = 0; p < g->size; p++) sources[p] = (p == g->rank ? chunk : input(g, p, g->round)) + from;
        char* out = result(g, g->rank, g->round + 1) + (from - slice);
        for (size_t at = from; at < to; at += kPiece) {
            const size_t n = least(kPiece, to - at);
            dlb::tree_sum(g->program, g->program_length, sources, chunk + at, n / dlb::tree_width(dtype), dtype);
            copy(out + (at - from), chunk + at, n);
            for (int p = 0; p < g->size; p++) sources[p] = static_cast<const char*>(sources[p]) + n;
        }
    }

    void take(size_t begin, size_t end) const {
        const size_t size = size_of(k - 1);
        char* chunk = data + (k - 1) * kChunk;
        for (int i = 1; i < g->size; i++) {
            const int p = (g->rank + i) % g->size;
            const size_t slice = slice_start(g, p, size);
            const size_t from = most(slice, begin * kLine), to = least(slice_start(g, p + 1, size), end * kLine);
            if (from < to) copy(chunk + from, result(g, p, g->round) + (from - slice), to - from);
        }
    }

    // All but this rank's own slice, which nobody else reads.
    void put(size_t begin, size_t end, uint32_t round) const {
        const size_t size = size_of(k + 1), from = begin * kLine, to = least(size, end * kLine);
        const size_t slice = slice_start(g, g->rank, size), stop = slice_start(g, g->rank + 1, size);
        const char* chunk = data + (k + 1) * kChunk;
        char* out = input(g, g->rank, round);
        if (from < least(to, slice)) copy(out + from, chunk + from, least(to, slice) - from);
        if (most(from, stop) < to) copy(out + most(from, stop), chunk + most(from, stop), to - most(from, stop));
    }

    void operator()(int64_t begin, int64_t end) const {
        size_t at = size_t(begin);
        size_t first = 0;
        for (int part = 0; part < 3; first += lines[part++]) {
            const size_t stop = least(size_t(end), first + lines[part]);
            if (at >= stop) continue;
            if (part == 0) add(at - first, stop - first);
            if (part == 1) take(at - first, stop - first);
            if (part == 2) put(at - first, stop - first, g->round + 1);
            at = stop;
        }
    }
};

void run_turn(dlb_shm* g, char* data, size_t bytes, int dtype, size_t k) {
    Turn turn = {g, data, bytes, dtype, k, {0, 0, 0}};
    const size_t own = slice_start(g, g->rank + 1, turn.size_of(k)) - slice_start(g, g->rank, turn.size_of(k));
    turn.lines[0] = (own + kLine - 1) / kLine;
    turn.lines[1] = k ? (turn.size_of(k - 1) + kLine - 1) / kLine : 0;
    turn.lines[2] = (turn.size_of(k + 1) + kLine - 1) / kLine;
    const int64_t count = int64_t(turn.lines[0] + turn.lines[1] + turn.lines[2]);
    const bool alone = bytes < kThreads;
    dlb::parallel(count, alone ? count : int64_t(kGrain / kLine), turn);
}

// Chunk k travels in round k and its sum in round k + 1, together with chunk k + 1.
int reduce_large(dlb_shm* g, char* data, size_t count, int dtype, double timeout) {
    const size_t bytes = count * dlb::tree_width(dtype), chunks = (bytes + kChunk - 1) / kChunk;
    for (;; g->step++) {
        const size_t k = g->step;
        if (!g->published) {
            const Turn first = {g, data, bytes, dtype, size_t(-1), {0, 0, 0}};  // puts chunk 0
            if (k == 0) first.put(0, kChunk / kLine, g->round + 1);
            publish(g, DLB_SHM_ALL_REDUCE, dtype, count, 0);
        }
        const int status = wait_all(g, nullptr, timeout);
        if (status != DLB_SHM_OK) return status;
        run_turn(g, data, bytes, dtype, k);
        if (k == chunks) return finish(g);
    }
}

int collective_all_reduce(void* context, float* data, int64_t count) {
    dlb_shm* g = static_cast<dlb_shm*>(context);
    return dlb_shm_all_reduce(g, data, size_t(count), g->collective_timeout);
}

int collective_all_gather(void* context, const float* own, float* out, const int64_t* counts) {
    dlb_shm* g = static_cast<dlb_shm*>(context);
    uint64_t bytes[kMaxRanks];
    for (int p = 0; p < g->size; p++) bytes[p] = uint64_t(counts[p]) * sizeof(float);
    int status;
    do status = dlb_shm_try_all_gather(g, own, out, bytes, g->collective_timeout);
    while (status == DLB_SHM_AGAIN);
    return status;
}

}  // namespace

extern "C" {

uint64_t dlb_shm_region_bytes(void) { return kRegion; }

dlb_shm* dlb_shm_attach(int fd, int rank, int size, const int32_t* pids, const int32_t* pidfds, const int8_t* program,
                        int program_length, int* error) {
    *error = EINVAL;
    if (size < 2 || size > kMaxRanks || rank < 0 || rank >= size || program_length > kMaxProgram) return nullptr;
    const size_t bytes = size_t(size) * kRegion;
    struct stat status;
    if (fstat(fd, &status) != 0 || size_t(status.st_size) < bytes) return nullptr;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        *error = errno;
        return nullptr;
    }
    dlb_shm* g = new (std::nothrow) dlb_shm();
    if (!g) {
        munmap(base, bytes);
        *error = ENOMEM;
        return nullptr;
    }
    g->base = static_cast<char*>(base);
    g->bytes = bytes;
    g->rank = rank;
    g->size = size;
    // A few microseconds of spinning, then some hundred of yielding: as quick on a core of one's own, and on a shared
    // one it lets the peer run.
    g->spins = 100;
    g->yields = 300;
    for (int p = 0; p < size; p++) {
        g->pids[p] = pids[p];
        g->pidfds[p] = pidfds[p];
    }
    copy(g->program, program, size_t(program_length));
    g->program_length = program_length;
    Control* own = control(g, rank);
    own->cpus_known = sched_getaffinity(0, sizeof own->cpus, &own->cpus) == 0;
    *error = 0;
    return g;
}

int dlb_shm_try_all_reduce(dlb_shm* g, void* data, size_t count, int dtype, double timeout) {
    if (g->failed) return DLB_SHM_FAULT;
    char* bytes = static_cast<char*>(data);
    return count * dlb::tree_width(dtype) * size_t(g->size) <= kSmall ? reduce_small(g, bytes, count, dtype, timeout)
                                                                      : reduce_large(g, bytes, count, dtype, timeout);
}

int dlb_shm_all_reduce(dlb_shm* g, float* data, size_t count, double timeout) {
    int status;
    do status = dlb_shm_try_all_reduce(g, data, count, DLB_SHM_FP32, timeout);
    while (status == DLB_SHM_AGAIN);
    return status;
}

int dlb_shm_try_all_gather(dlb_shm* g, const void* own, void* out, const uint64_t* bytes, double timeout) {
    if (g->failed) return DLB_SHM_FAULT;
    uint64_t most = 0;
    for (int p = 0; p < g->size; p++) most = bytes[p] > most ? bytes[p] : most;
    for (;; g->step++) {
        const uint64_t start = g->step * kChunk;
        if (!g->published) {
            const uint64_t mine = bytes[g->rank];
            if (start < mine) {
                const char* from = static_cast<const char*>(own) + start;
                copy(input(g, g->rank, g->round + 1), from, least(kChunk, mine - start));
            }
            publish(g, DLB_SHM_ALL_GATHER, kBytes, mine, 0);
        }
        const int status = wait_all(g, bytes, timeout);
        if (status != DLB_SHM_OK) return status;
        char* to = static_cast<char*>(out) + start;
        for (int p = 0; p < g->size; to += bytes[p], p++)
            if (start < bytes[p]) copy(to, input(g, p, g->round), least(kChunk, bytes[p] - start));
        if (start + kChunk >= most) return finish(g);
    }
}

int dlb_shm_try_broadcast(dlb_shm* g, void* data, uint64_t bytes, int source, double timeout) {
    if (g->failed) return DLB_SHM_FAULT;
    for (;; g->step++) {
        const uint64_t start = g->step * kChunk, n = least(kChunk, bytes - start);
        char* part = static_cast<char*>(data) + start;
        if (!g->published) {
            if (g->rank == source) copy(input(g, source, g->round + 1), part, n);
            publish(g, DLB_SHM_BROADCAST, kBytes, bytes, source);
        }
        const int status = wait_all(g, nullptr, timeout);
        if (status != DLB_SHM_OK) return status;
        if (g->rank != source) copy(part, input(g, source, g->round), n);
        if (start + kChunk >= bytes) return finish(g);
    }
}

int dlb_shm_try_barrier(dlb_shm* g, double timeout) {
    if (g->failed) return DLB_SHM_FAULT;
    if (!g->published) publish(g, DLB_SHM_BARRIER, kBytes, 0, 0);
    const int status = wait_all(g, nullptr, timeout);
    return status == DLB_SHM_OK ? finish(g) : status;
}

void dlb_shm_collective(dlb_shm* g, double timeout, dlb_collective* out) {
    g->collective_timeout = timeout;
    *out = dlb_collective{g, g->rank, g->size, collective_all_reduce, collective_all_gather, &g->waited};
}

void dlb_shm_fault(const dlb_shm* g, dlb_shm_fault_info* info) { *info = g->fault; }

void dlb_shm_leave(dlb_shm* g) {
    if (!g->failed) fail(g, DLB_SHM_LEFT, g->rank, g->rank);
}

void dlb_shm_close(dlb_shm* g) {
    Control* own = control(g, g->rank);
    uint32_t running = kRunning;
    own->state.compare_exchange_strong(running, kClosed);
    futex_wake(&own->published);
    munmap(g->base, g->bytes);
    for (int p = 0; p < g->size; p++)
        if (g->pidfds[p] >= 0) close(g->pidfds[p]);
    delete g;
}
}
