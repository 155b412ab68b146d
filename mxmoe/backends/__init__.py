"""What runs a module: `eager` is the definition, `numba` the CPU, `triton` the GPU's seat; named in `mxmoe.target`."""
