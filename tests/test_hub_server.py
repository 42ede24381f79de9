"""The stand-in Hub serves the real clients. Each test runs them in another process, outside this checkout."""

import hashlib
import subprocess
import sys
import textwrap

import pytest

from tests.hub_server import HubServer


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub, cwd, script):
    """Runs a client script. It must succeed, and send no request that the server does not know."""
    path = cwd / "client.py"
    path.write_text(textwrap.dedent(script))
    env = hub.client_env(cwd / "hf_home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n" + "\n".join(hub.requests)
    assert [request for request in hub.requests if request.endswith("-> 501")] == []
    return done.stdout


HUB_CLIENT = """
    import os
    from pathlib import Path

    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    )

    def raises(error, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except error as caught:
            return caught
        raise AssertionError(f"{call} did not raise {error}")

    api = HfApi()
    repo = "user/repo"
    assert api.whoami()["name"] == "user"
    assert not api.repo_exists(repo)
    assert api.create_repo("repo").repo_id == repo
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    assert raises(HfHubHTTPError, api.create_repo, repo).response.status_code == 409
    assert api.list_repo_files(repo) == []

    folder = Path("folder")
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(2**20))
    (folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# Repo\\n", encoding="utf-8")
    (folder / "sub" / "nöte.txt").write_text("première", encoding="utf-8")
    (folder / "empty").touch()
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
    assert first.repo_url.repo_id == repo

    info = api.model_info(repo, files_metadata=True)
    assert info.sha == first.oid and {s.rfilename: s.size for s in info.siblings} == {k: len(local[k]) for k in local}
    assert Path(hf_hub_download(repo, "weights.bin")).read_bytes() == local["weights.bin"]
    snapshot = Path(snapshot_download(repo))
    assert snapshot.name == first.oid
    assert {p.relative_to(snapshot).as_posix(): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == local
    assert sorted(e.path for e in api.list_repo_tree(repo)) == ["README.md", "empty", "sub", "weights.bin"]
    assert [e.path for e in api.list_repo_tree(repo, "sub")] == ["sub/nöte.txt"]
    assert [e.path for e in api.get_paths_info(repo, ["README.md", "sub", "none"])] == ["README.md", "sub"]

    assert api.file_exists(repo, "sub/nöte.txt") and not api.file_exists(repo, "none")
    raises(EntryNotFoundError, hf_hub_download, repo, "none")
    raises(EntryNotFoundError, list, api.list_repo_tree(repo, "none"))
    raises(RevisionNotFoundError, hf_hub_download, repo, "empty", revision="none")
    raises(RepositoryNotFoundError, hf_hub_download, "user/none", "empty")
    raises(RepositoryNotFoundError, api.model_info, "none")
    raises(HfHubHTTPError, api.upload_file, repo_id=repo, path_or_fileobj=b"x", path_in_repo="x", token=False)

    # Parts of a file can be read.
    with HfFileSystem().open(f"{repo}/weights.bin", block_size=1000) as file:
        file.seek(500_000)
        assert file.read(10) == local["weights.bin"][500_000:500_010]

    # Unchanged files make no commit; a change, an addition and a deletion make one.
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == first.oid
    (folder / "empty").unlink()
    (folder / "added.txt").write_text("added")
    (folder / "sub" / "nöte.txt").write_text("seconde", encoding="utf-8")
    second = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="second", delete_patterns="*")
    assert second.oid != first.oid
    assert Path(hf_hub_download(repo, "sub/nöte.txt")).read_text(encoding="utf-8") == "seconde"
    old = hf_hub_download(repo, "sub/nöte.txt", revision=first.oid, force_download=True)
    assert Path(old).read_text(encoding="utf-8") == "première"
    raises(HfHubHTTPError, api.delete_file, "added.txt", repo, parent_commit=first.oid)

    # Branches.
    api.create_branch(repo, branch="feature/a", revision=first.oid)
    api.create_branch(repo, branch="feature/a", exist_ok=True)
    api.delete_folder("sub", repo, revision="feature/a")
    assert api.list_repo_files(repo, revision="feature/a") == ["README.md", "empty", "weights.bin"]
    assert api.model_info(repo).sha == second.oid

    # Datasets are apart from models of the same name.
    api.create_repo(repo, repo_type="dataset")
    api.upload_file(repo_id=repo, repo_type="dataset", path_or_fileobj=b"a,b", path_in_repo="data.csv")
    assert Path(hf_hub_download(repo, "data.csv", repo_type="dataset")).read_bytes() == b"a,b"
    print(first.oid, second.oid)
"""


def test_huggingface_hub_client(hub, tmp_path):
    shas = run(hub, tmp_path, HUB_CLIENT).split()

    commits = hub.commits("user/repo")
    assert [commit["sha"] for commit in commits] == shas
    assert [commit["title"] for commit in commits] == ["first", "second"]
    assert commits[0]["files"] == ["README.md", "empty", "sub/nöte.txt", "weights.bin"]
    assert commits[1]["files"] == ["added.txt", "empty", "sub/nöte.txt"]

    folder = tmp_path / "folder"
    expected = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files("user/repo") == expected
    assert len(hub.files("user/repo")["weights.bin"]) == 2**20
    assert hub.files("user/repo", "datasets") == {"data.csv": b"a,b"}
    assert "GET /user/repo/resolve/main/weights.bin -> 206" in hub.requests


TRANSFORMERS_CLIENT = """
    import torch
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    before = model.embeddings.word_embeddings.weight.detach().clone()
    first = model.push_to_hub("user/tiny", commit_message="first")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 1
    second = model.push_to_hub("user/tiny", commit_message="second")

    loaded = BertModel.from_pretrained("user/tiny")
    assert torch.equal(loaded.embeddings.word_embeddings.weight, before + 1)
    loaded = AutoModel.from_pretrained("user/tiny", revision=first.oid)
    assert type(loaded) is BertModel and torch.equal(loaded.embeddings.word_embeddings.weight, before)
    print(first.oid, second.oid)
"""


def test_transformers_push_to_hub_and_from_pretrained(hub, tmp_path):
    shas = run(hub, tmp_path, TRANSFORMERS_CLIENT).split()

    first, second = hub.commits("user/tiny")
    assert [first["sha"], second["sha"]] == shas
    assert first["files"] == ["README.md", "config.json", "model.safetensors"]
    assert second["files"] == ["model.safetensors"]
    assert sorted(hub.files("user/tiny")) == first["files"]


REMOTE_CODE = {
    "config.json": """
        {
          "model_type": "remote_x", "architectures": ["XModel"], "size": 3,
          "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
        }
    """,
    "configuration_x.py": """
        from transformers import PreTrainedConfig


        class XConfig(PreTrainedConfig):
            model_type = "remote_x"
            size: int = 1
    """,
    "modeling_x.py": """
        import torch
        from transformers import PreTrainedModel

        from .configuration_x import XConfig


        class XModel(PreTrainedModel):
            config_class = XConfig

            def __init__(self, config):
                super().__init__(config)
                self.scale = torch.nn.Parameter(torch.zeros(config.size))
                self.post_init()

            def _init_weights(self, module):
                pass

            def forward(self, x):
                return x * self.scale
    """,
}

REMOTE_CODE_CLIENT = """
    import shutil

    import torch
    from huggingface_hub import HfApi
    from safetensors.torch import save_file
    from transformers import AutoModel

    save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, "pushed/model.safetensors", metadata={"format": "pt"})
    api = HfApi()
    api.create_repo("user/x")
    api.upload_folder(repo_id="user/x", folder_path="pushed")
    shutil.rmtree("pushed")

    model = AutoModel.from_pretrained("user/x", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(model.config).__module__.startswith("transformers_modules.") and model.config.size == 3
    assert model(torch.ones(3)).tolist() == [1.0, 2.0, 3.0]
"""


def test_remote_code_is_loaded_from_the_hub(hub, tmp_path):
    (tmp_path / "pushed").mkdir()
    for name, text in REMOTE_CODE.items():
        (tmp_path / "pushed" / name).write_text(textwrap.dedent(text).lstrip())
    run(hub, tmp_path, REMOTE_CODE_CLIENT)

    assert sorted(hub.files("user/x")) == sorted([*REMOTE_CODE, "model.safetensors"])
    assert [request for request in hub.requests if request.endswith("/modeling_x.py -> 200")]


def test_commit_ids_are_stable(tmp_path):
    def push():
        with HubServer() as hub:
            script = """
                from huggingface_hub import HfApi
                HfApi().create_repo("user/a")
                HfApi().upload_file(repo_id="user/a", path_or_fileobj=b"a", path_in_repo="a.txt")
            """
            run(hub, tmp_path, script)
            return hub.commits("user/a")

    (first,), (second,) = push(), push()
    assert first == second and len(bytes.fromhex(first["sha"])) == hashlib.sha1().digest_size
