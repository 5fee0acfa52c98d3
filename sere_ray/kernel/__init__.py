"""The rule on a GPU: ``kernels/cuda/reroute.cu``, compiled at run time, and its launcher."""
