"""Those who quantize: each module hands a model to one existing quantizer.

It offers the two functions of :class:`qvis.quantization.methods.Backend`.
"""
