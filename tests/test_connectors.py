"""The TomeFormer's peers: BLIP-2's Q-Former and an MLP, in the same model, processor, scripts and checkpoints."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import layer_norm
from transformers import AutoModel, BertConfig, BertModel, Blip2QFormerModel

from configuration_evlgen import EVLGenConfig, MLPConnectorConfig, QFormerConnectorConfig, TomeFormerConfig
from modeling_evlgen import EVLGenForConditionalGeneration, MLPConnector, QFormerConnector

from .helpers import generate_new, noise_images, run_clean, save_towers, tiny_model, tiny_processor
from .training import save_captioner

SIZES = {"hidden_size": 32, "intermediate_size": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER = {"num_query_tokens": 5, "position_initializer_range": 0.1}
PEERS = {
    "qformer": {"model_type": "evlgen_qformer", **QFORMER},
    "mlp": {"model_type": "evlgen_mlp"},
    "pooled": {"model_type": "evlgen_mlp", "pool_size": 2, "residual": True},
}
TOKENS = {"qformer": 5, "mlp": 17, "pooled": 5}  # CLIP's 16 patches and a class token


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_is_trained_in_place_of_the_tomeformer(peer):
    model = tiny_model(**PEERS[peer]).train()
    assert model.config.num_image_tokens == TOKENS[peer]
    batch = tiny_processor(model)(images=noise_images(2), suffix=["a red circle", "a blue triangle"])
    model(**batch).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("connector.") for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_a_checkpoint_of_a_peer_loads_in_a_clean_process(peer, tmp_path):
    model = tiny_model(**PEERS[peer])
    processor = tiny_processor(model)
    save_captioner(tmp_path / "model", model)
    image = noise_images(1)[0]
    image.save(tmp_path / "a.png")
    new = generate_new(model, processor(images=image))
    code = """
from transformers import pipeline
captioner = pipeline("image-to-text", model="model", trust_remote_code=True)
print(ascii(captioner("a.png", do_sample=False, max_new_tokens=8)[0]["generated_text"]))
"""
    caption = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert run_clean(code, tmp_path).splitlines()[-1] == ascii(caption)


def test_the_qformer_is_transformers_own_with_queries_and_positions():
    torch.manual_seed(0)
    connector = AutoModel.from_config(QFormerConnectorConfig(**SIZES, **LAYERS, **QFORMER)).eval()
    assert isinstance(connector, QFormerConnector)
    tokens = torch.randn(2, 9, 32)
    qformer = Blip2QFormerModel(connector.qformer.config).eval()
    qformer.load_state_dict(connector.qformer.state_dict())
    expected = qformer(
        query_embeds=connector.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=layer_norm(tokens + connector.position_embeddings.weight[:9], (32,), eps=1e-12),
    ).last_hidden_state
    torch.testing.assert_close(connector(tokens).last_hidden_state, expected)
    assert connector.query_tokens.std().item() == pytest.approx(0.02, rel=0.3)
    assert connector.position_embeddings.weight.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("class_token", [True, False])
def test_queries_attend_to_the_most_distinctive_tokens_and_the_mean_of_the_others(class_token):
    torch.manual_seed(0)
    fields = {**SIZES, **LAYERS, **QFORMER, "position_initializer_range": 1.0, "class_token": class_token}
    connector = AutoModel.from_config(QFormerConnectorConfig(**fields, num_distinctive_tokens=3)).eval()
    tokens = 1 + 0.1 * torch.randn(1, 20, 32)
    tokens[0, 9] *= 5  # directions count, not lengths
    distinctive = [4, 6, 17]
    tokens[0, distinctive] = torch.randn(3, 32)
    embedded, prefix = connector.embed_tokens(tokens), int(class_token)
    others = [index for index in range(prefix, 20) if index not in distinctive]
    read = [embedded[:, :prefix], embedded[:, others].mean(dim=1, keepdim=True), embedded[:, distinctive]]
    queries = connector.query_tokens[:, :2]
    expected = connector.qformer(query_embeds=queries, encoder_hidden_states=torch.cat(read, dim=1)).last_hidden_state
    output = connector(tokens, budget=2)
    torch.testing.assert_close(output.last_hidden_state, expected)
    (index,) = output.layer_index
    assert index[0, distinctive].tolist() == [prefix + 1, prefix + 2, prefix + 3]
    assert set(index[0, others].tolist()) == {prefix}
    plain = AutoModel.from_config(QFormerConnectorConfig(**fields)).eval()
    plain.load_state_dict(connector.state_dict())
    few = tokens[:, : 3 + prefix]  # all of them are kept
    torch.testing.assert_close(connector(few).last_hidden_state, plain(few).last_hidden_state)


def test_an_mlp_is_two_linear_maps_on_each_token():
    torch.manual_seed(0)
    connector = MLPConnector(MLPConnectorConfig(**SIZES))
    tokens = torch.randn(2, 7, 32)
    normed = layer_norm(tokens, (32,), eps=1e-12)
    hidden = torch.nn.functional.gelu(normed @ connector.dense_1.weight.T + connector.dense_1.bias)
    expected = hidden @ connector.dense_2.weight.T + connector.dense_2.bias
    torch.testing.assert_close(connector(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("class_token", [True, False])
def test_an_mlp_can_start_as_the_mean_of_neighbouring_patches_with_output_positions(class_token):
    fields = {"pool_size": 2, "residual": True, "branch_initializer_range": 0.0, "class_token": class_token}
    config = MLPConnectorConfig(**SIZES, **fields, output_position_initializer_range=1.0, max_position_embeddings=17)
    connector, tokens = MLPConnector(config), torch.randn(2, 16 + class_token, 32)
    grid = tokens[:, int(class_token) :].view(2, 2, 2, 2, 2, 32)
    pooled = torch.cat([tokens[:, : int(class_token)], grid.mean(dim=(2, 4)).flatten(1, 2)], dim=1)
    assert pooled.shape[1] == config.default_budget(16 + class_token)
    positions = connector.output_position_embeddings.weight
    expected = layer_norm(pooled, (32,), eps=1e-12) + positions[: pooled.shape[1]]
    torch.testing.assert_close(connector(tokens).last_hidden_state, expected)
    assert positions.std().item() == pytest.approx(1.0, rel=0.15)
    assert connector.dense_1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_fields_of_another_connector_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"QFormerConnectorConfig does not have: \['merge_r'\]"):
        tiny_model(**PEERS["qformer"], merge_r=3)
    towers, bert = save_towers(tmp_path), save_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match="`connector_model` is for a TomeFormer or a Q-Former"):
        EVLGenForConditionalGeneration.from_vision_text_pretrained(
            **towers, connector_model=bert, connector_config=PEERS["mlp"]
        )


def save_bert(folder):
    BertModel(BertConfig(**SIZES, num_hidden_layers=3, num_attention_heads=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_qformer_starts_from_bert_as_blip2s_does(prefix, tmp_path):
    """Cross-attention and queries are fresh. The feed-forward for queries is BERT's."""
    path = save_bert(tmp_path / "bert") / "model.safetensors"
    weights = {name: torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    old = {"weight": "gamma", "bias": "beta"} if prefix else {}  # as in bert-base-uncased
    names = [re.sub(r"(?<=LayerNorm\.)\w+", lambda found: old.get(found[0], found[0]), name) for name in weights]
    renamed = {prefix + name: tensor for name, tensor in zip(names, weights.values(), strict=True)}
    save_file(renamed, path, metadata={"format": "pt"})
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **save_towers(tmp_path), connector_model=path.parent, connector_config={**PEERS["qformer"], **LAYERS}
    )
    qformer = model.connector.qformer
    layer, name = qformer.encoder.layer[1], "encoder.layer.1."
    assert len(qformer.encoder.layer) == 2
    for parameter, bert_name in (
        (layer.attention.attention.key.weight, "attention.self.key.weight"),
        (layer.attention.output.LayerNorm.bias, "attention.output.LayerNorm.bias"),
        (layer.intermediate_query.dense.weight, "intermediate.dense.weight"),
        (layer.output_query.LayerNorm.weight, "output.LayerNorm.weight"),
    ):
        assert torch.equal(parameter, weights[name + bert_name])
    assert torch.equal(qformer.layernorm.weight, weights["embeddings.LayerNorm.weight"])
    cross = qformer.encoder.layer[0].crossattention.attention.key.weight
    assert 0.01 < cross.std() < 0.03
    assert 0.01 < model.connector.query_tokens.std() < 0.03
    assert 0.05 < model.connector.position_embeddings.weight.std() < 0.2


def test_old_checkpoints_have_a_tomeformer():
    """Configurations of the first version do not name their connector."""
    fields = tiny_model().config.to_dict()
    del fields["connector_config"]["model_type"]
    assert isinstance(EVLGenConfig.from_dict(fields).connector_config, TomeFormerConfig)
