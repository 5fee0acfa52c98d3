"""The rule on a GPU: ``kernels/reroute.cu``, compiled at run time, and its launcher."""
