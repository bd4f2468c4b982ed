"""OpenVINO's intermediate representation, int8 through NNCF: the fastest on a CPU."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from distill.export.base import ExportError, Format, Run, Source, need
from distill.export.grid import Grid
from distill.export.served import arrays_of
from distill.report.costs.served import Served
from distill.tasks import Task

FILE = "model.xml"
PREFIX, SUFFIX = "__module.model.", "/aten::linear/MatMul"  # of a layer's product in a graph traced from `Served`


class OpenVino(Format):
    """`model.xml` and `model.bin`, from `input_ids` and `attention_mask` (`[B, T]`, both free) to logits.

    `int8`: weights with a scale for each output, inputs on the ranges that the calibration rows showed. Layers that training quantised
    with a scale a row keep their integers and scales.
    """

    name = "openvino"
    precisions: ClassVar[Mapping[str, float]] = {"int8": 0.3, "fp32": 1e-4}

    def check(self, source: Source) -> None:
        """Look for the packages."""
        _openvino()
        if self.precision == "int8":
            need("nncf", self.name)

    def write(self, source: Source, folder: Path) -> None:
        """Trace, calibrate, save."""
        ov = _openvino()
        model = graph(source)
        if self.precision == "int8":
            model = _quantised(model, source)
            carry(model, source.learned(8))
        ov.save_model(model, folder / FILE, compress_to_fp16=False)

    def load(self, folder: Path, task: Task) -> Run:
        """Compile for the CPU; what is not int8 is computed in float32, as the student does."""
        ov = _openvino()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = ov.Core().compile_model(folder / FILE, "CPU", settings)
        names = [each.get_any_name() for each in compiled.inputs]

        def run(batch: Any) -> torch.Tensor:
            arrays = arrays_of(batch)
            return torch.from_numpy(compiled({name: arrays[name] for name in names})[0].copy())

        return run


def _openvino() -> Any:
    """Import without its telemetry, which tells Google of every conversion without asking; the library does without the module."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("NNCF_CI", "1")
    return need("openvino", "openvino")


def graph(source: Source) -> Any:
    """Trace a student.

    Raises:
        ExportError: OpenVINO does not know an operation of this architecture.
    """
    ov = _openvino()
    names, example = source.inputs, tuple(source.example().values())
    shapes = [(ov.PartialShape([-1, -1]), ov.Type.i64) for _ in names]
    with torch.no_grad(), warnings.catch_warnings(), _of_floats(source.model.config):
        warnings.simplefilter("ignore")  # of tracing: the sizes are free, and compared afterwards
        try:
            model = ov.convert_model(Served(source.model, names).eval(), example_input=example, input=shapes)
        except Exception as error:  # it raises what its frontend meets: RuntimeError, OpConversionFailure, …
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"openvino: cannot trace {source.model_type}: {reason}; take another format") from error
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    return model


@contextmanager
def _of_floats(config: Any) -> Iterator[None]:
    """Hide how the model is stored (e.g. factors, as a dict): OpenVINO asks it for an attribute, to find packed integers."""
    stored = config.__dict__.pop("quantization_config", None)
    try:
        yield
    finally:
        if stored is not None:
            config.quantization_config = stored


def _quantised(model: Any, source: Source) -> Any:
    nncf = need("nncf", "openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    rows = list(source.calibration())
    advanced = nncf.AdvancedQuantizationParameters()
    if source.grids:  # smoothing moves ranges from inputs into weights, off the grid that training put them on
        advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    return nncf.quantize(
        model,
        nncf.Dataset(rows, arrays_of),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        fast_bias_correction=True,
        advanced_parameters=advanced,
    )


def carry(model: Any, grids: dict[str, Grid]) -> list[str]:
    """Put learned integers and scales in the place of those that NNCF chose; in place.

    A weight is `Multiply(Convert(i8 constant), scale)`; where NNCF left one in floats it stays so.

    Returns:
        The names of the layers that were carried over.
    """
    ov = _openvino()
    carried = []
    for product in model.get_ops():
        name = product.get_friendly_name()
        layer = name.removeprefix(PREFIX).removesuffix(SUFFIX)
        grid = grids.get(layer) if name.startswith(PREFIX) and name.endswith(SUFFIX) else None
        scales = None if grid is None else grid.rows()
        multiply = product.input_value(1).get_node() if scales is not None else None
        if grid is None or scales is None or multiply is None or multiply.get_type_name() != "Multiply":
            continue
        convert = multiply.input_value(0).get_node()
        if convert.input_value(0).get_element_type() != ov.Type.i8:
            continue
        levels = ov.op.Constant(np.ascontiguousarray(grid.levels.numpy()))
        convert.input(0).replace_source_output(levels.output(0))
        multiply.input(1).replace_source_output(ov.op.Constant(scales.numpy()[:, None]).output(0))
        carried.append(layer)
    return carried
