"""Floor 1: what bits mean. Formats as rows of one table, bit planes, and the packed weight that all else handles."""

from .packed import PackedWeight, Part, merge
from .quantizer import dequantize, quantize
from .table import FORMATS, Format, cast_name, lookup

__all__ = ["FORMATS", "Format", "PackedWeight", "Part", "cast_name", "dequantize", "lookup", "merge", "quantize"]
