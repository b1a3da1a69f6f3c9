"""Models and adapters load whole: what would be drawn at random is refused, or taken when told."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
import transformers as hf
from audits import run, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import influence_fast as inf
from influence_fast.data.models import load_model

ENCODER = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of BERT with several heads, and of none."""
    folder = tmp_path_factory.mktemp("models")
    config = hf.BertConfig(**ENCODER)
    kinds = ("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForPreTraining", "Model")
    for kind in kinds:
        getattr(hf, f"Bert{kind}")(config).save_pretrained(folder / kind)
    return folder


def adapter(saved: Path, base: str, folder: Path, **settings) -> Path:
    torch.manual_seed(0)
    network = hf.BertForSequenceClassification.from_pretrained(saved / base)
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["query"], **settings))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForMaskedLM", "ForTokenClassification"])
def test_auto_loads_what_the_folder_was_saved_as(saved: Path, kind: str) -> None:
    model, _ = load_model(str(saved / kind))
    assert type(model) is getattr(hf, f"Bert{kind}")
    expected = load_file(saved / kind / "model.safetensors")
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_seq2seq_by_its_config(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=models.VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path))[0], hf.T5ForConditionalGeneration)


def test_translators_by_their_class(tmp_path: Path) -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
    config = hf.MarianConfig(vocab_size=models.VOCAB, pad_token_id=0, decoder_start_token_id=0, **sizes, **layers)
    hf.MarianMTModel(config).save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path))[0], hf.MarianMTModel)


@pytest.mark.parametrize(
    ("kind", "task", "lacking"),
    [
        ("ForMaskedLM", "classification", "missing: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias"),
        ("ForTokenClassification", "classification", "missing: bert.pooler.dense.bias"),
        ("ForSequenceClassification", "causal-lm", "missing: cls.predictions"),
        ("Model", "auto", "missing: classifier.bias, classifier.weight"),
    ],
)
def test_a_head_drawn_at_random_is_refused(saved: Path, kind: str, task: str, lacking: str) -> None:
    with pytest.raises(inf.InputError, match=lacking) as error:
        load_model(str(saved / kind), task)
    assert "allow_new_weights" in str(error.value)
    load_model(str(saved / kind), task, allow_new_weights=True)


def test_weights_of_another_size_are_refused(saved: Path, tmp_path: Path) -> None:
    model = hf.BertForSequenceClassification.from_pretrained(saved / "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    hf.BertConfig(**ENCODER, num_labels=5, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    with pytest.raises(inf.InputError, match=r"of another size: classifier.bias, classifier.weight\)"):
        load_model(str(tmp_path))


def test_an_adapter_without_its_head(saved: Path, tmp_path: Path) -> None:
    whole = adapter(saved, "Model", tmp_path / "whole", task_type="SEQ_CLS")
    model, _ = load_model(str(whole))
    head = load_file(whole / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(model.state_dict()["base_model.model.classifier.modules_to_save.default.weight"], head)
    # The task's type is what has PEFT save the head.
    bare = adapter(saved, "Model", tmp_path / "bare")
    with pytest.raises(inf.InputError, match=r"missing: classifier.bias, classifier.weight\)"):
        load_model(str(bare))
    load_model(str(bare), allow_new_weights=True)
    # A head that the base brings will do, and another task's is not missed; but a pooler is.
    load_model(str(adapter(saved, "ForSequenceClassification", tmp_path / "based")))
    load_model(str(adapter(saved, "ForPreTraining", tmp_path / "other", task_type="SEQ_CLS")))
    with pytest.raises(inf.InputError, match=r"missing: bert.pooler.dense.bias, bert.pooler.dense.weight\)"):
        load_model(str(adapter(saved, "ForMaskedLM", tmp_path / "masked", task_type="SEQ_CLS")))


def test_an_adapter_that_lost_a_matrix(saved: Path, tmp_path: Path) -> None:
    folder = adapter(saved, "Model", tmp_path, task_type="SEQ_CLS")
    weights = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in weights if "lora_B" in name)
    weights["base_model.model.other"] = weights.pop(lost)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(inf.InputError, match=rf"missing: {lost}; unexpected: base_model.model.other\)"):
        load_model(str(folder))


def test_the_command_line_takes_new_weights_when_told(saved: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [5, 6, 7], "labels": 1}\n{"input_ids": [8, 9], "labels": 0}\n')
    options = ["--model", saved / "Model", "--data", data, "--layers", "head", "--out", tmp_path / "store"]
    code, _, err = run("build", *options)
    assert (code, "missing: classifier.bias" in err) == (1, True), err
    assert not (tmp_path / "store").exists()
    code, _, err = run("build", *options, "--allow-new-weights")
    assert code == 0, err


def test_texts_need_a_classifier_or_a_language_model(saved: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a", "label": 1}\n')
    code, _, err = run("build", "--model", saved / "ForMaskedLM", "--data", data, "--out", tmp_path / "store")
    assert (code, "this is a BertForMaskedLM; give rows with 'input_ids'" in err) == (1, True), err


def test_an_adapter_with_added_tokens(tmp_path: Path) -> None:
    base = models.make("llama", "causal")
    base.save_pretrained(tmp_path / "base")
    tokens = tokenizer()
    tokens.add_tokens(["<a>", "<b>"])
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokens))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    for name, brings in (("whole", True), ("bare", False)):
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=brings)
        tokens.save_pretrained(tmp_path / name)
    found, own = load_model(str(tmp_path / "whole"))
    assert len(own) == len(tokens) == models.VOCAB + 2
    batch = {"input_ids": torch.tensor([[3, models.VOCAB, models.VOCAB + 1]])}
    torch.testing.assert_close(found(**batch).logits, adapted.eval()(**batch).logits)
    with pytest.raises(inf.InputError, match="has 39 tokens, its base 37 word vectors"):
        load_model(str(tmp_path / "bare"))
    assert load_model(str(tmp_path / "bare"), allow_new_weights=True)[0].get_input_embeddings().num_embeddings == 39
