"""A deployment of random weights: a model beyond a CPU's cache, or in the shapes of a public one.

    python loadtest/random_model.py out/random            # model, artifact, deployment file
    sere-ray serve --config out/random/deployment.yaml
    python loadtest/random_model.py out/random --model qwen3-30b-a3b --streams 128     # on a GPU
    python loadtest/random_model.py out/random --model qwen3-30b-a3b --streams 128 --ranks 2
    python loadtest/random_model.py out/random --target-tpot-ms 10      # has levels for mode `auto`

Its answers mean nothing; its steps take what such a model's steps take. The tokenizer is the
demo's, with a word for each token that it lacks.
"""

import argparse
from pathlib import Path

import yaml

from sere_ray.bench.engines import gpu_engine, write_config
from sere_ray.bench.models import PUBLIC, get_model, write_tokenizer
from sere_ray.calibration.synthetic import synthetic_artifact

MODEL_LENGTH = 512


def main():
    """Write the folder."""
    options = parse()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = get_model(options.model)
    checkpoint = write_config(model, folder)
    write_tokenizer(checkpoint, model.config["vocab_size"])
    artifact = folder / "synthetic.safetensors"
    synthetic_artifact(checkpoint, seed=0).save(artifact)
    file = folder / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment(options, model, checkpoint, artifact)))
    print(file)


def deployment(options, model, checkpoint, artifact):
    """On a CPU eager, as `make benchmark` measures; on GPUs with graphs of the streams' sizes."""
    on_gpu = options.model in PUBLIC
    own = (
        gpu_engine(model, options.streams, MODEL_LENGTH)
        if on_gpu
        else {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    )
    arguments = {
        "model": str(checkpoint),
        "model_id": options.model,
        "device": "gpu" if on_gpu else "cpu",
        "data_parallel_size": options.ranks,
        "sere": {
            "similarity": str(artifact),
            "select_top_k": 2,
            "min_primary_experts": 0,
        },
        "engine": {
            "load_format": "dummy",
            "max_model_len": MODEL_LENGTH,
            "max_num_seqs": options.streams,
            "enable_prompt_tokens_details": True,
            **own,
        },
    }
    if options.target_tpot_ms is not None:
        levels = [{"select_top_k": k} for k in (4, 2, 1)]
        pace = {"interval_s": 1, "patience": 2}  # so that a load of seconds sees where it leads
        arguments["auto"] = {"tpot_ms": options.target_tpot_ms, "levels": levels, **pace}
    application = {"name": "random", "import_path": "sere_ray.serve:build_app", "args": arguments}
    return {
        "http_options": {"host": "127.0.0.1", "port": options.port},
        "applications": [application],
    }


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    models = ["random-e128", "random-e64", *PUBLIC]
    parser.add_argument("--model", default="random-e128", choices=models)
    parser.add_argument("--streams", type=int, default=16, help="rows of a rank at most")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel, with expert parallel")
    parser.add_argument("--target-tpot-ms", type=float, help="of mode `auto`, p90")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
