#!/bin/bash
# The install steps of the image, one command each. The Dockerfile runs them; tests/deploy runs the
# same ones in a clean environment, since no image can be built where this is tested.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
pin() { grep "^$1==" "$root/constraints/cpu.txt"; }

# Debian packages of the final stage. g++: vLLM's compiled graph (CPU) and Triton's launchers (GPU)
# are compiled at the first start. libnuma1: vLLM links it. wget: KubeRay's readiness probe calls it.
system() {
  apt-get update -q
  apt-get install -q -y --no-install-recommends g++ libnuma1 wget
  rm -rf /var/lib/apt/lists/*
}

# wheel PYTHON OUT: this package; PYTHON has hatchling.
wheel() {
  "$1" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$2" "$root"
}

# build-tools PYTHON: what `wheel` needs.
build-tools() {
  "$1" -m pip install -q --no-cache-dir "$(pin pip)"
  "$1" -m pip install -q --no-cache-dir "$(pin hatchling)" -c "$root/constraints/cpu.txt"
}

# pins: what the CPU image installs of the pinned closure.
pins() {
  grep -v -f "$root/deploy/not-in-image.txt" "$root/constraints/cpu.txt"
}

# requirements EXTRA: of this package, by pyproject.toml.
requirements() {
  python3 - "$root/pyproject.toml" "$1" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[2]], sep="\n")
END
}

# stack VARIANT VENV [TORCH_INDEX]: cpu: as `make` does, the pins are the whole closure and nothing
# is resolved. gpu: what pyproject.toml asks for, resolved below the constraints.
stack() {
  [[ $1 = cpu || $1 = gpu ]] || { echo "VARIANT = $1: must be cpu or gpu" >&2; exit 2; }
  python3 -m venv "$2"
  "$2/bin/pip" install -q --no-cache-dir "$(pin pip)"
  if [ "$1" = cpu ]; then
    # Torch alone from TORCH_INDEX, so that no package can come from either index.
    "$2/bin/pip" install -q --no-cache-dir --no-deps "$(pin torch)" ${3:+--index-url "$3"}
    "$2/bin/pip" install -q --no-cache-dir --no-deps -r <(pins | grep -v '^torch==')
  else
    "$2/bin/pip" install -q --no-cache-dir -r <(requirements gpu) -c "$root/constraints/gpu.txt"
  fi
}

# package VENV WHEEL LINK: the package alone, and LINK to the demo's model and data in it.
package() {
  "$1/bin/pip" install -q --no-cache-dir --no-deps "$2"
  ln -sfn "$(cd / && "$1/bin/python" - <<'END'
from importlib.util import find_spec
print(find_spec("sere_ray").submodule_search_locations[0] + "/assets")
END
  )" "$3"
}

# check VENV LINK: what the image must be able to do, without a network, as any user.
check() {
  "$1/bin/sere-ray" --version
  "$1/bin/ray" --version
  "$1/bin/python" -c 'import vllm, ray.serve.llm; from sere_ray.serve import build_app'
  test -f "$2/model/config.json"
  test -f "$2/data/calibration.jsonl"
}

"$@"
