"""The rules made fast: compiled loops on a CPU, ``kernels/cuda`` compiled at run time on a GPU."""
