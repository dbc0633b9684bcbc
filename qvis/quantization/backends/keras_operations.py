"""What the steps of a Keras model compute, in TensorFlow, written so that its converter finds each operation again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Apply = Callable[[Any, Any, Any, Callable[[Any], Any]], Any]
"""Takes an input, a kernel, a bias or None, and what follows at once, such as ReLU; returns the result."""

SHARE = (0.0, 255 / 256)
"""The grid that TensorFlow Lite prescribes for what softmax and sigmoid return."""
SIGNED_SHARE = (-1.0, 127 / 128)
"""The same of tanh."""


def conv(strides: Sequence[int], padding: str, dilation: Sequence[int]) -> Apply:
    """A convolution of (samples, rows, columns, channels) with (height, width, input channels, channels)."""

    def apply(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
        import tensorflow as tf

        y = tf.nn.conv2d(x, kernel, list(strides), padding.upper(), dilations=list(dilation))
        return after(y if bias is None else tf.nn.bias_add(y, bias))

    return apply


def depthwise(strides: Sequence[int], padding: str, dilation: Sequence[int], multiplier: int) -> Apply:
    """A convolution of each channel with (height, width, 1, channels x multiplier)."""

    def apply(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
        import tensorflow as tf

        height, width, _, channels = kernel.shape
        filters = tf.reshape(kernel, [height, width, channels // multiplier, multiplier])
        y = tf.nn.depthwise_conv2d(x, filters, [1, *strides, 1], padding.upper(), dilations=list(dilation))
        return after(y if bias is None else tf.nn.bias_add(y, bias))

    return apply


def along_one_axis(apply: Apply, before: int = 0) -> Apply:
    """The same for (samples, places, channels), with zeros put before them."""

    def widened(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
        import tensorflow as tf

        x = tf.pad(x, [[0, 0], [before, 0], [0, 0]]) if before else x
        return tf.squeeze(apply(tf.expand_dims(x, 1), kernel, bias, after), [1])

    return widened


def in_shape(apply: Apply, inside: Sequence[int], outside: Sequence[int]) -> Apply:
    """The same for what is brought into a shape before and after, (-1, ...)."""

    def reshaped(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
        import tensorflow as tf

        return tf.reshape(apply(tf.reshape(x, [-1, *inside]), kernel, bias, after), [-1, *outside])

    return reshaped


def dense(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
    """(samples, input channels) times (input channels, channels)."""
    import tensorflow as tf

    y = tf.matmul(x, kernel)
    return after(y if bias is None else tf.nn.bias_add(y, bias))


def transposed(strides: Sequence[int], padding: str, size: Sequence[int]) -> Apply:
    """A transposed convolution with (height, width, channels, input channels), whose result has a size."""

    def apply(x: Any, kernel: Any, bias: Any, after: Callable[[Any], Any]) -> Any:
        import tensorflow as tf

        shape = [tf.shape(x)[0], *size, kernel.shape[2]]
        y = tf.nn.conv2d_transpose(x, kernel, shape, list(strides), padding.upper())
        return after(y if bias is None else tf.nn.bias_add(y, bias))

    return apply


def nothing(x: Any) -> Any:
    """What follows where nothing does."""
    return x


def relu(x: Any) -> Any:
    import tensorflow as tf

    return tf.nn.relu(x)


def relu6(x: Any) -> Any:
    import tensorflow as tf

    return tf.nn.relu6(x)


def hard_swish(x: Any) -> Any:
    import tensorflow as tf

    # with this very constant the converter takes it for one operation
    return x * tf.nn.relu6(x + 3.0) * (1.0 / 6.0)


def leaky_relu(slope: float) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        import tensorflow as tf

        return tf.nn.leaky_relu(x, slope)

    return apply


def gelu(approximate: bool) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        import tensorflow as tf

        return tf.nn.gelu(x, approximate=approximate)

    return apply


def of_tensorflow(name: str) -> Callable[..., Any]:
    """A function of ``tf.nn`` or ``tf``, looked up when it is called."""

    def apply(*tensors: Any) -> Any:
        import tensorflow as tf

        return (getattr(tf.nn, name, None) or getattr(tf, name))(*tensors)

    return apply


def concat(axis: int) -> Callable[..., Any]:
    def apply(*tensors: Any) -> Any:
        import tensorflow as tf

        return tf.concat(tensors, axis)

    return apply


def reshape(shape: Sequence[int]) -> Callable[[Any], Any]:
    """Into (samples, ...)."""

    def apply(x: Any) -> Any:
        import tensorflow as tf

        return tf.reshape(x, [-1, *shape])

    return apply


def resize(size: Sequence[int], mode: str) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        import tensorflow as tf

        return tf.image.resize(x, list(size), mode)

    return apply


def drop(kind: str, rate: float, shared: Sequence[int]) -> Callable[[Any, Any], Any]:
    """Dropout and noise of training, (x, seed); the axes ``shared`` are dropped as one."""

    def apply(x: Any, seed: Any) -> Any:
        import tensorflow as tf

        if kind == "GaussianNoise":
            return x + rate * tf.random.stateless_normal(tf.shape(x), seed)
        if kind == "GaussianDropout":
            return x * (1 + (rate / (1 - rate)) ** 0.5 * tf.random.stateless_normal(tf.shape(x), seed))
        shape = [1 if axis in shared else size for axis, size in enumerate(tf.unstack(tf.shape(x)))]
        kept = tf.random.stateless_uniform(shape, seed) >= rate
        return tf.where(kept, x / (1 - rate), 0.0)

    return apply


def elu(x: Any) -> Any:
    """What is never negative, unchanged, by an operation that TensorFlow Lite computes with floats alone."""
    import tensorflow as tf

    return tf.nn.elu(x)
