"""Quantizes Keras models with the converter of TensorFlow Lite, after training.

A model is traced in inference, with as many samples as one likes where it can be, and its variables become constants:
nothing of it changes. Numbers go in and come out as floats whatever the method, so that the file takes the place of the
model; where all is computed in integers they are rounded by a ``QUANTIZE`` at the start and stretched by a
``DEQUANTIZE`` at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from qvis.adapters.keras.form import Form, Input
from qvis.adapters.keras.live import collect, walk
from qvis.adapters.keras.outputs import first_line
from qvis.adapters.keras.tap import untouched
from qvis.adapters.quiet import quietly
from qvis.adapters.tflite.program import Program, read_program
from qvis.errors import BadArgumentError, NotRunnableError, UnsupportedModelError
from qvis.quantization.contents import Arithmetic
from qvis.quantization.engines.keras import check_runnable
from qvis.quantization.engines.outputs import in_parts
from qvis.quantization.engines.tflite import LiteRT, arithmetic
from qvis.quantization.methods import Epoch, Job
from qvis.words import listed_names

SMALLEST = 1024
"""TensorFlow leaves weights of fewer numbers in float, where it does not round what enters them."""
_MARK = "qvis_layer_"
_MARKED = re.compile(rf"{_MARK}(\d+)(?:_\d+)?")
"""The scope in which a layer is traced."""
_READ = re.compile(r"(/Shape)?/ReadVariableOp(_\d+)?/resource(?=\d*$)")
"""What is put behind the name of a variable that became a constant."""
_CONTROL = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")
_NO_PLACES = "which int16x8 of TensorFlow does not; use method='post_training' or 'dynamic_range'"
_WITH_FLOAT = ("post_training",)
"""Methods that can leave layers in float."""


def check(job: Job) -> None:
    """Refuse what the converter cannot do with this model.

    Raises
    ------
    NotRunnableError
        It is a model of Keras 2, or Keras does not run on TensorFlow.
    UnsupportedModelError
        It is quantized already, takes text, or computes in narrow floats.
    BadArgumentError
        Layers are to stay in float where the method cannot leave them so, or what the model takes is not known.
    """
    check_runnable(job.model)
    method = job.cell.method
    layers = list(walk(job.model))
    quantized = [name for name, _, layer in layers if getattr(layer, "quantization_mode", None)]
    if quantized:
        raise UnsupportedModelError(
            f"model: {listed_names(quantized)} {'is' if len(quantized) == 1 else 'are'} quantized by Keras already; "
            "give the model as it was before"
        )
    narrow = {str(layer.compute_dtype) for *_, layer in layers} & {"float16", "bfloat16", "float64"}
    if narrow:
        raise UnsupportedModelError(
            f"model: it computes in {listed_names(sorted(narrow))}, and TensorFlow Lite in float32; build it with "
            "keras.config.set_dtype_policy('float32') and load its weights there"
        )
    floats = job.in_float()
    if floats and method not in _WITH_FLOAT:
        raise BadArgumentError(
            f"exclude: {method} of TensorFlow Lite leaves no choice of layers, so that {listed_names(floats)} cannot "
            "stay in float; use method='post_training', or exclude nothing"
        )
    if len(floats) == len(job.network.layers):
        raise BadArgumentError("exclude: all layers are to stay in float, so that nothing is left to quantize")
    form = Form(job.model, job.example)
    text = [one.name for one in form.inputs if one.dtype == "string"]
    if text:
        raise UnsupportedModelError(
            f"model: its input {text[0]!r} is text, which TensorFlow Lite does not take; give the model behind the "
            "layer that turns text into numbers"
        )
    whole = [one.name for one in form.inputs if one.dtype.startswith(("int", "uint", "bool"))]
    if whole and method == "int16x8":
        raise UnsupportedModelError(f"model: its input {whole[0]!r} takes whole numbers, {_NO_PLACES}")
    for batch in job.calibration:
        form.arrays(batch)


def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
    """Write the quantized model; see :class:`qvis.quantization.methods.Backend`.

    Raises
    ------
    UnsupportedModelError
        An operation of the model has no counterpart in TensorFlow Lite.
    """
    form = Form(job.model, job.example)
    inputs, note = _sized(form, job)
    if note:
        job.notes.append(note)
    try:
        content = _convert(job, form, inputs)
    except _Failure as failure:
        # Loops such as those of an LSTM are only taken for a known number of samples.
        single = [replace(one, shape=(1, *one.shape[1:])) if one.shape else one for one in inputs]
        if single == inputs:
            raise _refusal(failure) from failure.__cause__
        try:
            content = _convert(job, form, single)
        except _Failure:
            raise _refusal(failure) from failure.__cause__
        job.notes.append("the file takes one sample at a time: the model has a loop, such as that of an LSTM")
    _try(content, job.cell.method)
    target.write_bytes(content)
    _judge(job, read_program(target))
    return ()


def _try(content: bytes, method: str) -> None:
    """See whether LiteRT takes what was made, where it is installed: not all that the converter makes runs."""
    if find_spec("ai_edge_litert") is None:
        return
    try:
        LiteRT(content)
    except NotRunnableError as error:
        raise UnsupportedModelError(
            f"{error}; that is what TensorFlow made of it by {method}, so choose another method, or exclude the layer"
        ) from error


class _Failure(Exception):
    """The converter gave up."""


def _convert(job: Job, form: Form, inputs: Sequence[Input]) -> bytes:
    """The file's bytes for inputs of these shapes."""
    with quietly(), untouched(layer for _, _, layer in walk(job.model)):
        marks = _Marks(job.model)
        marks.place()
        if job.cell.needs:
            _unroll(job.model)
        names, function = _traced(form, inputs)
        if job.cell.needs:
            _check_straight(function)
        try:
            found = _quantized(function, job, _samples(job, form, inputs), marks)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the converter has no class of errors of its own that can be imported
            raise _Failure(_reason(error, marks)) from error
        return _finished(found, marks, [one.name for one in inputs], names)


def _unroll(model: Any) -> None:
    """Have recurrent layers be traced step by step: TensorFlow's calibration crashes where there are loops."""
    for *_, layer in walk(model):
        if hasattr(layer, "unroll") and hasattr(layer, "cell"):
            object.__setattr__(layer, "unroll", True)


def _check_straight(function: Any) -> None:
    """Refuse loops and branches that are left, before they crash the process."""
    definition = function.graph.as_graph_def()
    nodes = [*definition.node, *(node for one in definition.library.function for node in one.node_def)]
    found = [node.name for node in nodes if node.op in _CONTROL]
    if found:
        raise UnsupportedModelError(
            f"model: it has loops or branches ({listed_names(found, 2)}), which TensorFlow cannot calibrate; give a "
            "model without them, or use method='dynamic_range'"
        )


def _traced(form: Form, inputs: Sequence[Input]) -> tuple[list[str], Any]:
    """The names of the outputs, and the model as a function of TensorFlow."""
    import tensorflow as tf

    names: list[str] = []

    def run(*tensors: Any) -> list[Any]:
        found = form.call(tensors)
        names[:] = [name for name, _ in found]
        return [tf.identity(one) for _, one in found]

    specs = [tf.TensorSpec(one.shape, one.dtype, one.name) for one in inputs]
    try:
        return names, tf.function(run, input_signature=specs, autograph=False).get_concrete_function()
    except Exception as error:
        raise UnsupportedModelError(
            f"model: TensorFlow cannot make a graph of it: {first_line(error).split('. ')[0]}; give a model whose call "
            "uses operations of Keras or TensorFlow alone"
        ) from error


def _quantized(function: Any, job: Job, samples: Callable[[], Iterator[Any]], marks: _Marks) -> bytes:
    """What the converter makes of a function."""
    import tensorflow as tf

    floats = _floats(job)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter._experimental_disable_per_channel = job.granularity == "tensor"
    ops = tf.lite.OpsSet
    if job.cell.method == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif job.cell.method == "int16x8":
        converter.representative_dataset = samples
        converter.target_spec.supported_ops = [
            ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
            ops.TFLITE_BUILTINS,
        ]
        converter.experimental_new_quantizer = False  # which would go through all samples twice
    elif job.cell.method == "post_training":
        converter.representative_dataset = samples
        converter._experimental_calibrate_only = bool(floats)
    found: bytes = converter.convert()
    if not floats:
        return found
    from tensorflow.lite.python.convert import mlir_quantize

    kept = _in_layers(found, marks, floats)
    return bytes(mlir_quantize(found, disable_per_channel=job.granularity == "tensor", denylisted_nodes=kept))


def _samples(job: Job, form: Form, inputs: Sequence[Input]) -> Callable[[], Iterator[Any]]:
    """The calibration data one by one, as the converter asks for them."""
    size = next((one.shape[0] for one in inputs if one.shape), None) or 1

    def each() -> Iterator[Any]:
        for batch in job.track(job.calibration, "Calibrating"):
            yield from in_parts(form.arrays(batch), batch.size, size)

    return each


def _sized(form: Form, job: Job) -> tuple[list[Input], str]:
    """The inputs with the sizes of the example where the model leaves them open, and a note on that."""
    if job.example is None:
        return list(form.inputs), ""
    arrays = form.arrays(job.example)
    found = [
        replace(one, shape=(*one.shape[:1], *array.shape[1:])) for one, array in zip(form.inputs, arrays, strict=True)
    ]
    changed = [new for new, old in zip(found, form.inputs, strict=True) if new.shape != old.shape]
    if not changed:
        return found, ""
    spelled = [f"{one.name} {'×'.join(map(str, one.shape[1:]))}" for one in changed]
    return (
        found,
        f"the file takes samples of the sizes of the data alone, which the model leaves open: {', '.join(spelled)}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which operators are of which layer


class _Marks:
    """Scopes in which the layers with weights are traced, so that what becomes of them can be told in the file."""

    def __init__(self, model: Any) -> None:
        self.layers = {id(layer): layer for *_, layer in walk(model) if layer.built and _holds_variables(layer)}
        self.order = list(self.layers)
        self.names = {id(layer): name or str(model.name) for name, _, layer in reversed(list(walk(model)))}

    def place(self) -> None:
        """Have all layers be traced in their scopes, until :func:`untouched` puts their attributes back."""
        import tensorflow as tf

        for number, layer in enumerate(self.layers.values()):

            def call(*args: Any, call: Any = layer.call, scope: str = f"{_MARK}{number}", **kwargs: Any) -> Any:
                with tf.name_scope(scope):
                    return call(*args, **kwargs)

            object.__setattr__(layer, "call", call)

    def found(self, name: str) -> set[int]:
        """The layers, by id, that a tensor is of."""
        return {self.order[int(number)] for number in _MARKED.findall(name)}

    def clear(self, name: str) -> str:
        """The name of a tensor with the layer's own in place of the scopes around it."""
        parts = []
        for part in name.split(";"):
            marked = list(_MARKED.finditer(part))
            last = marked[-1] if marked else None
            parts.append(self.names[self.order[int(last[1])]] + part[last.end() :] if last else part)
        return ";".join(_READ.sub("", part) for part in parts)


def _holds_variables(layer: Any) -> bool:
    return bool(layer._trainable_variables or layer._non_trainable_variables)


def _floats(job: Job) -> set[int]:
    """The Keras layers, by id, that hold the weights that are to stay in float."""
    floats = set(job.in_float())
    found = collect(job.model)
    holders = {
        layer.name: {id(source.unit.holder) for source in found.sources[key]} for key, layer in found.layers.items()
    }
    held = {holder for name in floats for holder in holders.get(name, ())}
    others = [name for name, each in holders.items() if name not in floats and each & held]
    if others:
        job.notes.append(f"{listed_names(others)}: left in float too, since a layer is quantized as a whole")
    return held


def _in_layers(content: bytes, marks: _Marks, layers: set[int]) -> list[str]:
    """The tensors that operators of some layers return.

    Raises
    ------
    UnsupportedModelError
        A layer has none, so that it would not be left in float.
    """
    from tensorflow.lite.tools.flatbuffer_utils import convert_bytearray_to_object

    graph = convert_bytearray_to_object(content).subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    flowing = {-1, *graph.inputs, *(place for step in graph.operators for place in step.outputs)}
    seen: set[int] = set()
    found = []
    for step in graph.operators:
        # what flows into an operator is of another one
        own = [place for place in step.inputs if place not in flowing] + list(step.outputs[:1])
        of = layers & {layer for place in own for layer in marks.found(names[place])}
        if of:
            seen |= of
            found.append(names[step.outputs[0]])
    lost = [marks.names[layer] for layer in layers if layer not in seen]
    if lost:
        raise UnsupportedModelError(
            f"exclude: {listed_names(lost)} cannot be told from other operations in what TensorFlow makes of the "
            "model, so that it cannot stay in float; exclude other layers"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The file


def _finished(content: bytes, marks: _Marks, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The file with the names of layers, and with a signature, by which its inputs and outputs have names."""
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools.flatbuffer_utils import convert_bytearray_to_object, convert_object_to_bytearray

    model = convert_bytearray_to_object(content)
    graph = model.subgraphs[0]
    for tensor in (tensor for one in model.subgraphs for tensor in one.tensors):
        tensor.name = marks.clear((tensor.name or b"").decode()).encode()
    for name, place in zip(outputs, graph.outputs, strict=True):
        graph.tensors[place].name = name.encode()

    def named(names: Sequence[str], places: Sequence[int]) -> list[Any]:
        found = []
        for name, place in zip(names, places, strict=True):
            one = schema.TensorMapT()
            one.name, one.tensorIndex = name, int(place)
            found.append(one)
        return found

    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs, signature.outputs = named(inputs, graph.inputs), named(outputs, graph.outputs)
    model.signatureDefs = [signature]
    return bytes(convert_object_to_bytearray(model))


def _judge(job: Job, program: Program) -> None:
    """Say what stayed in float though it was not asked for.

    Raises
    ------
    UnsupportedModelError
        All of it did.
    """
    method = job.cell.method
    if method == "float16":
        return
    layers = {layer.name: layer for step in program.steps for layer in step.layers}
    left = [name for name, layer in layers.items() if layer.dtype.startswith("float")]
    kinds = {step.kind for step in program.steps for layer in step.layers if layer.name in left}
    small = method == "dynamic_range" and [name for name in left if prod(layers[name].shape) < SMALLEST]
    if len(left) == len(layers):
        why = (
            f"its weights have fewer than {SMALLEST} numbers each, which {method} leaves in float; use "
            "method='post_training'"
            if small and len(small) == len(left)
            else f"TensorFlow Lite has no integer version of {listed_names(sorted(kinds))}; use method='float16'"
        )
        raise UnsupportedModelError(f"model: nothing of it can be quantized: {why}")
    if small:
        job.notes.append(
            f"{listed_names(small)}: left in float by TensorFlow, as are all weights of fewer than {SMALLEST} numbers"
        )
    if method == "dynamic_range":
        return
    asked = tuple(_names_left(job))
    others = [
        f"{step.layers[0].name if step.layers else step.name} ({step.kind})"
        for step in program.steps
        if arithmetic(step) in (Arithmetic.HYBRID, Arithmetic.FLOAT)
        and not (step.layers[0].name if step.layers else step.name).startswith(asked or ("\0",))
    ]
    if others:
        job.notes.append(f"{listed_names(others)}: left in float, which {method} of TensorFlow has no integers for")


def _names_left(job: Job) -> list[str]:
    """The Keras layers that stay in float as a whole, by name."""
    held = _floats(job)
    return [name for name, _, layer in walk(job.model) if id(layer) in held and name]


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def _refusal(failure: _Failure) -> UnsupportedModelError:
    return UnsupportedModelError(f"model: {failure}")


def _reason(error: Exception, marks: _Marks) -> str:
    """What the converter stumbled over, in one line."""
    missing: dict[str, list[str]] = {}
    for one in getattr(error, "errors", ()):
        places = [call.name for call in one.location.call if call.name]
        if one.operator.name:
            where = missing.setdefault(one.operator.name.removeprefix("tf."), [])
            where.extend(marks.clear(place) for place in places[:1])
    if missing:
        spelled = [f"{name} ({listed_names(places)})" if places else name for name, places in missing.items()]
        return (
            f"TensorFlow Lite has no {listed_names(spelled)}; give a model without, or one that ends before it or "
            "begins after it"
        )
    text = first_line(error)
    if text.startswith("Max and min for dynamic tensors"):
        return f"its {marks.clear(text.split()[-1])!r} takes whole numbers, {_NO_PLACES}"
    return f"TensorFlow's converter fails: {text}"
