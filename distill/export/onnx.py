"""ONNX for ONNX Runtime: float32, int8 with inputs quantised as they come or on calibrated ranges, and int4 weights."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from distill.export.base import ExportError, Format, Run, Source, need, refuse_odd
from distill.export.onnx_weights import BLOCK, carry, embeddings_to_int8, find, fold_transposes, layers_of, to_blocks
from distill.export.served import arrays_of
from distill.report.costs.served import Served
from distill.tasks import Task

FILE = "model.onnx"
INLINE = 1 << 30  # bytes of weights up to which they stay in one file: protobuf ends at 2 GiB
ROWS, LENGTH = 2, 8  # of the traced example; both are free afterwards


class Onnx(Format):
    """One graph of `input_ids` and `attention_mask` (`[B, T]`, both free) to logits.

    `int8`: products of 8-bit integers, the inputs of each layer quantised when they come; `int8-static`: on the ranges that the calibration
    rows showed; `int4`: weights in blocks of 32, products in floats. Weights have a scale for each output (or block), embeddings for each
    row. Layers that training quantised keep their integers and scales where the format has them: a scale a row in `int8`, blocks in `int4`.
    """

    name = "onnx"
    precisions: ClassVar[Mapping[str, float]] = {"fp32": 1e-4, "int8": 0.1, "int8-static": 0.3, "int4": 0.5}

    def check(self, source: Source) -> None:
        """Look for the packages."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package, self.name)
        if self.precision == "int4":
            refuse_odd(source, self.name, "int4", BLOCK, "int8")

    def write(self, source: Source, folder: Path) -> None:
        """Trace, then quantise the graph."""
        with tempfile.TemporaryDirectory(dir=folder) as place:  # not in memory, and on the disk that the export must fit on
            plain = Path(place) / FILE
            graph(source, plain)
            if self.precision == "fp32":
                _save(_load(plain), folder / FILE)
            elif self.precision == "int4":
                model = _load(plain)
                head = source.model.get_output_embeddings()
                fold_transposes(model.graph)
                names = [name for name, module in source.model.named_modules() if module is head and head is not None]
                embeddings_to_int8(model.graph)
                to_blocks(model, layers_of(source), (names or [""])[0], source.learned(4))
                _save(model, folder / FILE)
            else:
                self._int8(source, plain, folder / FILE)

    def _int8(self, source: Source, plain: Path, target: Path) -> None:
        """Quantise products with weights; the embeddings first, which ONNX Runtime would give one scale for all rows."""
        ort = need("onnxruntime.quantization", self.name)

        model = _load(plain)
        fold_transposes(model.graph)
        found = find(model.graph, layers_of(source))
        embeddings_to_int8(model.graph)
        big = _save(model, plain)
        # MatMulConstBOnly: attention's products of two activations stay in floats. QuantizeBias: its scale would be of the scales of
        # inputs and weights, and `carry` replaces the latter
        options = {"MatMulConstBOnly": True, "QuantizeBias": False}
        common: dict[str, Any] = {
            "per_channel": True,
            "weight_type": ort.QuantType.QInt8,
            "op_types_to_quantize": ["MatMul", "Gemm"],
            "use_external_data_format": big,
            "extra_options": options,
        }
        with _quiet():
            if self.precision == "int8":
                ort.quantize_dynamic(plain, target, **common)
            else:
                static = {"quant_format": ort.QuantFormat.QDQ, "activation_type": ort.QuantType.QUInt8}
                ort.quantize_static(plain, target, _reader(source), **static, **common)
        quantised = _load(target)
        carry(quantised.graph, found, source.learned(8))
        for leftover in target.parent.glob(f"{target.name}*"):
            leftover.unlink()
        _save(quantised, target)

    def load(self, folder: Path, task: Task) -> Run:
        """Open a session of ONNX Runtime on the CPU."""
        ort = need("onnxruntime", self.name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(batch: Any) -> torch.Tensor:
            arrays = arrays_of(batch)
            return torch.from_numpy(session.run(None, {name: arrays[name] for name in names})[0])

        return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice, on the root logger, to prepare the graph in a way that does nothing for these."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def graph(source: Source, target: Path) -> None:
    """Write a student's float32 graph.

    Raises:
        ExportError: torch cannot trace this architecture.
    """
    example = {name: _sized(value) for name, value in source.example().items()}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter on its own workings
        try:
            torch.onnx.export(
                Served(source.model, source.inputs).eval(),
                tuple(example.values()),
                target,
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes={"inputs": tuple(free for _ in example)},
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ExportError(f"onnx: torch cannot trace {source.model_type}: {reason}; take another format") from error


def _sized(value: torch.Tensor) -> torch.Tensor:
    """Of a shape without ones, which tracing would take for constants."""
    return value.repeat(ROWS, LENGTH)[:ROWS, :LENGTH].contiguous()


def _reader(source: Source) -> Any:
    reader: Any = need("onnxruntime.quantization", "onnx").CalibrationDataReader

    class Rows(reader):
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, Any]] = map(arrays_of, source.calibration())

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    return Rows()


def _load(path: Path) -> Any:
    model = need("onnx", "onnx").load(path)
    # torch's shapes of a Gemm that ONNX Runtime turns into a MatMul would contradict the new ones
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for node in model.graph.node:  # where in whose source file each was traced
        del node.metadata_props[:]
    return model


def _save(model: Any, path: Path) -> bool:
    """Write; beyond `INLINE` the weights into a file beside it. Gives whether they were."""
    big = bool(sum(len(each.raw_data) for each in model.graph.initializer) > INLINE)
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        os.unlink(data)  # onnx would add to it
    need("onnx", "onnx").save_model(model, path, save_as_external_data=big, all_tensors_to_one_file=True, location=data.name)
    return big
