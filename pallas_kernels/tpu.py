"""Constants shared by the kernels for TPUs."""

# Of the 64 MiB of the smallest core (v5p, v7x); Mosaic's default is 16.
VMEM_BYTES = 48 * 2**20
LANES = 128  # of a register
# Products of matrices whose contracted dims are both the last, or inner.
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
