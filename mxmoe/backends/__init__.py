"""What runs a module: `eager` is the definition, `numba` the CPU, `triton` the seat of the GPU. `mxmoe.target` names them."""
