"""Bytes of a model's files by format and precision: arithmetic on what is stored, checked against real exports in the tests."""

from distill.advise.known import PACKED
from distill.advise.parts import Figure
from distill.advise.shapes import Weights

SCALE = 4  # bytes: float32
GROUP = 32  # weights that share a scale in 4 bits
BITS = {"int8": 8.0, "int4": 4.0, "int3": 3.0, "ternary": 2.0}
COUNTED = "counted"


def of(w: Weights, export: str, scheme: str | None = None) -> Figure:
    """Bytes of the files.

        hf          4 P, or 2 P in bfloat16
        torchao     a byte a weight of the linears but the head, a scale a row; the rest in float32
        onnx:int8   the same of every linear and embedding; a table that is the head as well is stored for both
        onnx:int4   half a byte a weight of the layers' linears, one of the head's, a scale for 32; embeddings a byte; the rest in floats
        openvino    int8: a byte a weight of every linear and embedding, a scale a row
        packed      int4: at most b bits a weight of the linears but the head, a scale for 32; the rest in float32, × 0.829 (zstandard)

    Args:
        w: counted.
        export: e.g. `onnx:int8`.
        scheme: of training, where its values have fewer bits than the export's.
    """
    name, _, precision = export.partition(":")
    inner, inner_rows = w.blocks + w.trunk, w.block_rows + w.trunk_rows
    if precision == "fp32":
        return Figure(4.0 * w.parameters, False, COUNTED)
    if export == "hf:bf16":
        return Figure(2.0 * w.parameters, False, COUNTED)
    if name == "torchao":
        return Figure(float(inner + SCALE * inner_rows + 4 * (w.parameters - inner)), False, COUNTED)
    if name == "packed":
        bits = BITS[scheme or "int4"]
        scales = 0.0 if scheme == "ternary" else SCALE * inner / GROUP
        rest = 4 * (w.parameters - inner) * PACKED["fp32"]
        return Figure(inner * bits / 8 + scales + rest, False, "counted; the floats × 0.829, as a MiniLM packed (docs/compression.md)")
    tables = w.tables + SCALE * w.table_rows
    head, head_rows = (w.tables, w.table_rows) if name == "onnx" and w.tied else (w.head, w.head_rows)
    if export == "onnx:int4":
        small = w.blocks / 2 + head + SCALE * (w.blocks + head) / GROUP
        return Figure(small + tables + 4 * (w.parameters - w.blocks - w.head - w.tables), False, COUNTED)
    linears = inner + head + SCALE * (inner_rows + head_rows)
    return Figure(float(linears + tables + 4 * (w.parameters - inner - w.head - w.tables)), False, COUNTED)
