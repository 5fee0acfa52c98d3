"""Back end of engines on a GPU (model runner V2, CUDA graphs)."""
