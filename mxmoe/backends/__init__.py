"""What runs a module: `eager` is the definition, `numba` the CPU, `triton` the GPU; named in `mxmoe.target`."""
