"""Measures models in the engines that run them: size, speed, memory, accuracy, and what each layer loses."""
