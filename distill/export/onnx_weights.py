"""Weights inside an ONNX graph: found by their values, and stored as the integers and scales that training chose."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distill.compress.fake_quant import weight_quantiser
from distill.compress.integers import integers
from distill.compress.schemes import Scheme
from distill.export.base import Source, need
from distill.export.grid import Grid

BLOCK = 32  # weights that share a scale in int4
FLOAT = 1  # TensorProto's number of it
Layers = Mapping[bytes, tuple[str, bool]]


def layers_of(source: Source) -> Layers:
    """Name the linear layers by the bytes of their weight, and say whether these are transposed: exporters rename what they fold."""
    found: dict[bytes, tuple[str, bool]] = {}
    for name, module in source.model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().numpy()
            found |= {np.ascontiguousarray(weight.T).tobytes(): (name, True), weight.tobytes(): (name, False)}
    return found


def find(graph: Any, layers: Layers) -> dict[str, tuple[str, bool]]:
    """Name the layers by what their weights are called in a float graph, and say whether they are transposed there."""
    keys = {each.name: _values(each).tobytes() for each in graph.initializer if len(each.dims) == 2}
    return {name: layers[key] for name, key in keys.items() if key in layers}


def carry(graph: Any, found: Mapping[str, tuple[str, bool]], grids: Mapping[str, Grid]) -> list[str]:
    """Put learned integers and scales in the place of those that ONNX Runtime chose.

    Args:
        graph: quantised, in place: of a weight `w` it holds `w_quantized` and `w_scale`, one scale for each output.
        found: of `find`, before it was quantised.
        grids: by name of the layer; those with several scales a row are passed over.

    Returns:
        The names of the layers that were carried over.
    """
    inside = {each.name: each for each in graph.initializer}
    products = {name for node in graph.node if node.op_type == "MatMulInteger" for name in node.input}
    carried = []
    for name, (layer, transposed) in found.items():
        grid = grids.get(layer) if f"{name}_quantized" in inside else None
        scales = None if grid is None else grid.rows()
        if grid is None or scales is None:
            continue
        stored, levels = inside[f"{name}_quantized"], grid.levels.numpy()
        # a Gemm's matrix may be transposed, and is turned where ONNX Runtime makes a product of integers of it
        levels = levels.T if transposed or stored.name in products else levels
        if tuple(stored.dims) != levels.shape:  # taken for another layer that is all zeros as well; these need no grid
            assert not _values(stored).any(), f"the weight of {layer} is not where it was looked for"
            continue
        _replace(stored, levels)
        _replace(inside[f"{name}_scale"], scales.numpy())
        carried.append(layer)
    return carried


def fold_transposes(graph: Any) -> None:
    """Store the transposed matrix where a graph transposes a stored one, as a head does that shares its table with the embedding; in place.

    Only a product with a stored matrix can be quantised: in floats the table would be most of a small language model.
    """
    numpy_helper = need("onnx.numpy_helper", "onnx")

    matrices = {each.name: each for each in graph.initializer if len(each.dims) == 2}
    folded = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in matrices]
    for node in folded:
        transposed = np.ascontiguousarray(_values(matrices[node.input[0]]).T)
        graph.initializer.append(numpy_helper.from_array(transposed, node.output[0]))
        graph.node.remove(node)
    _drop_unused(graph)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input}
    for each in list(graph.initializer):
        if each.name not in used:
            graph.initializer.remove(each)


def embeddings_to_int8(graph: Any) -> None:
    """Store each table that rows are gathered from as int8 with a scale a row, `s = max|row| / 127`; in place."""
    helper = need("onnx.helper", "onnx")

    tables = {each.name: each for each in graph.initializer if len(each.dims) == 2 and each.data_type == FLOAT}
    others = {name for node in graph.node if node.op_type != "Gather" or _attribute(node, "axis") for name in node.input}
    nodes, done = [], set()
    for node in graph.node:
        name = node.input[0] if node.op_type == "Gather" else ""
        if name not in tables or name in others:
            nodes.append(node)
            continue
        if name not in done:
            done.add(name)
            _rows_to_int8(graph, tables[name])
        ids, out = node.input[1], node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}_levels", ids], [f"{out}_levels"], axis=0),
            helper.make_node("Gather", [f"{name}_scales", ids], [f"{out}_scales"], axis=0),
            helper.make_node("Cast", [f"{out}_levels"], [f"{out}_floats"], to=FLOAT),
            helper.make_node("Mul", [f"{out}_floats", f"{out}_scales"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _rows_to_int8(graph: Any, table: Any) -> None:
    numpy_helper = need("onnx.numpy_helper", "onnx")

    values = _values(table)
    scales = np.maximum(np.abs(values).max(1, keepdims=True), 1e-30) / 127
    levels = np.round(values / scales).astype(np.int8)
    graph.initializer.remove(table)
    graph.initializer.extend(
        [numpy_helper.from_array(levels, f"{table.name}_levels"), numpy_helper.from_array(scales, f"{table.name}_scales")]
    )


def to_blocks(model: Any, layers: Layers, head: str, grids: Mapping[str, Grid]) -> None:
    """Store weights in blocks of 32 with a scale each, of 4 bits, of the head 8, for ONNX Runtime's `MatMulNBits`; in place.

    Args:
        model: of ONNX.
        layers: of `layers_of`.
        head: name of the layer that is left finer.
        grids: by name of the layer, of at most 4 bits; where a block has one scale they are carried over.
    """
    helper = need("onnx.helper", "onnx")

    graph = model.graph
    weights, found = {each.name: each for each in graph.initializer}, find(graph, layers)
    nodes = []
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name not in found or weights[name].dims[0] % BLOCK:
            nodes.append(node)
            continue
        layer, _ = found[name]  # what a MatMul multiplies with is [in, out]
        nodes.append(_block_product(graph, node, weights[name], 8 if layer == head else 4, grids.get(layer)))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _block_product(graph: Any, node: Any, weight: Any, bits: int, grid: Grid | None) -> Any:
    """A `MatMulNBits` in the place of a product with `weight` `[K, N]`: `[N, K / BLOCK, BLOCK · bits / 8]` bytes, and a scale a block."""
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")

    values = torch.from_numpy(_values(weight).T.copy())  # [N, K], as the layer has it
    if grid is not None and grid.levels.shape != values.shape:  # taken for another layer that is all zeros as well
        assert not values.any(), f"{weight.name} is not the layer that it was taken for"
        grid = None
    scales = None if grid is None else grid.blocks(BLOCK)
    if grid is None or scales is None:
        how = Scheme("int", bits, BLOCK)
        levels, scales = integers(weight_quantiser(how, "onnx")(values), how)
    else:
        levels = grid.levels
    unsigned = (levels.int() + 2 ** (bits - 1)).to(torch.uint8).view(len(levels), -1, BLOCK)
    packed = unsigned if bits == 8 else unsigned[..., ::2] | (unsigned[..., 1::2] << 4)
    name = weight.name
    graph.initializer.extend(
        [numpy_helper.from_array(packed.numpy(), f"{name}_blocks"), numpy_helper.from_array(scales.numpy().ravel(), f"{name}_scales")]
    )
    inputs = [node.input[0], f"{name}_blocks", f"{name}_scales"]
    sizes = {"K": values.shape[1], "N": values.shape[0], "bits": bits, "block_size": BLOCK}
    return helper.make_node("MatMulNBits", inputs, list(node.output), domain="com.microsoft", **sizes)


def _values(tensor: Any) -> NDArray[Any]:
    numpy_helper = need("onnx.numpy_helper", "onnx")

    values: NDArray[Any] = numpy_helper.to_array(tensor)
    return values


def _replace(tensor: Any, values: NDArray[Any]) -> None:
    numpy_helper = need("onnx.numpy_helper", "onnx")

    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _attribute(node: Any, name: str) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), 0)
