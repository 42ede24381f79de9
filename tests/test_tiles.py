"""Images of several tiles, and any number of tokens for an image."""

import pytest
import torch

from configuration_evlgen import EVLGenConfig, MLPConnectorConfig, QFormerConnectorConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import LAYERS, join, tiny_model, tiny_towers

IMAGE, VIDEO = 300, 301  # placeholders


def elastic_model(vision="clip", **kwargs):
    model = tiny_model(vision, **kwargs)
    lowest = 2 if model.config.connector_config.class_token else 1
    model.config.image_token_range = [lowest, model.config.num_vision_tokens]
    return model


def pixels(count, seed=0, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def ids(*rows):
    """Token ids: an integer n stands for n image placeholders and a word, padded on the left."""
    rows = [[IMAGE] * row + [5] if isinstance(row, int) else row for row in rows]
    longest = max(map(len, rows))
    padded = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": padded, "attention_mask": mask}


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
@torch.no_grad()
def test_a_grid_of_one_tile_gives_what_the_image_gives(vision):
    model = tiny_model(vision)
    expected = model.get_image_features(pixels(2))
    output = model.get_image_features(pixels(2), image_grid_thw=torch.tensor([[1, 1, 1], [1, 1, 1]]))
    assert torch.equal(output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
@torch.no_grad()
def test_all_tiles_of_an_image_become_one_soft_prompt(vision):
    model = tiny_model(vision)
    output = model.get_image_features(pixels(6), image_grid_thw=torch.tensor([[1, 2, 3]]))
    budget = model.config.num_image_tokens
    assert output.pooler_output.shape == (1, budget, model.config.text_config.hidden_size)
    prefix = int(model.config.connector_config.class_token)
    assert output.output_index.shape == (1, 6 * (model.config.num_vision_tokens - prefix) + prefix)
    assert set(output.output_index[0].tolist()) == set(range(budget))
    other = model.get_image_features(pixels(6).flip(0), image_grid_thw=torch.tensor([[1, 2, 3]]))
    assert not torch.allclose(output.pooler_output, other.pooler_output, atol=1e-4)  # places of tiles count


@torch.no_grad()
def test_images_of_any_grids_and_budgets_in_a_batch_give_what_each_gives_alone():
    model = elastic_model()
    grids, budgets = torch.tensor([[1, 1, 2], [1, 1, 1], [1, 2, 1], [1, 1, 2]]), [4, 9, 17, 4]
    tiles = pixels(7)
    together = model.get_image_features(tiles, grids, budgets)
    first = 0
    for image, (grid, budget) in enumerate(zip(grids, budgets, strict=True)):
        last = first + int(grid.prod())
        alone = model.get_image_features(tiles[first:last], grid.unsqueeze(0), [budget])
        first = last
        assert together.pooler_output[image].shape[0] == budget
        torch.testing.assert_close(together.pooler_output[image], alone.pooler_output[0])
        assert torch.equal(together.output_index[image], alone.output_index[0])


@torch.no_grad()
def test_an_elastic_model_counts_the_placeholders_of_each_image():
    model = elastic_model()
    batch = ids(4, 9, [IMAGE] * 3 + [6] + [IMAGE] * 12 + [7])
    output = model(**batch, pixel_values=pixels(4))
    assert [len(prompt) for prompt in output.image_outputs.pooler_output] == [4, 9, 3, 12]
    explicit = model(**batch, pixel_values=pixels(4), image_budgets=torch.tensor([4, 9, 3, 12]))
    assert torch.equal(output.logits, explicit.logits)
    alone = model(**ids(9), pixel_values=pixels(4)[1:2])
    torch.testing.assert_close(alone.logits[0, -1], output.logits[1, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_that_touch_need_budgets_unless_they_have_the_default():
    """Their placeholders cannot be told apart, so another row's image could take them."""
    model = elastic_model()
    with pytest.raises(ValueError, match="holds 10 image placeholders, but the images give 22 tokens"):
        model(**ids(10), pixel_values=pixels(2))
    output = model(**ids(22), pixel_values=pixels(2))
    assert output.image_outputs.pooler_output.shape[:2] == (2, 11)
    output = model(**ids(10), pixel_values=pixels(2), image_budgets=[3, 7])
    assert [len(prompt) for prompt in output.image_outputs.pooler_output] == [3, 7]


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@torch.no_grad()
def test_generation_with_budgets_gives_what_each_image_gives_alone(generation):
    model, generation = elastic_model(), {"max_new_tokens": 5, "min_new_tokens": 5, **generation}
    if generation.get("do_sample"):
        generation["top_k"] = 1
    grids = torch.tensor([[1, 1, 1], [1, 2, 1]])
    together = model.generate(**ids(4, 12), pixel_values=pixels(3), image_grid_thw=grids, **generation)
    copies = generation.get("num_return_sequences", 1)
    first = model.generate(**ids(4), pixel_values=pixels(3)[:1], image_grid_thw=grids[:1], **generation)
    second = model.generate(**ids(12), pixel_values=pixels(3)[1:], image_grid_thw=grids[1:], **generation)
    assert torch.equal(together[:copies, -5:], first[:, -5:]) and torch.equal(together[copies:, -5:], second[:, -5:])


@pytest.mark.parametrize("budget", [0, 1, 18])
def test_a_budget_out_of_range_is_refused_with_the_range(budget):
    model = elastic_model()
    with pytest.raises(ValueError, match=rf"`image_budgets` must be .*\[{budget}\]"):
        model.get_image_features(pixels(1), image_budgets=[budget])
    if budget > 17:
        with pytest.raises(ValueError, match="`image_budgets` must be from 2 to 17"):
            model(**ids(budget), pixel_values=pixels(1))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 2, 2]], r"is \[\[1, 2, 2\]\], but the images have 3 tiles together"),
        ([[1, 3]], "must hold integers of shape"),
        ([[2, 3, 1]], "1 in its first column"),
    ],
)
def test_a_grid_that_does_not_fit_the_tiles_is_refused(grid, message):
    with pytest.raises(ValueError, match=f"`image_grid_thw`.*{message}"):
        tiny_model().get_image_features(pixels(3), image_grid_thw=torch.tensor(grid))


def test_budgets_and_placeholders_that_do_not_fit_are_refused():
    model = elastic_model()
    with pytest.raises(ValueError, match="`image_budgets` holds 1 numbers, but there are 2"):
        model.get_image_features(pixels(2), image_budgets=[4])
    for budgets in ([4.7, 4.2], [0, 4], "44"):
        with pytest.raises(ValueError, match="`image_budgets` must be an integer of 1 or more"):
            model.get_image_features(pixels(2), image_budgets=budgets)
    assert len(model.get_image_features(pixels(2), image_budgets=(3, 4)).pooler_output) == 2
    with pytest.raises(ValueError, match="holds 9 image placeholders, but the images give 8"):
        model(**ids(9), pixel_values=pixels(1), image_budgets=[8])


@pytest.mark.parametrize("rows", [[[3], [9]], [[3, 9]], [[4], [8]]])
def test_a_soft_prompt_does_not_go_on_in_another_place(rows):
    """As many placeholders as tokens, but an image would end in another row, or after a word."""
    model, images = elastic_model(), {"pixel_values": pixels(2), "image_budgets": [9, 3]}
    rows = [[token for n in row for token in [IMAGE] * n + [5]] for row in rows]
    with pytest.raises(ValueError, match=r"holds runs of .* image placeholders, but the images give \[9, 3\] tokens"):
        model(**ids(*rows), **images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):  # a graph has no messages
        compiled(**ids(*rows), **images)
    for each in (model, compiled):
        each(**ids(12), **images)  # images side by side
    videos = {"pixel_values_videos": pixels(4).unflatten(0, (2, 2)), "video_budgets": [9, 3]}
    with pytest.raises(ValueError, match=r"runs of \[3, 9\] video placeholders, but the videos give \[9, 3\] tokens"):
        model(torch.tensor([[VIDEO] * 3 + [5] + [VIDEO] * 9]), **videos)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_token_range": [1, 17]}, "`image_token_range`"),
        ({"image_token_range": [4, 18]}, "`image_token_range`"),
        ({"image_token_range": [2, 3]}, "`num_image_tokens` must be from 2 to 3, .* is 11"),
        ({"default_num_image_tokens": 9}, "`default_num_image_tokens` needs an"),
    ],
)
def test_a_range_that_the_connector_cannot_make_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EVLGenConfig.from_dict({**tiny_model().config.to_dict(), **given})


PEERS = {
    "qformer": QFormerConnectorConfig(**LAYERS, num_query_tokens=9, class_token=False),
    "pooled": MLPConnectorConfig(hidden_size=32, pool_size=3, class_token=False),
}


@pytest.mark.parametrize("connector", PEERS)
@torch.no_grad()
def test_peers_take_budgets_and_tiles(connector):
    model = join(*tiny_towers("siglip"), connector_config=PEERS[connector], image_token_range=[1, 9])
    output = model.get_image_features(pixels(3), torch.tensor([[1, 1, 2], [1, 1, 1]]), [4, 9])
    assert [len(prompt) for prompt in output.pooler_output] == [4, 9]
    with pytest.raises(ValueError, match="from 1 to 9"):
        model.get_image_features(pixels(1), image_budgets=[10])


@torch.no_grad()
def test_a_model_has_a_number_of_its_own_for_images_without_a_request(tmp_path):
    fields = {"connector_config": PEERS["qformer"], "image_token_range": [2, 9], "default_num_image_tokens": 4}
    model = join(*tiny_towers("siglip"), **fields)
    model.save_pretrained(tmp_path)
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert model.config.image_token_range == [2, 9]
    prompt = model.get_image_features(pixels(1)).pooler_output
    torch.testing.assert_close(prompt, model.get_image_features(pixels(1), image_budgets=[4]).pooler_output)
    assert model(**ids(4), pixel_values=pixels(1)).image_outputs.pooler_output.shape[1] == 4
    assert torch.compile(model, backend="eager")(**ids(4), pixel_values=pixels(1)).logits.shape[1] == 5


@pytest.mark.parametrize(("size", "shown"), [((32, 72), "4 x 9"), ((32, 24), "4 x 3")])
def test_tiles_of_a_grid_that_is_not_square_are_named(size, shown):
    vision = {"model_type": "vit", "image_size": size, "patch_size": 8, "hidden_size": 16}
    with torch.device("meta"):
        model = EVLGenForConditionalGeneration(EVLGenConfig(vision_config=vision))
    features = torch.zeros(2, model.config.num_vision_tokens, 16, device="meta")
    with pytest.raises(ValueError, match=f"`image_grid_thw` with several tiles needs .*, but this one gives {shown}"):
        model.project_vision_features(features, torch.tensor([[1, 1, 2]]))
