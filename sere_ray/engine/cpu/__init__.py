"""Back end of engines on a CPU (model runner V1)."""
