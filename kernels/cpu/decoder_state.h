// Inside the decoder: what it keeps between steps, and the parts of a step. Included by decoder*.cpp alone.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "attention_plan.h"
#include "decoder.h"
#include "kv_kernels.h"
#include "threadpool.h"

namespace dlb {

constexpr int64_t kSliceRows = 512;    // rows that pass through the layers together: bounds the workspace
constexpr int64_t kGatherRows = 64;    // rows of logits that are joined at a time
constexpr int64_t kCopyGrain = 32768;  // numbers that a thread copies at a time

struct Matrix {
    dlb_matrix given;
    int64_t n, k;
    int64_t total;  // n of all ranks where results are joined, else n
    bool exists() const { return given.packed != nullptr; }
};

struct Layer {
    dlb_layer given;
    Matrix qkv[3], o, up[2], down, router, shared_gate;
    int qkv_count, up_count;
    int64_t qkv_width, up_width, attended;  // of a row of results
    std::vector<int32_t> q_at, k_at, v_at, kv_index;
    std::vector<float> alibi;
    std::vector<dlb_expert> experts;
    bool routed() const { return router.exists(); }
};

// Rows [begin, begin + rows) of a step, as sequences of their own.
struct Slice {
    const dlb_step* step;
    int64_t begin, rows;
    int64_t sequences, first_sequence;
    const int32_t* row_begin;
    const int32_t* lengths;
    const int64_t* wanted;  // rows of the step
    int64_t wanted_count, first_wanted;
};

// One block of memory for all rows of a slice, cut anew when a larger slice comes.
class Workspace {
  public:
    ~Workspace() { free(data_); }
    bool reserve(int64_t bytes);
    int64_t bytes() const { return bytes_; }
    char* data() const { return data_; }

  private:
    char* data_ = nullptr;
    int64_t bytes_ = 0;
};

// Which part of a step the time since the last stamp belongs to.
enum Part { kLinear = 0, kAttention, kReduce, kWait, kOther, kParts };

class Clock {
  public:
    Clock();
    // Others may have used the collective since the last step: their waiting is not ours.
    void start(const uint64_t* waited) {
        last_ = ticks();
        if (waited != nullptr) waited_ = *waited;
    }
    void stamp(Part part) {
        const uint64_t now = ticks();
        spent_[part] += now - last_;
        last_ = now;
    }
    // The same for a collective: `waited` counts the ticks that calls have spent waiting, null where nobody counts.
    void stamp_reduce(const uint64_t* waited) {
        stamp(kReduce);
        if (waited == nullptr) return;
        const uint64_t more = *waited - waited_;
        waited_ = *waited;
        spent_[kReduce] -= more;
        spent_[kWait] += more;
    }
    void read(dlb_decoder_times* times, bool reset);

  private:
    static uint64_t ticks() { return __builtin_ia32_rdtsc(); }
    uint64_t last_ = 0, waited_ = 0, spent_[kParts] = {};
    uint64_t first_ticks_;
    int64_t first_ns_;
};

}  // namespace dlb

struct dlb_decoder {
  public:
    int create(const dlb_program& program);
    int step(const dlb_step& step);

    dlb::Clock clock;
    int64_t steps_done = 0, rows_done = 0;
    int64_t workspace_bytes() const { return workspace_.bytes(); }

  private:
    using Slice = dlb::Slice;
    using Layer = dlb::Layer;
    using Matrix = dlb::Matrix;

    // decoder_build.cpp
    bool take_matrix(const dlb_matrix& given, Matrix* out) const;
    bool take_layer(const dlb_layer& given, Layer* out) const;
    bool take_attention(Layer* layer) const;
    bool take_mlp(Layer* layer) const;
    bool make_room(int64_t rows);

    // decoder.cpp: what a step is refused for, and its slices
    int check(const dlb_step& step) const;
    int check_sequences(const dlb_step& step) const;
    int check_rows(const dlb_step& step) const;
    int run_slice(const Slice& slice);

    // decoder_ends.cpp: ids to x, x to results
    int embed(const Slice& slice);
    void look_up(const Slice& slice, float* out, int64_t width) const;
    void add_positions(const Slice& slice, float* x, int64_t width) const;
    int finish(const Slice& slice);
    int logits(const dlb_rows_in& in, float* out, int64_t out_stride);
    int gather(const float* own, int64_t rows, float* out, int64_t out_stride);
    void cap(float* x, int64_t stride, int64_t rows, int64_t n) const;

    // decoder_layer.cpp
    int run_layer(const Layer& layer, const Slice& slice, int64_t index);
    int in_sequence(const Layer& layer, const float* base);
    int side_by_side(const Layer& layer, const float* normed, const float* base, bool up_is_done);
    int project_rows(const Layer& layer, const dlb_rows_in& in, bool qkv, bool up);
    int mlp(const Layer& layer, const dlb_rows_in& in, const float* residual, float* y);
    int route(const Layer& layer, const dlb_rows_in& in, float* y, const float* residual);
    dlb_rows_in down_rows(const Layer& layer) const;
    void keep_wanted(const Slice& slice, int64_t attended, bool normed);

    // y = residual + post(rows(in) w^T, summed over the ranks, + bias). y may be the residual.
    int project(const dlb_rows_in& in, const Matrix& w, const dlb_norm& post, const float* residual, float* y);
    int product(const dlb_rows_in& in, const Matrix& w, const dlb_rows_out& out);
    int add_up(float* partial, const float* bias, const dlb_norm& post, const float* residual, float* y);
    int reduce(float* data, int64_t count);
    int apply(const dlb_rows_in& in, const dlb_rows_out& out);
    dlb_rows_in rows_of(const float* x, int64_t k, const dlb_norm* norm) const;
    bool summed(const Matrix& w) const { return w.given.reduce && ranks_ != nullptr && ranks_->size > 1; }
    float* beside() const { return o_ + m_ * program_.hidden; }  // a second result right after the first

    // decoder_attention.cpp
    int attend(const Layer& layer, const Slice& slice, int64_t index);

    std::vector<Layer> layers_;
    std::vector<dlb_rope> ropes_;
    dlb_program program_;
    Matrix embed_project_, final_project_, lm_head_;
    const dlb_collective* ranks_ = nullptr;
    std::vector<int64_t> counts_;  // of a gather

    dlb::Attention attention_;
    dlb::Workspace workspace_;
    int64_t room_ = 0;  // rows that the workspace has room for
    int64_t m_ = 0;     // rows in it now
    std::vector<int32_t> row_begin_, lengths_;
    // [room, widest of hidden and embedding]: the residual, normed rows, dense rows of experts or embeddings, and twice
    // as much for the results of two products.
    float *x_, *a_, *b_, *o_;
    float *qkv_, *att_, *up_;          // [room, widest layer's]
    float *scores_, *weights_;         // [room, experts], [room, top_k + 1]
    int32_t* chosen_;                  // [room, top_k + 1]
    float *own_logits_, *all_logits_;  // [kGatherRows, n], [kGatherRows, total], where they are joined
};
