"""What CUDA kernels of packed products share: tables of units, rings in shared memory, `wgmma`."""
