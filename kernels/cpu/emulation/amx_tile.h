// A software AMX: eight tiles per thread, their configuration, and the int8 products, as Intel's instruction set
// reference defines them. What the processor would refuse (#GP, #UD) ends the process with a line that says why.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace dlb {
namespace {
namespace tile {

constexpr int kTiles = 8, kMaxRows = 16, kMaxColumns = 64;  // columns in bytes: palette 1

struct Tile {
    int rows, columns;  // of the configuration; 0: the tile may not be used
    uint8_t data[kMaxRows][kMaxColumns];
};

struct State {
    bool configured;
    Tile tiles[kTiles];
};

inline State& state() {
    static thread_local State mine;
    return mine;
}

[[noreturn]] inline void refuse(const char* why) {
    fprintf(stderr, "software AMX: %s\n", why);
    abort();
}

inline Tile& at(int number) {
    State& s = state();
    if (!s.configured) refuse("a tile instruction before ldtilecfg");
    if (s.tiles[number].rows == 0) refuse("a tile that the configuration leaves out");
    return s.tiles[number];
}

// LDTILECFG: byte 0 palette, 1 start_row, 2-15 zero, 16-31 columns in bytes (two bytes each), 48-55 rows.
inline void load_config(const void* config) {
    uint8_t bytes[64];
    memcpy(bytes, config, sizeof bytes);
    State& s = state();
    memset(&s, 0, sizeof s);
    if (bytes[0] == 0) return;
    if (bytes[0] != 1) refuse("a palette other than 1");
    if (bytes[1] != 0) refuse("start_row is not 0");
    for (int i = 2; i < 16; ++i)
        if (bytes[i] != 0) refuse("reserved bytes of the configuration are not 0");
    for (int i = 16 + 2 * kTiles; i < 48; ++i)
        if (bytes[i] != 0) refuse("columns of tiles that do not exist");
    for (int i = 48 + kTiles; i < 64; ++i)
        if (bytes[i] != 0) refuse("rows of tiles that do not exist");
    for (int t = 0; t < kTiles; ++t) {
        const int columns = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
        if (rows > kMaxRows || columns > kMaxColumns) refuse("a tile larger than 16 rows of 64 bytes");
        if ((rows == 0) != (columns == 0)) refuse("a tile with rows and no columns, or the reverse");
        s.tiles[t].rows = rows;
        s.tiles[t].columns = columns;
    }
    s.configured = true;
}

// TILERELEASE
inline void release() { memset(&state(), 0, sizeof(State)); }

// TILEZERO
inline void zero(int number) { memset(at(number).data, 0, sizeof at(number).data); }

// TILELOADD: rows of memory, `stride` bytes apart; what the configuration leaves out becomes zero.
inline void load(int number, const void* base, int64_t stride) {
    Tile& t = at(number);
    memset(t.data, 0, sizeof t.data);
    for (int r = 0; r < t.rows; ++r)
        memcpy(t.data[r], static_cast<const uint8_t*>(base) + r * stride, static_cast<size_t>(t.columns));
}

// TILESTORED
inline void store(int number, void* base, int64_t stride) {
    const Tile& t = at(number);
    for (int r = 0; r < t.rows; ++r)
        memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[r], static_cast<size_t>(t.columns));
}

template <class Byte>
inline int32_t widened(uint8_t byte) {
    Byte value;
    memcpy(&value, &byte, 1);
    return value;
}

// TDPB[SU][SU]D: c[m][n] += the four products of a's bytes [m][4k ..] and b's bytes [k][4n ..], wrapping at 32 bits.
template <class A, class B>
inline void dot(int c_number, int a_number, int b_number) {
    Tile &c = at(c_number), &a = at(a_number), &b = at(b_number);
    if (c_number == a_number || c_number == b_number || a_number == b_number) refuse("one tile named twice");
    if (a.rows != c.rows) refuse("rows of the left factor and of the sum differ");
    if (b.columns != c.columns) refuse("columns of the right factor and of the sum differ");
    if (a.columns != 4 * b.rows) refuse("the inner dimensions differ");
    for (int m = 0; m < c.rows; ++m)
        for (int n = 0; n < c.columns / 4; ++n) {
            uint32_t sum;
            memcpy(&sum, c.data[m] + 4 * n, 4);
            for (int k = 0; k < b.rows; ++k)
                for (int j = 0; j < 4; ++j)
                    sum += static_cast<uint32_t>(widened<A>(a.data[m][4 * k + j]) * widened<B>(b.data[k][4 * n + j]));
            memcpy(c.data[m] + 4 * n, &sum, 4);
        }
}

}  // namespace tile
}  // namespace
}  // namespace dlb

// GCC has these as functions and macros for any file that includes <immintrin.h>.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(config) ::dlb::tile::load_config(config)
#define _tile_release() ::dlb::tile::release()
#define _tile_zero(t) ::dlb::tile::zero(t)
#define _tile_loadd(t, base, stride) ::dlb::tile::load(t, base, stride)
#define _tile_stored(t, base, stride) ::dlb::tile::store(t, base, stride)
#define _tile_dpbssd(c, a, b) ::dlb::tile::dot<int8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) ::dlb::tile::dot<int8_t, uint8_t>(c, a, b)
#define _tile_dpbusd(c, a, b) ::dlb::tile::dot<uint8_t, int8_t>(c, a, b)
#define _tile_dpbuud(c, a, b) ::dlb::tile::dot<uint8_t, uint8_t>(c, a, b)
