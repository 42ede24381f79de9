"""The page of the Space, on which a visitor scores captions."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("coco_caption.py"))))
