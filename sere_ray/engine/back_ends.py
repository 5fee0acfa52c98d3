"""The back end of each device type of vLLM."""

from sere_ray.engine.back_end import BackEnd
from sere_ray.engine.cpu.back_end import CpuBackEnd
from sere_ray.engine.gpu.back_end import GpuBackEnd

BACK_ENDS: dict[str, BackEnd] = {"cpu": CpuBackEnd(), "cuda": GpuBackEnd()}
