"""The Numba and LLVM kernels behind the CPU rasteriser, its photometric loss and the binding of Gaussians to faces."""
