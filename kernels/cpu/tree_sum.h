// Sums over ranks in the order of the tree, on fp32 (16-bit numbers are widened, added and rounded once).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dlb {

// Bytes of an element of dtype (enum dlb_shm_dtype).
size_t tree_width(int dtype);

// dst = sum of the sources. `program` is the order in postfix: a source's number, or -1 for "add the last two". dst may
// be one of the sources: a block is read to its end before it is written.
void tree_sum(const int8_t* program, int length, const void* const* sources, void* dst, size_t count, int dtype);

}  // namespace dlb
