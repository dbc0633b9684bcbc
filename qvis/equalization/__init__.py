"""Cross-layer equalization: scales channels between layers so that rounding does less damage, and the function stays."""
