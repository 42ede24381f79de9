"""The demo's image data sets, by the names that `--dataset` takes."""

from functools import partial

from common.demo.crowded_scenes import load_crowded_scenes
from common.demo.easy_vqa import load_easy_vqa, load_easy_vqa_questions
from common.demo.scenes import load_scenes

DEMO_DATASETS = {
    "openmoji-scenes": load_scenes,
    "crowded-scenes": load_crowded_scenes,
    "crowded-stamps": partial(load_crowded_scenes, stamps=True),
    "easy-vqa": load_easy_vqa,
    "easy-vqa-questions": load_easy_vqa_questions,
}
