"""Dense retrieval's vectors, by a tiny random BERT made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from oppu.config import load
from oppu.encoder import Encoder
from oppu.records import InputError, Item, Query
from oppu.retrieval import Search, retrieve_for_queries
from oppu.setting import parse_augmentation
from oppu.tasks import task

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "road", "far", "away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    vocab = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(path)
    return path


def test_vectors_are_the_mean_of_the_last_states_whatever_stands_beside(folder: Path) -> None:
    encoder = Encoder(str(folder))
    texts = ["the cat sat on the mat", "a dog", "", "far away the road ran on a dog the cat sat"]
    together = encoder(texts)
    assert together.shape == (4, 16) and np.allclose(np.linalg.norm(together, axis=1), [1, 1, 0, 1], atol=1e-5)
    alone = np.stack([encoder([text])[0] for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    plain = BertModel.from_pretrained(folder).eval()
    states = plain(**encoder.tokenizer("a dog", return_tensors="pt")).last_hidden_state[0].mean(0).detach().numpy()
    assert np.abs(together[1] - states / np.linalg.norm(states)).max() < 1e-5


def test_the_nearest_item_is_retrieved(folder: Path) -> None:
    news = task("LaMP_2N")
    texts = ["cat sat mat cat", "dog ran road far away", "on a the a the"]
    history = [Item(str(n), None, {"text": text, "category": "crime"}) for n, text in enumerate(texts)]
    query = Query("q", news.input.replace("{article}", "the dog ran"))
    search = Search("text", Encoder(str(folder)))
    (found,) = retrieve_for_queries(news, history, [query], parse_augmentation("dense-k3"), search=search)
    vectors = search.encode([news.item_text(item) for item in history]) @ search.encode(["the dog ran"])[0]  # type: ignore[misc]
    assert [int(item.id) for item in found] == list(np.argsort(-vectors))


def test_a_folder_without_a_model_and_a_config_without_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not be loaded"):
        Encoder(str(tmp_path))
    with pytest.raises(InputError, match=r"retrieval\.encoder"):
        load({"augmentations": ["dense-k1"]})
