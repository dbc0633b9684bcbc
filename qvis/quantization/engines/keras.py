"""Runs Keras models as graphs of TensorFlow, and tells what is in their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvis import adapters
from qvis.adapters.keras.files import stored_bytes
from qvis.adapters.keras.form import AnyArray, Form
from qvis.adapters.keras.live import ends, package_of, walk
from qvis.adapters.keras.outputs import first_line
from qvis.adapters.keras.tap import untouched
from qvis.adapters.quiet import quietly
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import FloatArray
from qvis.quantization.contents import Contents
from qvis.quantization.engines.outputs import in_parts, joined, of_samples
from qvis.running import Batch
from qvis.words import count


def inspect(path: Path) -> Contents:
    """The bytes of the weights in a file of Keras by their types, without the state of an optimizer.

    Raises
    ------
    BadArgumentError
        The file is damaged, or none of Keras.
    """
    return Contents((), stored_bytes(path), path.stat().st_size)


def open_engine(model: Any, threads: int = 1) -> KerasEngine:
    """Make a Keras model ready to be run as a graph of TensorFlow.

    Parameters
    ----------
    model
        A model of Keras 3, or the path of a ``.keras`` or ``.h5`` file, which must be one that you trust.
    threads
        How many threads it may compute with. TensorFlow takes that only before it has computed anything, and then for
        the whole process; later its own number stays, which the engine's name then says.

    Raises
    ------
    NotRunnableError
        It cannot be loaded, or Keras does not run on TensorFlow.
    """
    if isinstance(model, Path):
        _limit(threads)  # loading it computes
    loaded = adapters.load(model)
    check_runnable(loaded)
    return KerasEngine(loaded, threads)


def check_runnable(model: Any) -> None:
    """Accept models of Keras 3 on TensorFlow.

    Raises
    ------
    NotRunnableError
        It is another model.
    """
    keras = package_of(model)
    if not hasattr(keras, "StatelessScope"):
        raise NotRunnableError(
            f"model: {model.name!r} is a model of Keras 2 (tf_keras); save it as .h5 and give the path, or build it "
            "with Keras 3"
        )
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise NotRunnableError(
            f"model: Keras runs on {backend} here, and its models are run with TensorFlow; set "
            "KERAS_BACKEND=tensorflow before Keras is imported and load the model anew"
        )


class KerasEngine:
    """An :class:`~qvis.quantization.engines.Engine` for models of Keras 3."""

    simulated = ""

    def __init__(self, model: Any, threads: int = 1) -> None:
        import tensorflow as tf

        self._model = model
        self._form: Form | None = None
        self._graphs: dict[Any, Any] = {}
        self.fixed_batch: int | None = None
        self.name = f"TensorFlow {tf.__version__}"
        if not _limit(threads):
            self.name += f", {_threads()}"
        if ends(model) is not None:
            self._form = Form(model, None)
            self.fixed_batch = self._form.fixed_batch

    def run(self, batch: Batch) -> list[FloatArray]:
        """See :meth:`qvis.quantization.engines.Engine.run`."""
        form = self._form_for(batch)
        parts = in_parts(form.arrays(batch), batch.size, self.fixed_batch)
        found = [[one.numpy() for one in self._ready(form, part)()] for part in parts]
        return of_samples(joined(found, batch.size), batch.size)

    def prepare(self, batch: Batch) -> Callable[[], object]:
        """See :meth:`qvis.quantization.engines.Engine.prepare`."""
        if self.fixed_batch not in (None, batch.size):
            raise BadArgumentError(
                f"batch: the model takes {self.fixed_batch} at once, and no other number such as {batch.size}"
            )
        form = self._form_for(batch)
        ready = self._ready(form, form.arrays(batch))
        ready()
        return ready

    def _form_for(self, batch: Batch) -> Form:
        """How the model is called; a class of its own may be called in another form each time."""
        if self._form is None or not self._form.knows_inputs:
            self._form = Form(self._model, batch)
        return self._form

    def _ready(self, form: Form, arrays: list[AnyArray]) -> Callable[[], Any]:
        """The graph for inputs of these shapes, with the inputs as tensors."""
        import tensorflow as tf

        graph = self._graph(form, arrays)
        tensors = [tf.convert_to_tensor(one) for one in arrays]
        return lambda: graph(*tensors)

    def _graph(self, form: Form, arrays: list[AnyArray]) -> Any:
        """The model traced for arrays of these shapes. Nothing of it changes."""
        import tensorflow as tf

        key = (id(form), *((one.shape, one.dtype.name) for one in arrays))
        if key not in self._graphs:
            specs = [tf.TensorSpec(one.shape, one.dtype) for one in arrays]
            try:
                with quietly(), untouched(layer for _, _, layer in walk(self._model)):
                    traced = tf.function(lambda *given: [one for _, one in form.call(given)], autograph=False)
                    self._graphs[key] = traced.get_concrete_function(*specs)
            except (BadArgumentError, NotRunnableError):
                raise
            except Exception as error:
                reason = first_line(error).split(". ")[0]
                raise NotRunnableError(
                    f"model: running it as a graph fails with {type(error).__name__}: {reason}"
                ) from error
        return self._graphs[key]


def _limit(threads: int) -> bool:
    """Have TensorFlow compute with so many threads, if it still can; returns whether it does."""
    with quietly():  # asking makes it look for devices
        try:
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except ImportError:
            return False
        except RuntimeError:  # it has begun to compute
            pass
        return int(tf.config.threading.get_intra_op_parallelism_threads()) == threads


def _threads() -> str:
    import tensorflow as tf

    number = int(tf.config.threading.get_intra_op_parallelism_threads())
    return count(number, "thread") if number else "as many threads as it likes"
