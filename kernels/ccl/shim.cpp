// The collectives of oneCCL on CPUs behind plain C functions, for Python and for compiled code that runs a model.
// Built on the user's machine against the static library of the oneccl-devel package (see build.py).
//
// oneCCL adds in an order of its own and cannot tell two different calls from one another. So every call begins with
// an exchange of envelopes of one size, each a header and the first bytes of the data: small calls end with it. The
// sum over the ranks is done here, in the order that the caller brings.
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <exception>
#include <memory>
#include <oneapi/ccl.hpp>
#include <string>
#include <vector>

#define DLB_CCL_API extern "C" __attribute__((visibility("default")))

// The static library calls a profiler through these, which a program that has none must provide; null: not profiled.
#define DLB_NO_PROFILER(hook) void* __itt_##hook##_ptr__3_0 = nullptr;
extern "C" {
DLB_NO_PROFILER(domain_create)
DLB_NO_PROFILER(event_create)
DLB_NO_PROFILER(event_end)
DLB_NO_PROFILER(event_start)
DLB_NO_PROFILER(metadata_add)
DLB_NO_PROFILER(string_handle_create)
DLB_NO_PROFILER(task_begin)
DLB_NO_PROFILER(task_end)
DLB_NO_PROFILER(thread_set_name)
}

namespace {

enum Status { kOk = 0, kGivenUp = 1, kMismatch = 2, kError = 3 };
enum Op { kAllReduce = 1, kAllGather = 2, kBroadcast = 3, kBarrier = 4 };

constexpr size_t kInside = 16 * 1024;  // bytes of data in an envelope: a row of 4096 fp32 numbers
constexpr size_t kSmall = 256 * 1024;  // up to here each rank adds everything, above each adds one slice
constexpr int kBytes = 3;              // the "dtype" of calls that only move bytes
constexpr int64_t kLook = 20000000;    // nanoseconds of waiting between two looks at the peers
constexpr int kYields = 2000;          // turns of waiting before the core is offered to others
constexpr int kNaps = 4000;            // turns before the thread sleeps in between

// The same fields as in Python's HEADER.
struct Header {
    uint64_t number;
    uint64_t count;
    int32_t op;
    int32_t dtype;
    int32_t source;
    int32_t rank;
};

struct Envelope {
    Header header;
    char inside[kInside];
};

using TreeSum = void (*)(const int8_t* program, int length, const void* const* sources, void* dst, size_t count,
                         int dtype, int scalar);
// Called while a call waits, with its number and the seconds so far; anything but 0 gives the call up.
using Look = int (*)(uint64_t number, double waited);

using Kvs = ccl::shared_ptr_class<ccl::kvs>;

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

size_t width(int dtype) { return dtype == 0 ? 4 : dtype == kBytes ? 1 : 2; }

thread_local std::string last_error;

// What oneCCL started cannot be called back, and its static objects abort a process that ends in the middle.
void end_at_once(int status, void*) {
    fflush(nullptr);
    _exit(status);
}

}  // namespace

struct dlb_ccl {
    std::unique_ptr<ccl::communicator> comm;
    Kvs kvs;
    int rank;
    int size;
    TreeSum sum;
    Look look;
    std::vector<int8_t> program;
    uint64_t number = 0;
    int failed = kOk;
    Header fault = {};
    std::vector<Envelope> envelopes;  // own, then everyone's
    std::vector<char> scratch;
    std::vector<char> slice;
};

namespace {

int fail(dlb_ccl* g, int status) {
    if (g->failed == kOk) on_exit(end_at_once, nullptr);
    return g->failed = status;
}

int wait(dlb_ccl* g, ccl::event event) {
    if (event.test()) return kOk;
    const int64_t began = now();
    int64_t looked = began;
    // The clock at every turn: a test during which oneCCL cannot reach a peer that is gone may take milliseconds.
    for (int turn = 0;; turn++) {
        if (event.test()) return kOk;
        const int64_t t = now();
        if (t - looked >= kLook) {
            looked = t;
            if (g->look(g->number, double(t - began) * 1e-9)) {
                new ccl::event(std::move(event));  // oneCCL still works on it: it must not be destroyed
                return fail(g, kGivenUp);
            }
        }
        if (turn >= kNaps) {
            const timespec nap = {0, 50000};
            nanosleep(&nap, nullptr);
        } else if (turn >= kYields) {
            sched_yield();
        }
    }
}

// Run `call` (which returns a status) if the group is whole; an exception of oneCCL ends the group.
template <class Call>
int guarded(dlb_ccl* g, Call call) {
    if (g->failed != kOk) return g->failed;
    try {
        return call();
    } catch (const std::exception& error) {
        last_error = error.what();
        return fail(g, kError);
    }
}

ccl::vector_class<size_t> sizes(const uint64_t* counts, int n) { return ccl::vector_class<size_t>(counts, counts + n); }

// Exchange envelopes; `counts` has each rank's count where these may differ. `data` goes inside where it fits.
int announce(dlb_ccl* g, Op op, int dtype, uint64_t count, int source, const uint64_t* counts, const void* data) {
    Envelope* own = &g->envelopes[0];
    own->header = Header{++g->number, count, op, dtype, source, g->rank};
    const size_t bytes = size_t(count) * width(dtype);
    if (data && bytes && bytes <= kInside) memcpy(own->inside, data, bytes);
    const ccl::vector_class<size_t> each(size_t(g->size), sizeof(Envelope));
    const int status =
        wait(g, ccl::allgatherv(own, sizeof(Envelope), &g->envelopes[1], each, ccl::datatype::uint8, *g->comm));
    if (status != kOk) return status;
    for (int p = 0; p < g->size; p++) {
        const Header& theirs = g->envelopes[size_t(1 + p)].header;
        const uint64_t expected = counts ? counts[p] : count;
        if (theirs.number == g->number && theirs.op == op && theirs.dtype == dtype && theirs.source == source &&
            theirs.count == expected)
            continue;
        g->fault = theirs;
        return fail(g, kMismatch);
    }
    return kOk;
}

char* inside(dlb_ccl* g, int rank) { return g->envelopes[size_t(1 + rank)].inside; }

char* grown(std::vector<char>& buffer, size_t bytes) {
    if (buffer.size() < bytes) buffer.resize(bytes);
    return buffer.data();
}

void add(dlb_ccl* g, const std::vector<const void*>& sources, void* out, size_t count, int dtype) {
    g->sum(g->program.data(), int(g->program.size()), sources.data(), out, count, dtype, 0);
}

int reduce_whole(dlb_ccl* g, char* data, uint64_t count, int dtype, bool enclosed) {
    const size_t bytes = size_t(count) * width(dtype);
    char* all = enclosed ? nullptr : grown(g->scratch, bytes * size_t(g->size));
    if (!enclosed) {
        const ccl::vector_class<size_t> each(size_t(g->size), bytes);
        const int status = wait(g, ccl::allgatherv(data, bytes, all, each, ccl::datatype::uint8, *g->comm));
        if (status != kOk) return status;
    }
    std::vector<const void*> sources;
    for (int p = 0; p < g->size; p++) sources.push_back(enclosed ? inside(g, p) : all + bytes * size_t(p));
    add(g, sources, data, count, dtype);
    return kOk;
}

// Everyone gets its slice from everyone, adds, and sends the sum to everyone.
int reduce_slices(dlb_ccl* g, char* data, uint64_t count, int dtype) {
    const size_t n = size_t(g->size), w = width(dtype), share = size_t(count) / n;
    ccl::vector_class<size_t> all(n, share * w);
    all[n - 1] = (size_t(count) - share * (n - 1)) * w;
    const size_t own = all[size_t(g->rank)];
    const ccl::vector_class<size_t> mine(n, own);
    char* parts = grown(g->scratch, own * n);
    int status = wait(g, ccl::alltoallv(data, all, parts, mine, ccl::datatype::uint8, *g->comm));
    if (status != kOk) return status;
    std::vector<const void*> sources;
    for (size_t p = 0; p < n; p++) sources.push_back(parts + own * p);
    char* total = grown(g->slice, own);
    add(g, sources, total, own / w, dtype);
    status = wait(g, ccl::allgatherv(total, own, data, all, ccl::datatype::uint8, *g->comm));
    return status;
}

int all_reduce(dlb_ccl* g, char* data, uint64_t count, int dtype) {
    const size_t bytes = size_t(count) * width(dtype);
    const int status = announce(g, kAllReduce, dtype, count, 0, nullptr, data);
    if (status != kOk || !bytes) return status;
    return bytes <= kSmall ? reduce_whole(g, data, count, dtype, bytes <= kInside)
                           : reduce_slices(g, data, count, dtype);
}

int all_gather(dlb_ccl* g, const char* own, char* out, const uint64_t* bytes) {
    uint64_t most = 0;
    for (int p = 0; p < g->size; p++) most = bytes[p] > most ? bytes[p] : most;
    const uint64_t mine = bytes[g->rank];
    const int status = announce(g, kAllGather, kBytes, mine, 0, bytes, own);
    if (status != kOk || !most) return status;
    if (most > kInside)
        return wait(g, ccl::allgatherv(own, mine, out, sizes(bytes, g->size), ccl::datatype::uint8, *g->comm));
    for (int p = 0; p < g->size; out += bytes[p], p++)
        if (bytes[p]) memcpy(out, inside(g, p), bytes[p]);
    return kOk;
}

int broadcast(dlb_ccl* g, char* data, uint64_t bytes, int source) {
    const int status = announce(g, kBroadcast, kBytes, bytes, source, nullptr, g->rank == source ? data : nullptr);
    if (status != kOk || !bytes) return status;
    if (bytes > kInside) return wait(g, ccl::broadcast(data, bytes, ccl::datatype::uint8, source, *g->comm));
    if (g->rank != source) memcpy(data, inside(g, source), bytes);
    return kOk;
}

ccl::datatype datatype(int dtype) {
    return dtype == 0 ? ccl::datatype::float32 : dtype == 1 ? ccl::datatype::bfloat16 : ccl::datatype::float16;
}

template <class Call>
void* made(Call call) {
    try {
        return call();
    } catch (const std::exception& error) {
        last_error = error.what();
        return nullptr;
    }
}

}  // namespace

DLB_CCL_API int dlb_ccl_address_bytes(void) { return int(ccl::kvs::address_max_size); }

// Open the meeting place of a group and write its address, or join one; null on failure.
DLB_CCL_API void* dlb_ccl_open(char* address) {
    return made([&] {
        ccl::init();
        Kvs kvs = ccl::create_main_kvs();
        const ccl::kvs::address_type place = kvs->get_address();
        memcpy(address, place.data(), place.size());
        return new Kvs(kvs);
    });
}

DLB_CCL_API void* dlb_ccl_join(const char* address) {
    return made([&] {
        ccl::init();
        ccl::kvs::address_type place;
        memcpy(place.data(), address, place.size());
        return new Kvs(ccl::create_kvs(place));
    });
}

// Connect the ranks; all call it together, and it waits for them. Takes the kvs over. `program` is the order of the sum
// in postfix. Null on failure.
DLB_CCL_API dlb_ccl* dlb_ccl_create(void* kvs, int rank, int size, TreeSum sum, const int8_t* program, int length,
                                    Look look) {
    std::unique_ptr<Kvs> place(static_cast<Kvs*>(kvs));
    return static_cast<dlb_ccl*>(made([&] {
        std::unique_ptr<dlb_ccl> g(new dlb_ccl());
        g->comm.reset(new ccl::communicator(ccl::create_communicator(size, rank, *place)));
        g->kvs = *place;
        g->rank = rank;
        g->size = size;
        g->sum = sum;
        g->look = look;
        g->program.assign(program, program + length);
        g->envelopes.resize(size_t(size) + 1);
        return g.release();
    }));
}

// The collectives: 0, or a Status and the group is lost.
DLB_CCL_API int dlb_ccl_all_reduce(dlb_ccl* g, void* data, uint64_t count, int dtype) {
    return guarded(g, [&] { return all_reduce(g, static_cast<char*>(data), count, dtype); });
}

// As oneCCL adds, in whatever order; nothing is checked first.
DLB_CCL_API int dlb_ccl_all_reduce_native(dlb_ccl* g, void* data, uint64_t count, int dtype) {
    return guarded(
        g, [&] { return wait(g, ccl::allreduce(data, data, count, datatype(dtype), ccl::reduction::sum, *g->comm)); });
}

DLB_CCL_API int dlb_ccl_all_gather(dlb_ccl* g, const void* own, void* out, const uint64_t* bytes) {
    return guarded(g, [&] { return all_gather(g, static_cast<const char*>(own), static_cast<char*>(out), bytes); });
}

DLB_CCL_API int dlb_ccl_broadcast(dlb_ccl* g, void* data, uint64_t bytes, int source) {
    return guarded(g, [&] { return broadcast(g, static_cast<char*>(data), bytes, source); });
}

DLB_CCL_API int dlb_ccl_barrier(dlb_ccl* g) {
    return guarded(g, [&] { return announce(g, kBarrier, kBytes, 0, 0, nullptr, nullptr); });
}

// The two functions of struct dlb_collective (kernels/cpu/collective.h).
DLB_CCL_API int dlb_ccl_collective_all_reduce(void* context, float* data, int64_t count) {
    return dlb_ccl_all_reduce(static_cast<dlb_ccl*>(context), data, uint64_t(count), 0);
}

DLB_CCL_API int dlb_ccl_collective_all_gather(void* context, const float* own, float* out, const int64_t* counts) {
    dlb_ccl* g = static_cast<dlb_ccl*>(context);
    std::vector<uint64_t> bytes;
    for (int p = 0; p < g->size; p++) bytes.push_back(uint64_t(counts[p]) * sizeof(float));
    return dlb_ccl_all_gather(g, own, out, bytes.data());
}

// How the group was lost: its Status, and with kMismatch the header of the rank that made another call.
DLB_CCL_API int dlb_ccl_fault(const dlb_ccl* g, Header* header) {
    *header = g->fault;
    return g->failed;
}

DLB_CCL_API const char* dlb_ccl_error(void) { return last_error.c_str(); }

// Give the group up; the process then ends without oneCCL's clean-up.
DLB_CCL_API void dlb_ccl_leave(dlb_ccl* g) {
    if (g->failed == kOk) fail(g, kGivenUp);
}

DLB_CCL_API void dlb_ccl_close(dlb_ccl* g) {
    if (g->failed == kOk) delete g;  // else oneCCL still works on its buffers
}
