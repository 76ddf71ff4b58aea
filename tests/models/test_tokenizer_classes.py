"""A directory's tokenizer gives the ids of AutoTokenizer, whatever class its files name."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hf_directory import is_model_directory
from jaxdistill.models.hub import load_model
from jaxdistill.models.tokenizer import load_tokenizer
from tests import tiny
from tests.gguf_files import TEXTS, byte_fields, byte_tokenizer, piece_fields, write_raw

CASES = ["hi", "<s>hi", " hi", "hi hi", "<s> hi</s>hi", "h\ni", ""]


def pieces() -> PreTrainedTokenizerFast:
    """A Llama 2 tokenizer in small: SentencePiece pieces, a space put before every text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁hi", "▁h", "▁hi"]
    vocab = {token: i for i, token in enumerate(names)}
    bpe = models.BPE(vocab, [("▁", "h"), ("▁h", "i")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(bpe)
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(marks)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def edit(path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    d = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


@pytest.mark.parametrize("space", [None, False, True])
@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "TokenizersBackend"]
)
def test_the_class_and_the_prefix_space_of_sentence_piece_are_heeded(kind, space, tmp_path):
    pieces().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=kind, add_prefix_space=space)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [ours(text)["input_ids"] for text in CASES] == [theirs(t)["input_ids"] for t in CASES]
    if kind.startswith("Llama"):  # not legacy: no space after a special token
        assert ours.tokenize("<s>hi") == ["<s>", "h", "i"]
        assert ours.tokenize("hi") == (["h", "i"] if space is False else ["▁hi"])
    save_hf(tmp_path / "m", C, tiny.params(C), ours)  # as a student's directory has it
    again, read = AutoTokenizer.from_pretrained(tmp_path / "m"), load_model(tmp_path / "m")
    for tokenizer in (again, read.text_tokenizer()):
        assert [tokenizer(t)["input_ids"] for t in CASES] == [ours(t)["input_ids"] for t in CASES]


C = tiny.config(vocab_size=300)


@pytest.mark.parametrize("space", [None, False, True])
@pytest.mark.parametrize("kind", [None, "GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizerFast"])
def test_byte_level_classes_are_heeded(kind, space, tmp_path):
    byte_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=kind, add_prefix_space=space)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [ours(text)["input_ids"] for text in TEXTS] == [theirs(t)["input_ids"] for t in TEXTS]
    if kind == "GPT2Tokenizer":
        assert ours.tokenize("a")[0].startswith("Ġ") is (space is True)


def test_the_class_may_be_named_in_config_json(tmp_path):
    pieces().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=None, add_prefix_space=False)
    edit(tmp_path / "config.json", model_type="llama", tokenizer_class="LlamaTokenizer")
    assert load_tokenizer(tmp_path).tokenize("hi") == ["h", "i"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": "AutoModelForCausalLM"}, "tokenizer_class 'AutoModelForCausalLM'"),
        ({"tokenizer_class": 7}, "tokenizer_class 7"),
        ({"tokenizer_class": "CTRLTokenizer"}, "CTRLTokenizer, which transformers runs in Python"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}, "tokenizer_class": "B"}, "tokenizer_class"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "cannot read the tokenizer"),
        ({"vocab": "/etc/passwd"}, "'vocab', which makes other files be read"),
    ],
)
def test_other_classes_are_refused_in_one_line(changes, message, tmp_path):
    pieces().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version\n")
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=None)
    edit(tmp_path / "tokenizer_config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_files_tokenizer_gives_the_same_ids_when_saved(kind, tmp_path):
    """AutoTokenizer goes by the model's type where it distrusts the class that is saved."""
    fields = byte_fields("qwen2") if kind.startswith("qwen") else piece_fields()
    file = write_raw(tmp_path / "t.gguf", "llama", {"context_length": 77}, {}, fields)
    tokenizer = tokenizer_from_gguf(GGUFFile(file))
    tokenizer.save_pretrained(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", model_type=kind)
    again = load_tokenizer(tmp_path / "m")
    assert [again(t)["input_ids"] for t in TEXTS] == [tokenizer(t)["input_ids"] for t in TEXTS]


@pytest.fixture
def named(tmp_path):
    """A model directory with two templates in the older form, a list in tokenizer_config.json."""
    tiny.save_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    edit(tmp_path / "model" / "tokenizer_config.json", chat_template=templates)
    return tmp_path / "model"


def test_named_templates_are_exported_again_without_loss(named, tmp_path):
    templates = {"default": "A", "tool_use": "B"}
    for source in (named, tmp_path / "out", tmp_path / "out"):  # the last export is replaced
        model = load_model(source)
        assert model.text_tokenizer().chat_template == templates
        save_hf(tmp_path / "out", model.config, model.params, model.tokenizer)
        assert is_model_directory(tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 101])
def test_a_template_name_that_is_no_file_name_is_refused(name, named):
    templates = [{"name": "default", "template": "A"}, {"name": name, "template": "B"}]
    edit(named / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match="has a chat template named"):
        load_tokenizer(named)


def test_a_template_is_a_text_of_bounded_size(named):
    edit(named / "tokenizer_config.json", chat_template="x" * (2**20 + 1))
    with pytest.raises(UserError, match="1048577 characters; accepted: up to 1048576"):
        load_tokenizer(named)


def test_a_users_folder_next_to_the_templates_is_no_model_directory(named):
    folder = named / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("B")
    assert is_model_directory(named)
    (folder / "notes.txt").touch()
    assert not is_model_directory(named)
