// Products cut into tasks for the pool: a job is one packed weight, the finished rows that it takes and where its
// results go. What linear.cpp gives to fused.cpp and moe.cpp.
#pragma once

#include "activations.h"
#include "kernel_table.h"

namespace dlb {

// A packed weight, and the inner loop that runs it: exactly one of `codes` and `floats` is set.
struct Weight {
    LinearView view;
    LinearFn codes = nullptr;  // takes rows rounded to int8
    FloatFn floats = nullptr;  // takes rows in fp32
    int32_t start_factor = 0;  // what codes want of the sums of q (ActView)
};

// A dlb_status; checks the buffer. `table` must be the active one.
int open_weight(const KernelTable& table, const void* packed, int64_t bytes, Weight* weight);

// Note what the weight wants of its rows; returns the index of its block, or -1 where it takes fp32.
int need_of(const Weight& weight, RowsNeed* need);

struct Job {
    Weight weight;
    ActView act;     // of the first row, for codes
    const float* x;  // of the first row, for floats
    int64_t x_stride;
    int64_t m;
    dlb_rows_out out;
    // Set by run_jobs.
    int64_t m_step, panel_step, panel_tasks, first_task;
};

// Point a job at the finished rows from `row` on; `index` is what need_of returned.
void take_rows(Job* job, const Rows& rows, int index, int64_t row);

// One tile of a product: rows [m0, m1) and panels [p0, p1), to `out` as if they were the whole.
void run_tile(const Job& job, int64_t p0, int64_t p1, int64_t m0, int64_t m1, const LinearOut& out);

// All jobs as one loop of the pool.
void run_jobs(Job* jobs, int64_t count);

// A product whose segments are added to those of others before the tree.
struct SegmentTerm {
    Job job;              // its `out` is not used
    const int32_t* row;   // the result row of each of the job's rows, ascending
    const float* factor;  // of each of the job's rows
};

// out = for each of m rows the tree over the sums of the terms' segments, each sum from +0 on in order of the terms:
// sum = sum + factor * segment, two roundings. All terms have n rows of N. A dlb_status.
int sum_segments(const SegmentTerm* terms, int64_t count, int64_t m, int64_t n, const dlb_rows_out& out);

// Whether these experts take rows of k numbers and give n, all of them in one dlb_moe (moe.cpp). A dlb_status.
int experts_why_not(const dlb_expert* experts, int64_t count, int64_t k, int64_t n);

// Rows of a call that are worked on at a time, so that scratch memory is bounded whatever M is.
int64_t slice_rows(int64_t m, int64_t bytes_per_row);

}  // namespace dlb
