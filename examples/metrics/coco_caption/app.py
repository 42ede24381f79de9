"""The Space's page: the metric on captions that a visitor types."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("coco_caption.py"))))
