"""The pipelines `image-to-text` and `video-to-text` of EVLGen's checkpoints."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, Pipeline

from modeling_evlgen.explanations import explain_sequences, generate_once

_WORD = ("word", "probability", "confidence", "evidence", "box", "frame")
_PROCESSOR_ARGUMENTS = {"max_tiles", "num_image_tokens", "num_frames", "fps"}


class EVLGenImageToTextPipeline(Pipeline):
    """Captions images, or answers a prompt about them, as in `captioner("a.png", prompt="What is it?")`."""

    modality = "image"
    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=50)

    def __call__(self, images: Any, **kwargs: Any) -> list[Any] | Iterator[Any]:
        """
        Args:
            images:
                A PIL image, a path, a URL or a base64 string; a dict with one of these under `"image"` and optionally
                a `"prompt"`; or a list, a generator, or a data set or column of `datasets` with these.
            kwargs:
                `prompt` (`str`, by default empty), `batch_size`, the processor's `max_tiles`, `num_image_tokens`,
                `num_frames` and `fps`, and any argument of `generate`. `return_words=True` explains each word.

        Returns:
            For one image, `[{"generated_text": str}, …]` with `num_return_sequences` entries. For a list, a list of
            these. For a data set or a generator, an iterator over these. With `return_words` each entry has `"words"`,
            a list of dicts with fields of [`ExplainedWord`]: `word`, `probability`, `confidence`, `evidence`, `box`
            and `frame`.
        """
        # transformers takes torch's data sets and generators as many images, and anything else as one.
        if type(images).__module__.startswith("datasets."):
            images = (row for row in images)
        if isinstance(images, list) and not images:  # transformers looks at the first entry
            return []
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self, prompt: str | None = None, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_parameters = {name: kwargs.pop(name) for name in _PROCESSOR_ARGUMENTS & kwargs.keys()}
        if prompt is not None:
            preprocess_parameters["prompt"] = prompt
        return preprocess_parameters, {**(generate_kwargs or {}), **kwargs}, {}

    def preprocess(self, inputs: Any, prompt: str = "", **arguments: Any) -> dict[str, torch.Tensor]:
        if isinstance(inputs, dict) and self.modality in inputs:
            inputs, prompt = inputs[self.modality], inputs.get("prompt", prompt)
        if inputs is None:  # the processor would take the prompt alone
            raise ValueError(f"`{self.modality}s` must not hold None.")
        batch = self.processor(**{f"{self.modality}s": inputs}, text=prompt, return_tensors="pt", **arguments)
        if "pixel_values_videos" in batch:  # transformers pads videos in a batch, and a mask only if each has one
            batch.setdefault("frame_mask", torch.ones_like(batch["frame_times"], dtype=torch.bool))
        return dict(batch)

    def _forward(
        self, model_inputs: dict[str, torch.Tensor], return_words: bool = False, **generate_kwargs: Any
    ) -> dict[str, Any]:
        batch, prompt_length = model_inputs["input_ids"].shape
        # Private, but there is no public way to the defaults that transformers' own pipelines give to `generate`.
        if hasattr(self, "_prepare_generate_kwargs"):
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        else:  # transformers before 5.20 keeps its defaults in the pipeline's own configuration
            generate_kwargs = {"generation_config": self.generation_config, **generate_kwargs}
        words: list[Any] = []
        if return_words:
            model_inputs, sequences = generate_once(self.model, model_inputs, **generate_kwargs)
            words = explain_sequences(self.model, self.processor, model_inputs, sequences)
        else:
            sequences = self.model.generate(**model_inputs, **generate_kwargs)  # (batch * returned, sequence)
        new_tokens = sequences[:, prompt_length:].reshape(batch, -1, sequences.shape[1] - prompt_length)
        returned = new_tokens.shape[1]
        of_rows = [tuple(words[row * returned : (row + 1) * returned]) for row in range(batch)]
        return {"generated": new_tokens, "words": of_rows}  # (batch, returned, new tokens), and of each row a tuple

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        texts = self.processor.batch_decode(model_outputs["generated"][0], skip_special_tokens=True)
        results: list[dict[str, Any]] = [{"generated_text": text.strip()} for text in texts]
        words = model_outputs["words"]
        words = words[0] if isinstance(words, list) else words  # transformers takes batches of several apart
        for result, explained in zip(results, words, strict=False):
            result["words"] = [{name: getattr(word, name) for name in _WORD} for word in explained]
        return results


class EVLGenVideoToTextPipeline(EVLGenImageToTextPipeline):
    """Captions videos, or answers a prompt about them. A list is several videos; frames are `{"video": [...]}`."""

    modality = "video"
