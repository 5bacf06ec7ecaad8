// Finds what the CPU can do, builds one table per ISA and hands out the active one.
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "api.h"
#include "kernel_table.h"

namespace dlb {
namespace {

struct CpuFeatures {
    bool avx2 = false;
    bool avx_vnni = false;
    bool avx512_vnni = false;
    bool amx = false;
};

#ifdef DLB_EMULATE
constexpr bool kEmulate = true;
#else
constexpr bool kEmulate = false;
#endif

uint64_t xgetbv0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives the registers of tiles (8 KiB a thread) only to a process that asks; all its threads may use them then.
bool tiles_granted() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

CpuFeatures detect() {
    CpuFeatures cpu;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!osxsave) return cpu;
    // The operating system must save the registers too: bits 1, 2 for ymm, 5, 6, 7 for zmm and masks.
    const uint64_t saved = xgetbv0();
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const unsigned leaves = a;
    cpu.avx2 = ymm && fma && f16c && (b & (1u << 5));
    const bool f512 = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
    const bool vnni = c & (1u << 11);
    cpu.avx512_vnni = cpu.avx2 && zmm && f512 && dq && bw && vl && vnni;
    const bool tiles = (saved & 0x60000) == 0x60000, amx_tile = d & (1u << 24), amx_int8 = d & (1u << 25);
    cpu.amx = cpu.avx512_vnni && tiles && amx_tile && amx_int8 && tiles_granted();
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx_vnni = cpu.avx2 && (a & (1u << 4));
    return cpu;
}

// AVX2 stands in for the ISAs above it where they are built in software.
CpuFeatures emulated_by_avx2(CpuFeatures cpu) {
    cpu.avx_vnni = cpu.avx512_vnni = cpu.amx = cpu.avx2;
    return cpu;
}

struct Tables {
    static constexpr int kMax = 16;
    KernelTable table[kMax];
    bool supported[kMax];
    int count = 0;
    std::atomic<int> active{0};

    Tables() {
        const CpuFeatures cpu = kEmulate ? emulated_by_avx2(detect()) : detect();
        KernelTable current;
        memset(&current, 0, sizeof current);
#define DLB_ISA(isa, condition, flags) add(#isa, #isa "_emulated", condition, fill_##isa, current);
#include "isa.def"
#undef DLB_ISA
        (void)cpu;
    }

    void add(const char* name, const char* emulated, bool has, void (*fill)(KernelTable&), KernelTable& current) {
        // An ISA that this CPU lacks is listed and no more: even its fill may be compiled to instructions of that ISA.
        KernelTable next = current;
        next.name = kEmulate && strcmp(name, "scalar") != 0 && strcmp(name, "avx2") != 0 ? emulated : name;
        if (has) fill(next);
        table[count] = next;
        supported[count] = has;
        if (has) {
            current = next;
            active.store(count);
        }
        ++count;
    }
};

Tables& tables() {
    static Tables instance;
    return instance;
}

}  // namespace

const KernelTable& active_table() {
    Tables& all = tables();
    return all.table[all.active.load(std::memory_order_relaxed)];
}

const FloatKernels& float_kernels() { return active_table().floats; }
const KvKernels& kv_kernels() { return active_table().kv; }

}  // namespace dlb

DLB_API int dlb_abi_version(void) { return 6; }

DLB_API int dlb_isa_count(void) { return dlb::tables().count; }

DLB_API const char* dlb_isa_name(int isa) {
    return isa >= 0 && isa < dlb_isa_count() ? dlb::tables().table[isa].name : nullptr;
}

DLB_API int dlb_isa_supported(int isa) { return isa >= 0 && isa < dlb_isa_count() && dlb::tables().supported[isa]; }

DLB_API int dlb_isa_active(void) { return dlb::tables().active.load(); }

DLB_API int dlb_isa_select(int isa) {
    if (!dlb_isa_supported(isa)) return DLB_BAD_SPEC;
    dlb::tables().active.store(isa);
    return DLB_OK;
}
