"""The page of the Space, on which a visitor scores the answer to one question."""

from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).parent
metric = evaluate.load(str(FOLDER / "vqa_accuracy.py"))


def score(prediction: str, answers: str, benchmark: str) -> float:
    people = [line.strip() for line in answers.splitlines() if line.strip()]
    try:
        return metric.compute(predictions=[prediction], references=[people], benchmark=benchmark)["accuracy"]
    except (ValueError, ImportError) as error:
        raise gr.Error(str(error)) from error


def main() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8").split("---", 2)[2]
    interface = gr.Interface(
        score,
        inputs=[
            gr.Textbox(label="The model's answer", value="Blue."),
            gr.Textbox(label="Answers of people, one in each line", lines=10, value="blue\n" * 2 + "navy\n" * 8),
            gr.Radio(["vqav2", "ok-vqa", "gqa"], label="Rule of the benchmark", value="vqav2"),
        ],
        outputs=gr.Number(label="Accuracy [%]"),
        title="VQA accuracy",
        description=metric.info.description,
        article=card,
    )
    interface.launch()


if __name__ == "__main__":
    main()
