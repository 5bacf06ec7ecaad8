// The rows that products take: normed or activated, then rounded to int8 per summation block, or left in fp32.
// Also the scratch memory of a call.
#pragma once

#include "fused.h"
#include "kernel_table.h"

namespace dlb {

struct FloatKernels;

// Memory of one thread: grows, is kept, and is never shared.
class Scratch {
  public:
    void* get(int64_t wanted);  // at least `wanted` bytes on a 64-byte boundary, or null; what it held is lost
    ~Scratch();

  private:
    void* data_ = nullptr;
    int64_t bytes_ = 0;
};

Scratch& call_scratch();  // for what lives as long as a call
Scratch& task_scratch();  // for what lives as long as a task of the pool

// Places in a buffer, one behind the other: first without a base to learn the size, then with it.
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
    template <class T>
    T* take(int64_t count) {
        const int64_t at = bytes_;
        bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
    }
    int64_t bytes() const { return bytes_; }

  private:
    uint8_t* base_;
    int64_t bytes_ = 0;
};

struct Quantized {
    int8_t* q;
    float* scale;
    int32_t *sum, *start;
    int64_t q_stride, blocks;

    ActView view(int64_t row) const {
        return {q + row * q_stride, scale + row * blocks, sum + row * blocks, start + row * blocks, q_stride, blocks};
    }
};

// What products want of the rows: fp32, and int8 for some summation blocks and factors of ActView's `start`.
struct RowsNeed {
    bool floats = false;
    int blocks = 0;
    int64_t block[kDlbMaxProducts];
    int32_t factor[kDlbMaxProducts];

    int index_of(int64_t size, int32_t start_factor);  // added where they are new
    bool shared(int i) const;                          // whether an earlier one has this block
};

// m finished rows.
struct Rows {
    const float* x = nullptr;  // fp32, where needed
    int64_t x_stride = 0;
    float* made = nullptr;  // where fp32 rows are written to, if they are
    int64_t made_stride = 0;
    Quantized quantized[kDlbMaxProducts];
};

int rows_why_not(const dlb_rows_in& in);  // a dlb_status
int out_why_not(const dlb_rows_out& out);

dlb_rows_in rows_from(const dlb_rows_in& in, int64_t first);                // without the first rows
dlb_rows_out out_at(const dlb_rows_out& out, int64_t row, int64_t column);  // from there on

// Finish row r into `place` (which may be x or up), or return where it lies as it is.
const float* finish_row(const FloatKernels& kernels, const dlb_rows_in& in, int64_t r, float* place);

// Find places for the first m rows of `in`.
Rows place_rows(const dlb_rows_in& in, int64_t m, const RowsNeed& need, Arena& arena);

// Make them, on the pool.
int make_rows(const dlb_rows_in& in, int64_t m, const RowsNeed& need, const Rows& rows);

}  // namespace dlb
