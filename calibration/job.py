"""What a Ray job runs: `sere-ray calibrate --ray` on the cluster that the job was submitted to.

    ray job submit --working-dir calibration -- \
        python job.py MODEL --data TEXT --out /shared/MODEL.sere.safetensors

sere_ray itself is installed on the cluster's nodes; MODEL, TEXT and OUT are paths there. All
options of `sere-ray calibrate` may follow. Submitted again after it was killed, the job goes on
where it was.
"""

import sys

from sere_ray.cli.main import app

if __name__ == "__main__":
    app(["calibrate", "--ray", "--ray-address", "auto", *sys.argv[1:]])
