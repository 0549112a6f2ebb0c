"Folders and tables as users have them, of real digits and sentences"
import numpy as np
import pandas as pd
from PIL import Image

from fastai_smooth.data import digit_masks_arrays, digits_arrays, docstrings_arrays

ROUND = (0, 3, 6, 8, 9)


def write_digits(root, n=200, split=False, nested=True):
    "Real digits as PNG files: round/0, straight/1, ..."
    images, labels, _ = digits_arrays()
    for i in range(n):
        kind = 'round' if labels[i] in ROUND else 'straight'
        folder = root/(('valid' if i % 4 == 0 else 'train') if split else '')/(f'{kind}/{labels[i]}' if nested else f'{labels[i]}')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).resize((16, 16)).save(folder/f'{i}.png')
    return labels[:n]


def write_masks(folder, n=40, ignored=255, names='labels', end='_P'):
    "Canvases of digits with a class per pixel"
    canvases, masks, codes, _ = digit_masks_arrays(n, 1)
    for name in ('images', names): (folder/name).mkdir(parents=True)
    (folder/'codes.txt').write_text('\n'.join(codes)+'\n')
    for i in range(n):
        Image.fromarray(canvases[i]).save(folder/'images'/f'{i:03}.png')
        Image.fromarray(np.where(masks[i] < 0, ignored, masks[i]).astype(np.uint8)).save(folder/names/f'{i:03}{end}.png')
    return canvases[:n], masks[:n]


def two_masks(folder, mode='L', value=1, size=(16, 16), n=10):
    "Masks of two classes as files of a mode: i+2 rows of cat"
    for name in ('images', 'labels'): (folder/name).mkdir(parents=True)
    (folder/'codes.txt').write_text('sky\ncat')
    for i in range(n):
        mask = np.zeros(size[::-1], np.uint8)
        mask[:i+2] = value
        image = Image.fromarray(mask)
        if mode == 'P':
            image = Image.fromarray(mask, 'P')
            image.putpalette([0, 0, 0, 128, 0, 0]+[7, 7, 7]*254)
        elif mode == '1': image = Image.fromarray(mask*255).convert('1')
        Image.new('RGB', (16, 16), (9*i, 0, 0)).save(folder/'images'/f'{i}.png')
        image.save(folder/'labels'/f'{i}.png')


def write_texts(path, several=False, n=600):
    "Sentences and their packages; with `several`, also whether they are short"
    texts, labels, vocab = docstrings_arrays()
    picked = np.random.default_rng(0).permutation(len(texts))[:n]
    rows = [(texts[i], [vocab[labels[i]], *(['short'] if several and len(texts[i]) < 60 else [])]) for i in picked]
    pd.DataFrame([(t, ';'.join(ls)) for t, ls in rows], columns=['text', 'package']).to_csv(path, index=False)
    return rows
