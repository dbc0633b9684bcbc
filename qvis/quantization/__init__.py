"""Grids of numbers: what a few bits can hold, where their levels are put, and how numbers are rounded to them."""
