// A number as a type, to choose an overload. For inclusion within an anonymous namespace of an ISA file.

template <int Value>
struct Const {};
