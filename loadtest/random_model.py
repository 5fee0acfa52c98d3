"""A deployment whose experts exceed a CPU's cache: random weights, the demo's tokenizer.

    python loadtest/random_model.py out/random            # model, artifact, deployment file
    sere-ray serve --config out/random/deployment.yaml

Its answers mean nothing; its steps take what such a model's steps take.
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml

from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.demo import assets
from sere_ray.evaluation.models import get_model


def main():
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="random-e128", choices=["random-e128", "random-e64"])
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    folder = options.folder.resolve()
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for file in assets.MODEL.glob("*token*"):
        shutil.copy(file, folder / "model" / file.name)
    template = assets.MODEL / "chat_template.jinja"
    if template.exists():
        shutil.copy(template, folder / "model" / template.name)
    # The output layer must not name tokens that the tokenizer lacks.
    vocabulary = assets.model_config()["vocab_size"]
    config = {**get_model(options.model).config, "vocab_size": vocabulary}
    (folder / "model" / "config.json").write_text(json.dumps(config, indent=1))
    synthetic_artifact(folder / "model", seed=0).save(folder / "synthetic.safetensors")
    (folder / "deployment.yaml").write_text(yaml.safe_dump(deployment(options, folder)))
    print(folder / "deployment.yaml")


def deployment(options, folder):
    """One rank with all experts, 16 rows, eager: as `make benchmark` measures."""
    arguments = {
        "model": str(folder / "model"),
        "model_id": options.model,
        "sere": {
            "similarity": str(folder / "synthetic.safetensors"),
            "select_top_k": 2,
            "min_primary_experts": 0,
        },
        "engine": {
            "load_format": "dummy",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "enable_prompt_tokens_details": True,
            "kv_cache_memory_bytes": 1 << 28,
        },
    }
    application = {"name": "random", "import_path": "sere_ray.serve:build_app", "args": arguments}
    return {
        "http_options": {"host": "127.0.0.1", "port": options.port},
        "applications": [application],
    }


if __name__ == "__main__":
    main()
