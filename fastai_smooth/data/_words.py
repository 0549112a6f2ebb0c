"Character-level texts, kept only until the recipes read words"
import importlib
import pkgutil

import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, MultiCategory
from fastai.torch_core import TensorBase, TensorMultiCategory
from fasttransform import Transform

from .loaders import random_split, seeded

WORD_LENGTH = 16

def words_arrays()->tuple: # Words, multi-hot languages (N, K) bool, language codes
    "The stop words of spaCy's languages, Honnibal & Montani, https://spacy.io/models; ImportError that says how to install it if it is missing"
    try: import spacy.lang
    except ImportError: raise ImportError("words comes with the package spacy: pip install spacy") from None
    lists = {}
    for module in pkgutil.iter_modules(spacy.lang.__path__):
        if not module.ispkg: continue
        try: lists[module.name] = importlib.import_module(f'spacy.lang.{module.name}.stop_words').STOP_WORDS
        except ModuleNotFoundError: continue # a language without stop words
    vocab = sorted(lists)
    words = sorted({w for v in lists.values() for w in v if w})
    place = {w: i for i, w in enumerate(words)}
    labels = np.zeros((len(words), len(vocab)), bool)
    for k, name in enumerate(vocab): labels[[place[w] for w in lists[name] if w],k] = True
    return words,labels,vocab

def words(
    bs:int=128, # Batch size
    valid_pct:float=.2, # Share of the validation set, in (0, 1)
    seed:int=42, # Seed of the split and of the shuffling
    soft:bool=False, # Whether the labels are a distribution, equal shares of the languages, rather than multi-hot
)->DataLoaders: # Batches of characters (bs, 16), 0 where the word has ended, and labels (bs, 76); `.characters` are the known ones, from 2 on; 1 is any other
    "Words as characters, and the languages they belong to"
    texts,labels,vocab = words_arrays()
    if soft: labels = labels/labels.sum(1, keepdims=True)
    with seeded(seed): return text_dls(texts, labels, vocab, random_split(len(texts), valid_pct, seed), bs, WORD_LENGTH)

class Characters:
    "A text to the numbers of its characters: 0 is the end, 1 an unknown one"
    def __init__(self, alphabet, length): self.length,self.number = length,{c: i for i, c in enumerate(alphabet, 2)}
    def __call__(self, text):
        known = [self.number.get(c, 1) for c in text[:self.length]]
        return TensorBase(known+[0]*(self.length-len(known)))

class RowOfLabels(Transform):
    "A list that ends with a row of a multi-hot or soft label matrix to that row; back to names"
    def __init__(self, vocab): self.vocab = list(vocab)
    def encodes(self, item): return TensorMultiCategory(item[1])
    def decodes(self, y:TensorMultiCategory): return MultiCategory([self.vocab[k] for k in y.as_subclass(torch.Tensor).nonzero()[:,0].tolist()])

def first_of(item): return item[0] # a step of its own: `predict` is handed what comes after it
def last_of(item): return item[1]

def text_dls(
    texts:list, # Strings
    labels, # Class indices (N,), or a multi-hot or soft label matrix (N, K)
    vocab, # Class names
    splits, # Item numbers of the training set and of the validation set
    bs:int=64, # Batch size
    length:int=256, # Characters that are read of each text
)->DataLoaders: # Batches of characters (bs, length) and labels; `.characters` are those of the training set
    "Texts as the numbers of their characters: from 2 on in the order of `.characters`, 1 any other, 0 where the text has ended"
    splits,vocab = [[int(i) for i in s] for s in splits],list(vocab)
    characters = sorted({c for i in splits[0] for c in texts[i]})
    several = np.ndim(labels) == 2
    targets = torch.as_tensor(labels).float() if several else [vocab[k] for k in labels]
    items = [[text, target] for text, target in zip(texts, targets)] # so that an export, which has no items, has no texts
    target = [RowOfLabels(vocab)] if several else [last_of, Categorize(vocab=vocab, sort=False)]
    dsets = Datasets(items, [[first_of, Characters(characters, length)], target], splits=splits)
    dls = dsets.dataloaders(bs=bs, val_bs=2*bs, num_workers=0)
    dls.vocab,dls.c,dls.characters,dls.texts = vocab,len(vocab),characters,texts
    return dls

