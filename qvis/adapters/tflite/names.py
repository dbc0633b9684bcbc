"""What to call a weight of a TensorFlow Lite model: the layer that it was converted from, where that shows."""

from __future__ import annotations

import re

_INVENTED = re.compile(r"(arith\.|tfl\.|std\.)\w+|StatefulPartitionedCall\S*|Const(ant)?_?\d*|\d*")
_TAIL = re.compile(
    r"(/(convolution|depthwise|separable_conv2d|conv_transpose|conv[123]d_transpose|Conv[123]D(Transpose)?|Conv2DBackpropInput"
    r"|DepthwiseConv2dNative|depthwise_conv2d|MatMul|BatchMatMulV2|Tensordot|Einsum|einsum|GatherV2|embedding_lookup"
    r"|ReadVariableOp(_\d+)?|BiasAdd|Relu6?)\d*)+;?\d*$"
)
"""What TensorFlow puts behind the name of a layer."""
_ACTIVATION = re.compile(r"/(BiasAdd|Relu6?)\d*$")


def choose(tensor: str, outputs: list[str]) -> str:
    """The layer's name: by its tensor where that was not made up, else by what the operator returns."""
    for name in (tensor, *outputs):
        if name and not _INVENTED.fullmatch(name):
            return clean(name)
    return tensor or next(filter(None, outputs), "(unnamed)")


def clean(name: str) -> str:
    """``model/conv1`` for ``model/conv1/Relu;model/conv1/Conv2D``: names of fused operators stand side by side."""
    parts = [part for part in name.split(";") if "/" in part] or [name]
    # An activation comes with its layer only by chance, so that it names it only when nothing else does.
    own = [part for part in parts if _TAIL.search(part) and not _ACTIVATION.search(part)]
    return _TAIL.sub("", (own or parts)[0]) or name
