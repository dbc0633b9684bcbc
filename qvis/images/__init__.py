"""Pictures and what a few bits leave of them: the quickest way to see what quantization is."""
