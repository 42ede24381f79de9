"""Measures time and peak memory of a video's soft prompt, from 1 to 256 frames.

    python -m benchmarks.video_speed

A ViT-S tower (12 blocks, width 384, 224 pixels, random weights) and a TomeFormer of the same width run at inference in
float32. Frames are encoded alone and averaged, or see each other in the temporal contextualizer, or are merged. Each
point runs in a new process, so that its peak memory is its own.
"""

from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .timing import argument_parser, in_new_process, markdown_table, measure, peak_megabytes

VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

FRAMES = (1, 4, 16, 64, 256)  # lengths of the videos
MODES: dict[str, dict[str, Any]] = {
    "mean of frames": {},
    "temporal contextualizer": {"temporal_contextualizer": True},
    "merged frames": {"video_mode": "merge"},
}


@torch.no_grad()
def measure_frames(fields: dict[str, Any], frames: int, rounds: int) -> tuple[float, float]:
    """Returns the seconds of the median round, and the peak memory in MB beyond that of the model with one frame."""
    torch.manual_seed(0)
    config = EVLGenConfig(
        vision_config=CLIPVisionConfig(**VIT_S, image_size=224, patch_size=16),
        connector_config={**VIT_S, "merge_r": 14},
        text_config=LlamaConfig(**TEXT),
        **fields,
    )
    model = EVLGenForConditionalGeneration(config).eval()
    videos = torch.randn(1, frames, 3, 224, 224)
    model.get_video_features(videos[:, :1])
    before = peak_megabytes()
    seconds = median(measure(lambda: model.get_video_features(videos)) for _ in range(rounds))
    return seconds, peak_megabytes() - before


def main(argv: list[str] | None = None) -> None:
    rounds = argument_parser(__doc__, rounds=3).parse_args(argv).rounds
    rows = []
    for frames in FRAMES:
        row = [frames]
        for fields in MODES.values():
            seconds, megabytes = in_new_process(measure_frames, fields, frames, rounds)
            row += [f"{1e3 * seconds / frames:.1f} ms", f"{megabytes:.0f} MB"]
        rows.append(row)
    columns = [column for mode in MODES for column in (f"{mode}: time per frame", "memory")]
    print(markdown_table(["frames", *columns], rows))


if __name__ == "__main__":
    main()
