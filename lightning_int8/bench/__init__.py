"""`lightning-int8-bench`: what INT8 gains, and where, on the GPU at hand: see :mod:`lightning_int8.bench.cli`."""
