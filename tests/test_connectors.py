"""The TomeFormer's peers: BLIP-2's Q-Former and an MLP, in the same model, processor, scripts and checkpoints."""

import json
import re
import shutil
from pathlib import Path

import caption_folder
import pretrain
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import layer_norm
from transformers import AutoModel, BertConfig, BertModel, Blip2QFormerModel

from common.models import load_own_connector
from configuration_evlgen import (
    CONNECTOR_CONFIGS,
    EVLGenConfig,
    MLPConnectorConfig,
    QFormerConnectorConfig,
    TomeFormerConfig,
)
from modeling_evlgen import EVLGenForConditionalGeneration, MLPConnector, QFormerConnector

from .helpers import (
    generate_new,
    modules_cache,
    noise_images,
    run_clean,
    save_image_folder,
    save_towers,
    tiny_model,
    tiny_processor,
)
from .placeholders import save_connector
from .training import arguments, assert_same_weights, save_captioner, save_recipe

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


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with the page's connector and a recipe that trains it."""
    folder = tmp_path_factory.mktemp("own")
    save_connector(folder / "perceiver.py")
    save_image_folder(folder / "data", train=8, test=4)
    recipe = {**save_towers(folder), "dataset": folder / "data", "connector": folder / "perceiver.py:Perceiver"}
    recipe["connector_config"] = {**SIZES, **LAYERS, "num_query_tokens": 5, "merge_r": 3}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2, "save_steps": 1}
    return save_recipe(folder, **recipe, **sizes, dataloader_num_workers=0, max_new_tokens=3)


def test_a_connector_of_ones_own_is_trained_and_resumed_from_its_file(own, tmp_path, caplog):
    pretrain.main(arguments(own, tmp_path / "run"))
    assert "perceiver.py:Perceiver has no fields merge_r" in caplog.text.replace(f"{own}/", "")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["connector_config"]["num_query_tokens"] == 5
    assert (tmp_path / "run" / "checkpoint-1" / "perceiver.py").exists()
    assert str(own) not in (tmp_path / "run" / "checkpoint-1" / "run.json").read_text()
    resume = tmp_path / "run" / "checkpoint-1"
    pretrain.main(arguments(own, tmp_path / "again", resume_from_checkpoint=resume))
    assert_same_weights(tmp_path / "again", tmp_path / "run")
    (tmp_path / "perceiver.py").write_text((own / "perceiver.py").read_text() + "\n")
    changes = {"resume_from_checkpoint": resume, "connector": tmp_path / "perceiver.py:Perceiver"}
    with pytest.raises(ValueError, match="`connector's file` was"):
        pretrain.main(arguments(own, tmp_path / "again", **changes))


USE_OWN = """
from transformers import AutoModel, pipeline
captioner = pipeline("image-to-text", model="model", trust_remote_code=True)
captioner.model.save_pretrained("again")
captioner.processor.save_pretrained("again")
for captioner in (captioner, pipeline("image-to-text", model="again", trust_remote_code=True)):
    print(ascii(captioner("a.png", do_sample=False, max_new_tokens=8)[0]["generated_text"]))
AutoModel.from_pretrained("again", trust_remote_code=True)
AutoModel.from_pretrained("again", trust_remote_code=False)
"""


@pytest.fixture
def checkpoint(own, tmp_path):
    """A folder with a checkpoint of the page's connector, which this process does not know, and its caption."""
    load_own_connector(f"{own}/perceiver.py:Perceiver")
    model = tiny_model(model_type="my_perceiver", num_query_tokens=5)
    processor = tiny_processor(model)
    save_captioner(tmp_path / "model", model)
    del CONNECTOR_CONFIGS["my_perceiver"]
    noise_images(1)[0].save(tmp_path / "a.png")
    new = generate_new(model, processor(images=noise_images(1)[0]))
    return tmp_path, processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_a_checkpoint_brings_its_own_connector_into_a_clean_process(checkpoint):
    folder, caption = checkpoint
    with pytest.raises(AssertionError, match="Please pass the argument `trust_remote_code=True`") as failed:
        run_clean(USE_OWN, folder)
    assert str(failed.value).splitlines().count(ascii(caption)) == 2


@pytest.fixture
def folder_of_code(checkpoint):
    with modules_cache(checkpoint[0] / "modules"):
        yield


@pytest.mark.usefixtures("folder_of_code")
def test_evlgen_runs_a_checkpoints_connector_only_when_it_is_trusted(checkpoint, monkeypatch):
    folder, caption = checkpoint
    monkeypatch.chdir(folder)
    command = ["--model", "model", "--inputs", "a.png", "--max_new_tokens", "8", "--output_dir"]
    with pytest.raises(ValueError, match="pass the argument `trust_remote_code=True`"):
        EVLGenForConditionalGeneration.from_pretrained("model")
    with pytest.raises(ValueError, match=r"`model_type` must be .* needs `trust_remote_code=True`"):
        AutoModel.from_pretrained("model", trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        caption_folder.main([*command, "refused"])
    caption_folder.main([*command, "captions", "--trust_remote_code"])
    (row,) = map(json.loads, Path("captions/captions.jsonl").read_text().splitlines())
    assert caption in row.values()
    del CONNECTOR_CONFIGS["my_perceiver"]
    model = EVLGenForConditionalGeneration.from_pretrained("model", trust_remote_code=True)
    model.save_pretrained("again")
    assert Path("again/perceiver.py").read_text() == Path("model/perceiver.py").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Perceiver(", "class Resampler(", r"perceiver\.py has no class Perceiver"),
        ("class Perceiver(ConnectorPreTrainedModel)", "class Perceiver(nn.Module)", "must be a class that inherits"),
        ("    config: PerceiverConfig\n", "", "must name its configuration, as in `config: PerceiverConfig`"),
        ("my_perceiver", "tomeformer", "needs a `model_type` of its own, but has 'tomeformer'"),
        ("def default_budget", "def budget", "PerceiverConfig lacks `default_budget`"),
        (", places=None", "", r"must have a file and `forward\(self, inputs_embeds, tiles, budget, places\)`"),
        (
            "import torch\n",
            "from configuration_evlgen import ConnectorConfig\n",
            "write `from configuration_evlgen import ConnectorConfig` as",
        ),
        ("import torch\n", "from my_layers import Layer\n", "No module named 'my_layers'"),
        ("return self.num_query_tokens", "return 7", r"`last_hidden_state` must be \(1, 7, 32\), but is \(1, 5, 32\)"),
        ("BaseModelOutput(last_hidden_state=queries)", "queries", "fails on .* tokens: .* 'last_hidden_state'"),
    ],
)
def test_what_a_connectors_file_lacks_is_named(old, new, message, own, tmp_path):
    code = (own / "perceiver.py").read_text()
    assert old in code
    (tmp_path / "perceiver.py").write_text(code.replace(old, new))
    with pytest.raises((ValueError, ImportError), match=message):
        pretrain.main(arguments(own, tmp_path / "run", connector=tmp_path / "perceiver.py:Perceiver"))


def test_a_connectors_file_must_exist_and_not_take_the_name_of_another(own, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_own_connector(f"{tmp_path}/perceiver.py:Perceiver")
    for name in ("video.py", "my-file.py"):
        shutil.copy(own / "perceiver.py", tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} must have another name"):
            load_own_connector(f"{tmp_path / name}:Perceiver")
    with pytest.raises(ValueError, match="`connector` must be tomeformer, qformer, mlp, or a file"):
        pretrain.main(arguments(own, tmp_path / "run", connector="perceiver"))
