"""Published directories in: every tensor bit for bit, whatever is wrong named, nothing run."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gristmill import artifact
from gristmill.errors import Failure, InputError
from gristmill.hub import SpecialIds, assemble, importing, in_memory, read_published, write_published
from gristmill.hub.export import export_gguf, export_model
from gristmill.hub.folder import open_model
from gristmill.hub.importing import import_model
from gristmill.hub.tensors import INDEX, SINGLE, Weights
from gristmill.model import ModelConfig, Transformer
from gristmill.tokenizer import Tokenizer

Tiny = Callable[..., Transformer]
IDS = SpecialIds(eot_id=292, pad_id=297, im_end_id=299)
QWEN = {
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "clip_qkv": None,
    "head_size": 12,
    "moe_loss_weight": 0.001,
}
LAYOUTS = {"dbrx": {}, "qwen3_moe": QWEN, "qwen3_moe tied": {**QWEN, "tie_word_embeddings": True}}


@pytest.fixture
def publish(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small published directory with random weights, without a tokenizer."""

    def make(layout: str = "dbrx", dtype: torch.dtype = torch.bfloat16, shard: int = 40_000) -> Path:
        model, folder = tiny(**LAYOUTS[layout]), tmp_path / "published"
        folder.mkdir()
        write_published(folder, model.cfg, in_memory(model.state_dict()), IDS, dtype=dtype, max_shard_bytes=shard)
        return folder

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and x.view(torch.uint8).equal(b[name].view(torch.uint8))
        for name, x in a.items()
    )


def loaded(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: weight.load() for name, weight in weights.items()}


def edit(file: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# ---- what comes in is what was published ---------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [40_000, 10**9])
def test_export_of_an_import_and_import_of_an_export_are_bit_identical(
    publish: Callable[..., Path], tmp_path: Path, layout: str, dtype: torch.dtype, shard: int
) -> None:
    published = publish(layout, dtype, shard)
    ours = import_model(published, tmp_path / "ours").path
    again = export_model(ours, tmp_path / "again").path
    assert same_bits(stored(published), stored(again))
    assert read_published(again)[0] == read_published(published)[0] == open_model(ours).cfg
    back = import_model(again, tmp_path / "back").path
    assert same_bits(loaded(open_model(ours).weights), loaded(open_model(back).weights))
    assert not artifact.verify(ours).problems + artifact.verify(again).problems


def test_tensors_of_several_precisions_keep_their_own(publish: Callable[..., Path], tmp_path: Path) -> None:
    published = publish(shard=10**9)
    mixed = load_file(published / SINGLE)
    mixed = {name: t.float() if "router" in name or "norm" in name else t for name, t in mixed.items()}
    save_file(mixed, published / SINGLE)
    again = export_model(import_model(published, tmp_path / "ours").path, tmp_path / "again").path
    assert same_bits(mixed, stored(again))


def test_the_published_configuration_and_the_one_that_transformers_makes_of_it_mean_the_same(
    publish: Callable[..., Path],
) -> None:
    folder = publish()
    meant = read_published(folder)[0]

    def as_published(config: dict) -> None:
        del config["rope_parameters"], config["ffn_config"]["moe_normalize_expert_weights"]
        config["attn_config"] |= {"model_type": "", "clip_qkv": 8, "rope_theta": int(meant.rope_theta)}
        config["ffn_config"] |= {"model_type": "", "moe_jitter_eps": 0}
        config |= {"auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig"}, "torch_dtype": "bfloat16"}

    edit(folder / "config.json", as_published)
    assert read_published(folder)[0] == meant
    # transformers 5 reads that file, rotates by 10000 and saves so
    edit(folder / "config.json", lambda c: c.update(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}))
    assert read_published(folder)[0] == meant
    edit(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=7.0))
    with pytest.raises(InputError, match="two rotary bases"):
        read_published(folder)


def test_a_tied_model_may_hold_the_shared_matrix_twice_but_not_two_matrices(publish: Callable[..., Path]) -> None:
    folder = publish("qwen3_moe tied", shard=10**9)
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    assert "lm_head.weight" not in read_published(folder)[1]
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / SINGLE)
    with pytest.raises(InputError, match=r"lm_head.weight differs"):
        read_published(folder)


def test_settings_license_and_card_travel_and_code_does_not(
    publish: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = publish()
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, folder / file.name)
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    settings = {"temperature": 0.7, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.01, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"transformers_version": "4"}))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: some-open-license\n---\n# Card\n")
    (folder / "LICENSE").write_text("terms")
    for name in ("evil.py", "modeling_dbrx.py", "weights.bin"):
        (folder / name).write_text("raise SystemExit")
    ours = import_model(folder, tmp_path / "ours").path
    assert {file.name for file in ours.iterdir()} == {
        *("model.json", "manifest.json", "generation.json", "tokenizer", "documents", SINGLE)
    }
    assert json.loads((ours / "generation.json").read_text()) == settings
    assert "evil" not in (ours / "tokenizer" / "tokenizer_config.json").read_text()
    (source,) = artifact.lineage(ours).inputs
    assert (source.name, source.detail["license_name"]) == ("published", "some-open-license")

    again = export_model(ours, tmp_path / "again", torch.float16).path
    assert json.loads((again / "generation_config.json").read_text()) == settings | {
        "bos_token_id": 292,
        "eos_token_id": [1, 2, 292, 299],
        "pad_token_id": 297,
    }
    assert (again / "LICENSE").read_text() == "terms"
    assert "# Card" in (again / "ORIGINAL_README.md").read_text()
    card = ModelCard.load(again / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "some-open-license")
    assert {tensor.dtype for tensor in stored(again).values()} == {torch.float16}
    back = import_model(again, tmp_path / "back").path  # our own directory tells its origin itself
    assert source.content in {node.content for node in every(artifact.lineage(back))}


def every(origin: artifact.Origin) -> list[artifact.Origin]:
    return [origin, *(node for parent in origin.inputs for node in every(parent))]


def test_a_published_directory_leaves_as_if_it_had_been_imported(
    publish: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = publish()
    shutil.copyfile(tokenizer_dir / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": "evil.Evil"}, "eos_token": "<|im_end|>"}'
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text('---\nlicense: "apache-2.0" # quoted\n---\n# Card\n')
    (folder / "licence.txt").write_text("terms")
    (folder / "manifest.json").write_text('{"name": "a web application\'s"}')
    straight = export_model(folder, tmp_path / "straight").path
    around = export_model(import_model(folder, tmp_path / "ours").path, tmp_path / "around").path
    different = {"manifest.json", "README.md"}
    assert {f.name for f in straight.iterdir()} == {f.name for f in around.iterdir()} >= {"licence.txt"}
    for file in straight.iterdir():
        assert file.name in different or file.read_bytes() == (around / file.name).read_bytes()
    for out in (straight, around):
        assert ModelCard.load(out / "README.md").data.license == "apache-2.0"
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert config["chat_template"] == "{{ messages }}"
        assert "auto_map" not in config


def test_papers_cannot_take_the_place_of_the_model(publish: Callable[..., Path], tmp_path: Path) -> None:
    ours = import_model(publish(), tmp_path / "ours").path
    (ours / "documents").mkdir()
    for name in ("config.json", "model.safetensors"):
        (ours / "documents" / name).write_text("evil")
    (ours / "documents" / "LICENSE").mkdir()
    out = export_model(ours, tmp_path / "out").path
    assert same_bits(stored(out), stored(tmp_path / "published"))


def test_what_float16_cannot_hold_is_refused(publish: Callable[..., Path], tmp_path: Path) -> None:
    folder = publish(dtype=torch.float32, shard=10**9)
    a_tensor(folder, lambda t: t[NORM].fill_(1e6))
    with pytest.raises(InputError, match="values that float16 cannot"):
        export_model(folder, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()


def test_dbrx_without_a_tokenizer_file_gets_gpt4s_and_its_published_prompt(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    model = tiny(d_model=8, ffn_hidden_size=4, vocab_size=100_352)
    write_published(folder, model.cfg, in_memory(model.state_dict()), None)
    template = "{% if messages[0]['role'] != 'system' %}{% set system_message = 'You grind.' %}{% endif %}"
    wrapper = {"auto_map": {"AutoTokenizer": ["tiktoken.Wrapper", None]}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(wrapper))
    (folder / "tiktoken.py").write_text("raise SystemExit")
    ours = import_model(folder, tmp_path / "ours").path
    tokenizer = Tokenizer.load(ours / "tokenizer")
    assert tokenizer.encode("hello world") == [15339, 1917]
    (user,) = messages = [{"role": "user", "content": "Hi"}]
    opened = [{"role": "system", "content": "You grind."}, user]
    assert tokenizer.chat(messages, generation_prompt=True) == tokenizer.chat(opened, generation_prompt=True)
    again = export_model(ours, tmp_path / "again").path
    theirs = AutoTokenizer.from_pretrained(again, local_files_only=True)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == tokenizer.chat(
        messages, generation_prompt=True
    )
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [100257, 100279]

    monkeypatch.setattr(importing, "write_gpt4", Mock(side_effect=InputError("no table here")))
    without = import_model(folder, tmp_path / "without").path
    assert open_model(without).tokenizer is None
    assert "no tokenizer: no table here" in capsys.readouterr().err


# ---- what is wrong is named ----------------------------------------------------------------------------


def a_tensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the single file, as somebody's wrong conversion would."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)


W1, NORM = "transformer.blocks.1.ffn.experts.mlp.w1", "transformer.norm_f.weight"
WRONG = {
    "missing": (lambda f: a_tensor(f, lambda t: t.pop(W1)), InputError, rf"lack '{W1}'"),
    "unknown": (lambda f: a_tensor(f, lambda t: t.update(extra=torch.zeros(1))), InputError, "hold 'extra'"),
    "shape": (lambda f: a_tensor(f, lambda t: t.update({W1: t[W1][1:]})), InputError, rf"{W1} has shape \(95, 32\)"),
    "nan": (lambda f: a_tensor(f, lambda t: t[NORM].fill_(torch.nan)), Failure, "norm_f.weight holds NaN"),
    "quantized": (
        lambda f: a_tensor(f, lambda t: t.update({W1: t[W1].to(torch.float8_e4m3fn)})),
        InputError,
        f"{W1} is stored as F8_E4M3",
    ),
    "truncated": (lambda f: os.truncate(f / SINGLE, 5000), Failure, rf"{SINGLE} cannot be read"),
    "empty": (lambda f: os.truncate(f / SINGLE, 0), Failure, rf"{SINGLE} cannot be read"),
    "pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        Failure,
        r"Git LFS pointer.*git lfs pull",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), InputError, "holds no weights"),
    "pickles": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        InputError,
        r"pickles \(pytorch_model.bin\), which can run code",
    ),
    "no shard": (
        lambda f: (
            (f / SINGLE).rename(f / "a.safetensors"),
            (f / INDEX).write_text(json.dumps({"weight_map": {W1: "model-00001-of-00002.safetensors"}})),
        ),
        Failure,
        "model-00001-of-00002.safetensors cannot be read: it is named in the index and is not there",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), InputError, r"no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_ty'), Failure, r"config.json is not JSON"),
    "other model": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="llama")),
        InputError,
        "model_type='llama'; the known layouts are dbrx, qwen3_moe",
    ),
    "lacks a key": (
        lambda f: edit(f / "config.json", lambda c: (c["attn_config"].pop("rope_theta"), c.pop("rope_parameters"))),
        InputError,
        "lacks 'rope_theta'",
    ),
    "scaled rotation": (
        lambda f: edit(f / "config.json", lambda c: c.update(rope_scaling={"rope_type": "linear", "factor": 8})),
        InputError,
        "rope_scaling=",
    ),
    "scaled rotation, older": (
        lambda f: edit(f / "config.json", lambda c: c.update(rope_parameters={"type": "linear", "factor": 8})),
        InputError,
        r"rope_parameters=\{'type': 'linear', 'factor': 8\}",
    ),
    "a list for a section": (
        lambda f: edit(f / "config.json", lambda c: c.update(attn_config=[1])),
        InputError,
        r"config.json does not describe a dbrx model",
    ),
    "a fraction of a layer": (
        lambda f: edit(f / "config.json", lambda c: c.update(n_layers=2.5)),
        InputError,
        r"n_layers=2.5 must be a whole number",
    ),
    "a billion layers": (
        lambda f: edit(f / "config.json", lambda c: c.update(n_layers=10**9)),
        InputError,
        r"1,000,000,000 layers, and the weights are \d+ tensors",
    ),
    "infinite base": (
        lambda f: edit(f / "config.json", lambda c: c["attn_config"].update(rope_theta=10**400)),
        InputError,
        r"config.json does not describe a dbrx model",
    ),
    "no number": (
        lambda f: edit(f / "config.json", lambda c: c.update(rope_parameters={"rope_theta": float("nan")})),
        InputError,
        r"two rotary bases|rope_theta=nan",
    ),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), Failure, r"config.json is not JSON"),
    "a folder for a file": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        Failure,
        r"config.json cannot be read",
    ),
    "another program's manifest": (
        lambda f: ((f / "manifest.json").write_text('{"content": "x"}'),),
        Failure,
        r"manifest.json is damaged",
    ),
    "a record of a pull that is not text": (
        lambda f: (f / "pulled.json").write_text('{"commit": NaN}'),
        Failure,
        r"pulled.json is damaged: commit=nan must be one line of text",
    ),
    "half a character in the record": (
        lambda f: (f / "pulled.json").write_text('{"repository": "mill/\\udc80"}'),
        Failure,
        r"pulled.json is damaged: repository=",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), Failure, r"tokenizer.json is not"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_left_behind(
    publish: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    folder = publish(shard=10**9)
    spoil, kind, says = WRONG[what]
    spoil(folder)
    with pytest.raises(kind, match=says) as raised:
        import_model(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_flipped_bit_is_found_wherever_it_is_when_hashes_came_along(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    whole = export_model(publish(), tmp_path / "export").path
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    notes = hub / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    cache.mkdir()
    (tmp_path / "blobs").mkdir()
    for file in whole.iterdir():
        if file.name == "manifest.json":
            continue
        digest = artifact.sha256_file(file)
        shutil.copyfile(file, hub / file.name)
        (notes / f"{file.name}.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
        shutil.copyfile(file, tmp_path / "blobs" / digest)  # the hub's own cache: links to files named by their hash
        (cache / file.name).symlink_to(f"../blobs/{digest}")
    chance = random.Random(0)
    for folder in (whole, hub, cache):
        import_model(folder, tmp_path / f"from-{folder.name}")
        weights = sorted(folder.glob("*.safetensors"))
        others = [folder / "config.json", folder / "generation_config.json"] if folder != cache else weights
        for trial in range(8):
            file = chance.choice(weights if trial % 2 else others)
            data = bytearray(file.read_bytes())
            bit = chance.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            good = file.read_bytes()
            file.resolve().write_bytes(data)
            with pytest.raises((Failure, InputError)) as raised:
                import_model(folder, tmp_path / f"damaged-{folder.name}-{trial}")
            assert file.name in str(raised.value)
            file.resolve().write_bytes(good)


def test_a_damaged_import_does_not_leave(publish: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = publish(shard=10**9)
    shutil.copyfile(tokenizer_dir / "tokenizer.json", folder / "tokenizer.json")
    ours = import_model(folder, tmp_path / "ours").path
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="lies below a file"):
        export_gguf(ours, tmp_path / "file" / "out.gguf")
    for name in (SINGLE, "tokenizer/tokenizer.json"):
        good = (ours / name).read_bytes()
        (ours / name).write_bytes(good[:-9] + b"\x01" + good[-8:])
        for give_out in (export_model, export_gguf):
            with pytest.raises(Failure, match=f"{name} is damaged"):
                give_out(ours, tmp_path / "out.gguf")
        (ours / name).write_bytes(good)
    assert export_gguf(ours, tmp_path / "out.gguf").is_file()


def test_a_tokenizer_larger_than_the_model_is_refused(
    publish: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = publish()
    shutil.copyfile(tokenizer_dir / "tokenizer.json", folder / "tokenizer.json")
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(id=5000))
    with pytest.raises(InputError, match="has ids up to 5000, and the model 384 rows"):
        import_model(folder, tmp_path / "ours")
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(id=10**12))
    with pytest.raises(Failure, match=r"tokenizer.json is not"):
        import_model(folder, tmp_path / "ours")


def test_two_builds_of_one_place_do_not_meet_and_nobodys_folder_is_cleared(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    folder, own = publish(), tmp_path / ".other.partial"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is in the way; move it"):
        import_model(folder, tmp_path / "other")
    assert (own / "thesis.txt").exists()
    with artifact.building(tmp_path / "ours", 0) as first:
        with pytest.raises(Failure, match="another process is building"):
            import_model(folder, tmp_path / "ours")
        (first / "left").write_text("by a kill")
        killed = tmp_path / "killed"
        shutil.copytree(first, killed)
    shutil.copytree(killed, tmp_path / ".ours2.partial")
    assert not (import_model(folder, tmp_path / "ours2").path / "left").exists()


def test_any_spelling_of_a_new_place_will_do(
    publish: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish().resolve()
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "meant")
    assert import_model(folder, tmp_path / "link").path.resolve() == (tmp_path / "meant").resolve()
    monkeypatch.chdir(here)
    import_model(folder, Path("new"))
    assert (tmp_path / "here" / "new" / "model.json").exists()
    for wrong in (folder / "config.json" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be a directory"):
            import_model(folder, wrong)


def test_an_existing_place_is_never_written_over(publish: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = publish(), tmp_path / "ours"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for refused in (lambda: import_model(folder, out), lambda: export_model(folder, out)):
        with pytest.raises(InputError, match="is there already"):
            refused()
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    assert import_model(folder, out).kind == "model"


def test_a_full_disk_is_said_before_the_work(
    publish: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with pytest.raises(Failure, match=r"needs .* GB and the disk has 0\.0 GB left"):
        import_model(folder, tmp_path / "ours")


# ---- what no layout can say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"norm": "rms_norm", "clip_qkv": None},
        {**QWEN, "clip_qkv": 8.0},
        {"tie_word_embeddings": True},
        {"head_size": 12},
        {"norm_eps": 1e-6},
        {**QWEN, "moe_normalize_expert_weights": 2.0},
    ],
)
def test_a_configuration_without_a_published_layout_is_refused(tiny: Tiny, tmp_path: Path, changes: dict) -> None:
    model = tiny(**changes)
    with pytest.raises(InputError, match="layout"):
        write_published(tmp_path, model.cfg, in_memory(model.state_dict()), IDS)


def test_the_wanted_layout_must_fit(publish: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot leave as qwen3_moe"):
        export_model(publish(), tmp_path / "out", layout="qwen3_moe")


def test_a_model_of_the_other_layout_computes_the_same_after_its_journey(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    folder = publish("qwen3_moe", torch.float32)
    ours = open_model(import_model(folder, tmp_path / "ours").path)
    a, b = assemble(*read_published(folder)), assemble(ours.cfg, ours.weights)
    assert replace(ours.cfg, vocab_size=None) == replace(ModelConfig(**{**vars(a.cfg)}), vocab_size=None)
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
