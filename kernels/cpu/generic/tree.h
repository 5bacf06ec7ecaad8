// The balanced tree over the eight segments. For inclusion within an anonymous namespace of an ISA file.

// Sum value[0..7] in pairs of neighbours; a segment that is not `present` is left out, so that its neighbour passes
// through unchanged. add(a, b) makes a = a + b, copy(a, b) makes a = b. The sum ends in value[0]; false if all are
// empty.
template <class Add, class Copy>
inline bool segment_tree(bool* present, const Add& add, const Copy& copy) {
    for (int step = 1; step < kSegments; step *= 2)
        for (int i = 0; i < kSegments; i += 2 * step) {
            if (present[i] && present[i + step])
                add(i, i + step);
            else if (present[i + step])
                copy(i, i + step);
            present[i] |= present[i + step];
        }
    return present[0];
}
