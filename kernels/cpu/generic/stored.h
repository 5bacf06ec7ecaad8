// One query row over keys and values as they are stored: the ISA's loop for the cache's type. For inclusion by an ISA
// file, in its anonymous namespace, behind its scores_of<type> and accumulate_of<type>.

void scores_stored(const float* q, const void* k, int32_t kv_type, int64_t k_stride, const uint16_t* scales, int keys,
                   int dim, float scale, float* s) {
    const auto run = kv_type == DLB_KV_FP32   ? scores_of<DLB_KV_FP32>
                     : kv_type == DLB_KV_FP16 ? scores_of<DLB_KV_FP16>
                     : kv_type == DLB_KV_BF16 ? scores_of<DLB_KV_BF16>
                                              : scores_of<DLB_KV_INT8>;
    run(q, k, k_stride, scales, keys, dim, scale, s);
}

void accumulate_stored(const float* p, const void* v, int32_t kv_type, int64_t v_stride, const uint16_t* scales,
                       int keys, int dim, float* o) {
    const auto run = kv_type == DLB_KV_FP32   ? accumulate_of<DLB_KV_FP32>
                     : kv_type == DLB_KV_FP16 ? accumulate_of<DLB_KV_FP16>
                     : kv_type == DLB_KV_BF16 ? accumulate_of<DLB_KV_BF16>
                                              : accumulate_of<DLB_KV_INT8>;
    run(p, v, v_stride, scales, keys, dim, o);
}
