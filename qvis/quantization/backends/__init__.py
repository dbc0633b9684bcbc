"""Those who quantize: each module hands a model to one existing quantizer; see :class:`qvis.quantization.methods.Backend`."""
