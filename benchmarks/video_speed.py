"""What a video costs: time and peak memory of its soft prompt, from 1 to 256 frames.

    python -m benchmarks.video_speed

A ViT-S tower (12 blocks, width 384, 224 pixels, random weights) and a TomeFormer of the same width, at inference in
float32: as the mean of frames that do not see each other, and with the temporal contextualizer. Each point runs in a
process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

FRAMES = (1, 4, 16, 64, 256)


def measure(frames: int, temporal: bool, rounds: int) -> dict[str, float]:
    """Seconds of the median round, and peak memory in MB over that of the model itself."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from configuration_evlgen import EVLGenConfig
    from modeling_evlgen import EVLGenForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    config = EVLGenConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=224, patch_size=16),
        connector_config={**sizes, "merge_r": 14},
        text_config=LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
        temporal_contextualizer=temporal,
    )
    model = EVLGenForConditionalGeneration(config).eval()
    videos = torch.randn(1, frames, 3, 224, 224)
    with torch.no_grad():
        model.get_video_features(videos[:, :1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            model.get_video_features(videos)
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "megabytes": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="Rounds over which the median is taken.")
    parser.add_argument("--point", nargs=2, type=int, help=argparse.SUPPRESS)  # frames, temporal
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.point[0], bool(arguments.point[1]), arguments.rounds)))
        return
    print(f"{'':8}{'mean of frames':>26}{'temporal contextualizer':>30}")
    print(f"{'frames':8}{'ms / frame':>13}{'peak MB':>13}{'ms / frame':>17}{'peak MB':>13}")
    for frames in FRAMES:
        cells = []
        for temporal in (0, 1):
            command = [
                sys.executable,
                "-m",
                "benchmarks.video_speed",
                "--rounds",
                str(arguments.rounds),
                "--point",
                str(frames),
                str(temporal),
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            cells.append(json.loads(output.splitlines()[-1]))
        mean, context = cells
        print(
            f"{frames:<8}{1e3 * mean['seconds'] / frames:13.1f}{mean['megabytes']:13.0f}"
            f"{1e3 * context['seconds'] / frames:17.1f}{context['megabytes']:13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
