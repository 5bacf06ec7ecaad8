// A step: what it is refused for, and its rows in slices through the layers.
#include "decoder.h"

#include "decoder_state.h"

int dlb_decoder::check_sequences(const dlb_step& s) const {
    if (s.row_begin[0] != 0 || s.row_begin[s.sequences] != s.rows) return DLB_STEP_ROWS;
    for (int64_t i = 0; i < s.sequences; i++) {
        const int64_t count = s.row_begin[i + 1] - s.row_begin[i];
        if (count < 1) return DLB_STEP_ROWS;
        if (s.lengths[i] < count || s.lengths[i] > s.table_stride * s.block_slots) return DLB_STEP_LENGTH;
        const int64_t used = (s.lengths[i] + s.block_slots - 1) / s.block_slots;
        for (int64_t b = 0; b < used; b++) {
            const int64_t block = s.table[i * s.table_stride + b];
            if (block < 0 || block >= s.blocks) return DLB_STEP_TABLE;
        }
    }
    return DLB_OK;
}

int dlb_decoder::check_rows(const dlb_step& s) const {
    int64_t places = INT32_MAX;  // positions below this have an angle in every rope
    for (size_t i = 0; i < ropes_.size(); i++) {
        if (s.ropes[i].by_row && s.ropes[i].count < s.rows) return DLB_STEP_POSITION;
        if (!s.ropes[i].by_row) places = std::min(places, s.ropes[i].count);
    }
    const bool learned = program_.positions.rows != nullptr;
    for (int64_t i = 0; i < s.rows; i++) {
        if (s.ids != nullptr && (s.ids[i] < 0 || s.ids[i] >= program_.ids)) return DLB_STEP_ID;
        const int64_t position = s.positions[i];
        if (position < 0 || position >= places) return DLB_STEP_POSITION;
        const int64_t row = position + program_.position_offset;
        if (learned && (row < 0 || row >= program_.positions.count)) return DLB_STEP_POSITION;
    }
    for (int64_t i = 0; i < s.wanted_count; i++)
        if (s.wanted[i] < (i ? s.wanted[i - 1] + 1 : 0) || s.wanted[i] >= s.rows) return DLB_STEP_WANTED;
    return DLB_OK;
}

int dlb_decoder::check(const dlb_step& s) const {
    if (s.rows < 0 || s.sequences < 0 || s.wanted_count < 0 || s.block_slots <= 0) return DLB_BAD_SHAPE;
    if (s.kv_type < DLB_KV_FP32 || s.kv_type > DLB_KV_INT8) return DLB_BAD_SPEC;
    if (s.ids == nullptr && s.embeds == nullptr) return DLB_BAD_BUFFER;
    if ((s.kv_type == DLB_KV_INT8) != (s.key_scales != nullptr && s.value_scales != nullptr)) return DLB_BAD_BUFFER;
    const int status = check_sequences(s);
    return status == DLB_OK ? check_rows(s) : status;
}

int dlb_decoder::run_slice(const Slice& slice) {
    m_ = slice.rows;
    int status = embed(slice);
    for (size_t i = 0; status == DLB_OK && i < layers_.size(); i++)
        status = run_layer(layers_[i], slice, static_cast<int64_t>(i));
    if (status == DLB_OK && layers_.empty()) keep_wanted(slice, 0, false);
    return status == DLB_OK ? finish(slice) : status;
}

// A later slice of a sequence finds the keys of the earlier ones in the cache, so slices change no result.
int dlb_decoder::step(const dlb_step& s) {
    clock.start(ranks_ ? ranks_->waited : nullptr);
    int status = check(s);
    if (status != DLB_OK) return status;
    if (!make_room(std::min(s.rows, dlb::kSliceRows))) return DLB_NO_MEMORY;
    int64_t sequence = 0, wanted = 0;
    for (int64_t begin = 0; begin < s.rows && status == DLB_OK; begin += dlb::kSliceRows) {
        const int64_t end = std::min(s.rows, begin + dlb::kSliceRows);
        while (s.row_begin[sequence + 1] <= begin) sequence++;
        row_begin_.clear();
        lengths_.clear();
        int64_t count = 0;
        for (; sequence + count < s.sequences && s.row_begin[sequence + count] < end; count++) {
            const int64_t at = sequence + count, stop = s.row_begin[at + 1];
            row_begin_.push_back(static_cast<int32_t>(std::max<int64_t>(s.row_begin[at], begin) - begin));
            lengths_.push_back(static_cast<int32_t>(s.lengths[at] - (stop - std::min(stop, end))));
        }
        row_begin_.push_back(static_cast<int32_t>(end - begin));
        int64_t chosen = 0;
        while (wanted + chosen < s.wanted_count && s.wanted[wanted + chosen] < end) chosen++;
        const Slice slice = {
            &s,     begin, end - begin, count, sequence, row_begin_.data(), lengths_.data(), s.wanted + wanted,
            chosen, wanted};
        status = run_slice(slice);
        wanted += chosen;
    }
    clock.stamp(dlb::kOther);
    steps_done += 1;
    rows_done += s.rows;
    return status;
}

int dlb_decoder_step(dlb_decoder* decoder, const dlb_step* step) { return decoder->step(*step); }
