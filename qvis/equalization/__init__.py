"""Cross-layer equalization: scales channels between layers so that rounding does less damage; the function stays."""
