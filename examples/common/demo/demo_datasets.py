"""The demo's image data sets, by the names that `--dataset` takes."""

from common.demo.crowded_scenes import load_crowded_scenes
from common.demo.easy_vqa import load_easy_vqa, load_easy_vqa_questions
from common.demo.scenes import load_scenes

DEMO_DATASETS = {
    "openmoji-scenes": load_scenes,
    "crowded-scenes": load_crowded_scenes,
    "easy-vqa": load_easy_vqa,
    "easy-vqa-questions": load_easy_vqa_questions,
}
